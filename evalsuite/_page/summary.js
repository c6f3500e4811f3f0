// The table of headline metrics.

function summary() {
  let detector =
    detectors.find((each) => each === "knn") ||
    [...detectors].sort((a, b) => held_by(`${b}/near/mean/auroc`) - held_by(`${a}/near/mean/auroc`))[0];
  let sorted = { metric: null, up: false };
  const table = el("table", { class: "summary", id: "summary-table", "aria-label": "Headline metrics by encoder" });
  const order = () => {
    const all = encoders.map((_, i) => i);
    if (sorted.metric === "name")
      all.sort((a, b) => encoders[a].name.localeCompare(encoders[b].name) * (sorted.up ? 1 : -1));
    else if (sorted.metric)
      all.sort((a, b) => {
        const [x, y] = [a, b].map((i) => held[i].get(sorted.metric)?.value);
        return (x === undefined) - (y === undefined) || (x - y) * (sorted.up ? 1 : -1) || a - b;
      });
    return all;
  };
  const render = () => {
    const columns = headlines(detector);
    const head = (label, sub, metric, kind) =>
      el(
        "th",
        {
          scope: "col",
          class: kind,
          "data-metric": metric,
          "aria-sort": sorted.metric === metric ? (sorted.up ? "ascending" : "descending") : "none",
        },
        el(
          "button",
          {
            type: "button",
            on: {
              click: () => {
                sorted = { metric, up: sorted.metric === metric ? !sorted.up : metric === "name" || isLower(metric) };
                render();
                table.querySelector(`[data-metric="${CSS.escape(metric)}"] button`).focus();
              },
            },
          },
          label,
        ),
        el("small", {}, sub || "\u00a0"),
        el("small", {}, isLower(metric) ? "lower is better" : "\u00a0"),
      );
    const body = order().map((i) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, who(i, true)),
        columns.map(({ metric }) => {
          const found = held[i].get(metric),
            best = bests(metric).includes(i),
            from = taught(i) === null ? undefined : held[taught(i)].get(metric);
          if (!found) return el("td", { class: "number none" }, el("span", { "aria-label": "not measured" }, "–"));
          return el(
            "td",
            {
              class: best ? "number best" : "number",
              title:
                (metric.startsWith("mean/") ? `${meanOf(found.result, metric)}: ` : "") +
                source(found, found.result.file),
            },
            el("data", { class: "value", value: found.value }, shown(metric, found.value)),
            best && el("span", { class: "unseen" }, ` best ${noun}`),
            el("span", { class: "interval" }, interval(metric, found) || "\u00a0"),
            from &&
              el(
                "span",
                { class: "gap" },
                el("span", { class: "unseen" }, "to the teacher: "),
                gap(metric, found.value - from.value),
              ),
          );
        }),
      ),
    );
    table.replaceChildren(
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          head("Encoder", "", "name", ""),
          columns.map(({ label, sub, metric }) => head(label, sub, metric, "number")),
        ),
      ),
      el("tbody", {}, body),
    );
  };
  const columns = ["encoder", "teacher", "metric", "value", "ci95_low", "ci95_high", "distance_to_teacher", "file"];
  const tableData = () => ({
    columns,
    rows: encoders.flatMap((encoder, i) =>
      headlines(detector)
        .filter(({ metric }) => held[i].has(metric))
        .map(({ metric }) => {
          const found = held[i].get(metric),
            from = taught(i) === null ? undefined : held[taught(i)].get(metric);
          return [
            encoder.name,
            encoder.teacher,
            metric,
            found.value,
            found.low,
            found.high,
            from && found.value - from.value,
            found.result.file,
          ];
        }),
    ),
  });
  const chooser =
    detectors.length > 1
      ? pick(
          "OOD detector",
          detectors.map((each) => [each, each]),
          (value) => {
            detector = value;
            if (sorted.metric !== "name") sorted = { metric: null, up: false };
            render();
          },
        )
      : null;
  if (chooser) chooser.value = detector;
  if (!headlines(detector).length) return;
  render();
  const corrupted = headlines(detector).find(({ metric }) => metric.startsWith("mean/"));
  const means = held
    .filter((of) => of.has(corrupted?.metric))
    .map((of) => meanOf(of.get(corrupted.metric).result, corrupted.metric));
  section(
    "summary",
    "Summary",
    "Summary",
    "One row an encoder. Select a column's name to sort by it.",
    chooser && el("div", { class: "controls" }, chooser.node),
    el(
      "div",
      { class: "card" },
      el("div", { class: "head" }, el("h3", {}, "Headline metrics"), saves("summary", "the summary", tableData)),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Summary table" }, table),
      el(
        "p",
        { class: "foot" },
        encoders.filter((each) => !each.teacher).length > 1
          ? `Highlighted: the best ${noun} by value, all of them where they tie. `
          : "",
        "Below each value: its 95 % interval, where the result has one",
        encoders.some((_, i) => taught(i) !== null)
          ? ", and how far it is from the teacher's (pp: percentage points)."
          : ".",
        corrupted && ` ${corrupted.label}: ${[...new Set(means)].join("; or ")}.`,
      ),
    ),
  );
}
