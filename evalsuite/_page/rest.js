// Comparisons, every metric, and where the numbers come from.

const number4 = (value) =>
  Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-4)
    ? value.toExponential(3).replace("-", MINUS)
    : fixed(value, 4);
const exact = (found, file) =>
  el(
    "span",
    { title: source(found, file) },
    el("data", { class: "value", value: found.value }, number4(found.value)),
    found.low !== undefined && el("span", { class: "interval" }, range(number4(found.low), number4(found.high))),
  );

function metrics() {
  const rows = names.map((name) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, breakable(name)),
      held.map((of) => {
        const found = of.get(name);
        return el(
          "td",
          { class: "number" },
          found
            ? [
                exact(found, found.result.file),
                found.others.map((other) => [
                  el("br"),
                  exact(other, other.result.file),
                  el("span", { class: "interval" }, `replaced: ${other.result.file}`),
                ]),
              ]
            : "",
        );
      }),
    ),
  );
  const ofClass = names.map((name) => name.startsWith("per_class/"));
  const tally = el("span", { class: "about", "aria-live": "polite" });
  const show = () => {
    const wanted = filter.value.toLowerCase().trim().split(/\s+/);
    rows.forEach((row, n) => {
      const found = wanted.every((each) => names[n].toLowerCase().includes(each));
      row.hidden = !found || (ofClass[n] && !classes.checked && !filter.value.trim());
    });
    const left = rows.filter((row) => !row.hidden).length;
    tally.textContent = `${left.toLocaleString("en")} of ${names.length.toLocaleString("en")} metrics`;
  };
  const filter = el("input", { type: "search", placeholder: "part of a name", on: { input: show } });
  const classes = el("input", { type: "checkbox", on: { change: show } });
  show();
  const table = () => ({
    columns: ["encoder", "metric", "value", "ci95_low", "ci95_high", "chance", "command", "file"],
    rows: results.flatMap((result) =>
      Object.entries(result.metrics).map(([name, [value, low, high]]) => [
        result.encoder === null ? "" : encoders[result.encoder].name,
        name,
        value,
        low,
        high,
        chanceOf(result, name),
        result.command,
        result.file,
      ]),
    ),
  });
  const loose = results.filter((result) => result.encoder === null && result.command !== "compare");
  section(
    "metrics",
    "All metrics",
    "All metrics",
    "Every number of every result, as its file has it.",
    names.length
      ? el(
          "div",
          { class: "card" },
          el("div", { class: "head" }, el("h3", {}, "By encoder"), saves("metrics", "all metrics", table)),
          el(
            "div",
            { class: "controls" },
            el("label", {}, "Filter", filter),
            ofClass.includes(true) && el("label", { class: "tick" }, classes, "single classes too"),
            tally,
          ),
          el(
            "div",
            { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "All metrics" },
            el(
              "table",
              { class: "dense", id: "metrics-table" },
              el(
                "thead",
                {},
                el(
                  "tr",
                  {},
                  el("th", { scope: "col" }, "Metric"),
                  encoders.map((encoder) => el("th", { scope: "col", class: "number" }, breakable(encoder.name))),
                ),
              ),
              el("tbody", {}, rows),
            ),
          ),
        )
      : null,
    loose.map((result) =>
      el(
        "div",
        { class: "card", paint: { "margin-top": "16px" } },
        el(
          "div",
          { class: "head" },
          el("h3", {}, `${result.command}: ${result.file}`),
          names.length ? null : saves("metrics", "all metrics", table),
        ),
        el(
          "div",
          { class: "scroll tall", tabindex: "0", role: "region", "aria-label": `Metrics of ${result.file}` },
          el(
            "table",
            { class: "dense" },
            el(
              "thead",
              {},
              el("tr", {}, el("th", { scope: "col" }, "Metric"), el("th", { scope: "col", class: "number" }, "Value")),
            ),
            el(
              "tbody",
              {},
              Object.entries(result.metrics).map(([name, [value, low, high]]) =>
                el(
                  "tr",
                  {},
                  el("th", { scope: "row" }, name),
                  el("td", { class: "number" }, exact({ value, low, high }, result.file)),
                ),
              ),
            ),
          ),
        ),
      ),
    ),
  );
}

function comparisons() {
  const all = results.filter((result) => result.command === "compare");
  if (!all.length) return;
  const name = (result, side) => result.inputs[side]?.path || side.toUpperCase();
  section(
    "comparisons",
    "Comparisons",
    "Comparisons",
    "Two results on the same samples. Positive differences mean that B's value is higher; an interval that leaves out 0 tells the two apart. Nothing is corrected for the number of metrics.",
    all.map((result) => {
      const { a = {}, b = {}, verdicts = {}, differing = [], not_compared = [] } = result.parameters,
        entries = Object.entries(result.metrics),
        other = (side, metric) =>
          typeof side[metric] === "number" ? el("data", { value: side[metric] }, number4(side[metric])) : "";
      return el(
        "div",
        { class: "card" },
        el(
          "div",
          { class: "head" },
          el("h3", {}, breakable(`A: ${name(result, "a")}`), el("br"), breakable(`B: ${name(result, "b")}`)),
          saves("comparison", `the comparison in ${result.file}`, () => ({
            columns: ["metric", "a", "b", "difference", "ci95_low", "ci95_high", "verdict", "file"],
            rows: entries.map(([metric, [value, low, high]]) => [
              metric,
              a[metric],
              b[metric],
              value,
              low,
              high,
              verdicts[metric],
              result.file,
            ]),
          })),
        ),
        el(
          "div",
          { class: "scroll tall", tabindex: "0", role: "region", "aria-label": `Comparison in ${result.file}` },
          el(
            "table",
            { class: "dense" },
            el(
              "thead",
              {},
              el(
                "tr",
                {},
                ["Metric", "A", "B", "B − A", "Verdict"].map((text, n) =>
                  el("th", { scope: "col", class: n && n < 4 ? "number" : "" }, text),
                ),
              ),
            ),
            el(
              "tbody",
              {},
              entries.map(([metric, [value, low, high]]) =>
                el(
                  "tr",
                  {},
                  el("th", { scope: "row" }, breakable(metric)),
                  el("td", { class: "number" }, other(a, metric)),
                  el("td", { class: "number" }, other(b, metric)),
                  el("td", { class: "number" }, exact({ value, low, high }, result.file)),
                  el("td", {}, verdicts[metric] || ""),
                ),
              ),
            ),
          ),
        ),
        differing.length > 0 && el("p", { class: "foot" }, `A and B differ in: ${differing.join("; ")}.`),
        not_compared.length > 0 && el("p", { class: "foot" }, breakable(`Not compared: ${not_compared.join(", ")}.`)),
      );
    }),
  );
}

function provenance() {
  const flat = (value, at = "") =>
    value !== null && typeof value === "object" && Object.keys(value).length
      ? Array.isArray(value) && value.every((each) => typeof each !== "object")
        ? [[at, value.join(", ")]]
        : Object.entries(value).flatMap(([key, each]) => flat(each, at ? `${at} › ${key}` : key))
      : [[at, value === null ? "none" : typeof value === "object" ? "none" : String(value)]];
  const facts = (title, value) =>
    Object.keys(value).length
      ? [
          el("h4", {}, title),
          el(
            "dl",
            { class: "facts" },
            flat(value).map(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]),
          ),
        ]
      : [];
  section(
    "provenance",
    "Sources",
    "Where the numbers come from",
    "What went into each result, how it was measured, and with which versions.",
    el(
      "div",
      { class: "card" },
      el(
        "div",
        { class: "head" },
        el("h3", {}, "Results"),
        saves("provenance", "inputs, parameters and versions", () => ({
          columns: ["file", "command", "encoder", "part", "name", "value"],
          rows: results.flatMap((result) =>
            ["inputs", "parameters", "versions"].flatMap((part) =>
              flat(result[part])
                .filter(([name]) => name)
                .map(([name, text]) => [
                  result.file,
                  result.command,
                  result.encoder === null ? "" : encoders[result.encoder].name,
                  part,
                  name,
                  text,
                ]),
            ),
          ),
        })),
      ),
      results.map((result) =>
        el(
          "details",
          {},
          el(
            "summary",
            {},
            el(
              "span",
              { class: "what" },
              `${result.command}${result.encoder === null ? "" : `, ${encoders[result.encoder].name}`}`,
            ),
            el("span", { class: "where" }, result.file),
          ),
          el(
            "div",
            { class: "fold" },
            result.remarks.length > 0 && [
              el("h4", {}, "Remarks"),
              el(
                "ul",
                {},
                result.remarks.map((text) => el("li", {}, breakable(text))),
              ),
            ],
            facts("Inputs", result.inputs),
            facts("Parameters", result.parameters),
            facts("Versions", result.versions),
          ),
        ),
      ),
    ),
  );
}

function introduction() {
  const lead = document.getElementById("lead"),
    plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
  const first = headlines(detectors.includes("knn") ? "knn" : detectors[0])[0],
    best = first ? bests(first.metric) : [];
  lead.append(`${plural(results.length, "result")} of ${plural(encoders.length, "encoder")}. `);
  if (best.length === 1) {
    const [i] = best,
      { value } = held[i].get(first.metric),
      from = taught(i) === null ? undefined : held[taught(i)].get(first.metric);
    lead.append(
      `Best ${noun} by `,
      `${first.label}${first.sub ? ` (${first.sub})` : ""}: `,
      el("strong", {}, encoders[i].name),
      ` with ${shown(first.metric, value)}`,
      from ? `, ${gap(first.metric, value - from.value)} against its teacher ${encoders[taught(i)].name}.` : ".",
    );
  }
  if (DATA.notices.length)
    document.getElementById("notices").append(
      el(
        "aside",
        { class: "notice", "aria-label": "Remarks" },
        el("p", {}, "Remarks"),
        el(
          "ul",
          {},
          DATA.notices.map((text) => el("li", {}, text)),
        ),
      ),
    );
  document.getElementById("footer").append(
    el("span", {}, `Made by evalsuite report, featcache ${DATA.version}.`),
    el(
      "button",
      {
        type: "button",
        class: "quiet",
        on: { click: () => save("report.json", "application/json", JSON.stringify(DATA, null, 1)) },
      },
      "Save everything as JSON",
    ),
  );
}
