// The summary, and every metric.

import { DATA, chanceOf, encoders, gap, held, holders, interval, results, shown, whole, who } from "./data.js";
import { breakable, el, saves } from "./elements.js";
import { choices, section } from "./sections.js";
import { dense, exact, scroll, tableOf } from "./table.js";

const taught = (i) => encoders[i].taught_by;
const origin = ({ value, chance }, file) => `${value}${chance === undefined ? "" : `, chance ${chance}`} · ${file}`;
const noun = encoders.some((each) => each.teacher) ? "student" : "encoder";
/** What encoder `i` has of a headline, and the same of its teacher. */
const pair = (i, { metric }) => [held[i].get(metric), taught(i) === null ? undefined : held[taught(i)].get(metric)];

export function summary() {
  if (!DATA.headlines.length) return;
  let sorted = { metric: null, up: false };
  const all = DATA.headlines.map((each, n) => ({ ...each, best: DATA.best[n] }));
  const table = el("table", { class: "summary", id: "summary-table", "aria-label": "Headline metrics by encoder" });
  const feet = el("div", {});
  const order = () => {
    const found = encoders.map((_, i) => i),
      sign = sorted.up ? 1 : -1;
    if (sorted.metric === "name") found.sort((a, b) => encoders[a].name.localeCompare(encoders[b].name) * sign);
    else if (sorted.metric)
      found.sort((a, b) => {
        const [x, y] = [a, b].map((i) => held[i].get(sorted.metric)?.value);
        return (x === undefined) - (y === undefined) || (x - y) * sign || a - b;
      });
    return found;
  };
  const head = (label, lines, metric, lower) =>
    el(
      "th",
      {
        scope: "col",
        class: metric === "name" ? "" : "number",
        "data-metric": metric,
        "aria-sort": sorted.metric === metric ? (sorted.up ? "ascending" : "descending") : "none",
      },
      el(
        "button",
        {
          type: "button",
          on: {
            click: () => {
              sorted = { metric, up: sorted.metric === metric ? !sorted.up : metric === "name" || lower };
              render();
              table.querySelector(`[data-metric="${CSS.escape(metric)}"] button`).focus();
            },
          },
        },
        label,
      ),
      lines.map((line) => el("small", {}, line || "\u00a0")),
    );
  const cell = (headline, i) => {
    const { axis, best } = headline,
      [found, from] = pair(i, headline);
    if (!found) return el("td", { class: "number none" }, el("span", { "aria-label": "not measured" }, "–"));
    return el(
      "td",
      { class: best === i ? "number best" : "number", title: origin(found, found.result.file) },
      el("data", { class: "value", value: found.value }, shown(axis, found.value)),
      best === i && el("span", { class: "unseen" }, ` best ${noun}`),
      el("span", { class: "interval" }, interval(axis, found) || "\u00a0"),
      from &&
        el(
          "span",
          { class: "gap" },
          el("span", { class: "unseen" }, "to the teacher: "),
          gap(axis, found.value - from.value),
        ),
    );
  };
  const shownOnes = () => all.filter(chooser.fits);
  const render = () => {
    const columns = shownOnes();
    const heads = columns.map(({ axis, note, metric }) => {
      const lower = axis.better === "lower";
      return head(axis.name, [note, lower && "lower is better"], metric, lower);
    });
    table.replaceChildren(
      el("thead", {}, el("tr", {}, head("Encoder", ["", ""], "name", false), heads)),
      el(
        "tbody",
        {},
        order().map((i) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, who(encoders[i].name, encoders[i].teacher && "teacher")),
            columns.map((each) => cell(each, i)),
          ),
        ),
      ),
    );
    const measured = new Map(); // on how many rows → of which columns
    for (const { axis, note, about, rows } of columns) {
      const name = [axis.name, about || note].filter(Boolean).join(", ");
      if (rows || about) measured.set(rows, [...(measured.get(rows) || []), name]);
    }
    feet.replaceChildren(
      ...[...measured].map(([rows, of]) => el("p", { class: "foot" }, `${of.join("; ")}${rows ? `: ${rows}` : ""}.`)),
    );
  };
  const data = () => ({
    columns: ["encoder", "teacher", "metric", "value", "ci95_low", "ci95_high", "distance_to_teacher", "file"],
    rows: encoders.flatMap(({ name, teacher }, i) =>
      shownOnes()
        .filter(({ metric }) => held[i].has(metric))
        .map((headline) => {
          const [found, from] = pair(i, headline),
            { value, low, high, result } = found;
          return [name, teacher, headline.metric, value, low, high, from && value - from.value, result.file];
        }),
    ),
  });
  const chooser = choices(all, () => {
    if (sorted.metric !== "name") sorted = { metric: null, up: false };
    render();
  });
  render();
  section(
    {
      key: "summary",
      short: "Summary",
      title: "Summary",
      about: "One row an encoder. Select a column's name to sort by it.",
    },
    el("div", { class: "controls" }, chooser.nodes),
    el(
      "div",
      { class: "card" },
      el("div", { class: "head" }, el("h3", {}, "Headline metrics"), saves("summary", "the summary", data)),
      scroll("Summary table", false, table),
      el(
        "p",
        { class: "foot" },
        encoders.filter((each) => !each.teacher).length > 1 &&
          `Highlighted: the best ${noun}, where its 95 % interval is beyond every other's. `,
        "Below each value: its 95 % interval, where the result has one",
        encoders.some((_, i) => taught(i) !== null)
          ? ", and how far it is from the teacher's (pp: percentage points)."
          : ".",
      ),
      feet,
    ),
  );
}

/** The page's first words: of how much it is, and which encoder is the best of the first headline. */
export function introduction() {
  const lead = document.getElementById("lead"),
    plural = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;
  lead.append(`${plural(results.length, "result")}${encoders.length ? ` of ${plural(encoders.length, "encoder")}` : ""}. `);
  const at = DATA.best[0];
  if (at === undefined || at === null) return;
  const { axis, note } = DATA.headlines[0],
    [found, from] = pair(at, DATA.headlines[0]),
    teacher = from && encoders[taught(at)].name;
  lead.append(
    `Best ${noun} by ${axis.name}${note ? ` (${note})` : ""}: `,
    el("strong", {}, encoders[at].name),
    ` with ${shown(axis, found.value)}`,
    from ? `, ${gap(axis, found.value - from.value)} against its teacher` : "",
    teacher && teacher !== "teacher" ? `, ${teacher}.` : ".",
  );
}

export function metrics() {
  const names = [...new Set(held.flatMap((of) => [...of.keys()]))],
    repeated = new Set(DATA.repeated),
    folded = names.map((name) => name.startsWith("per_class/") || repeated.has(name));
  const value = (found) => exact(found, origin(found, found.result.file));
  const rows = names.map((name) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, breakable(name)),
      held.map((of) => {
        const found = of.get(name);
        if (!found) return el("td");
        const replaced = found.others.map((other) => [
          el("br"),
          value(other),
          el("span", { class: "interval" }, `replaced: ${other.result.file}`),
        ]);
        return el("td", { class: "number" }, value(found), replaced);
      }),
    ),
  );
  const tally = el("span", { class: "about", "aria-live": "polite" });
  const show = () => {
    const wanted = filter.value.toLowerCase().trim().split(/\s+/);
    rows.forEach((row, n) => {
      const found = wanted.every((each) => names[n].toLowerCase().includes(each));
      row.hidden = !found || (folded[n] && !unfold.checked && !filter.value.trim());
    });
    tally.textContent = `${whole(rows.filter((row) => !row.hidden).length)} of ${whole(names.length)} metrics`;
  };
  const filter = el("input", { type: "search", placeholder: "part of a name", on: { input: show } });
  const unfold = el("input", { type: "checkbox", on: { change: show } });
  show();
  const table = () => ({
    columns: ["encoder", "metric", "value", "ci95_low", "ci95_high", "chance", "command", "file"],
    rows: results.flatMap((result) =>
      Object.entries(result.metrics).map(([name, [of, low, high]]) => {
        const encoder = result.encoder === null ? "" : encoders[result.encoder].name;
        return [encoder, name, of, low, high, chanceOf(result, name), result.command, result.file];
      }),
    ),
  });
  const loose = results.filter((result) => result.encoder === null && result.command !== "compare");
  section(
    {
      key: "metrics",
      short: "All metrics",
      title: "All metrics",
      about: "Every number of every result, as its file has it.",
    },
    el(
      "div",
      { class: "card" },
      el("div", { class: "head" }, el("h3", {}, "By encoder"), saves("metrics", "all metrics", table)),
      names.length > 0 && [
        el(
          "div",
          { class: "controls" },
          el("label", {}, "Filter", filter),
          folded.includes(true) && el("label", { class: "tick" }, unfold, "single classes and means of one set too"),
          tally,
        ),
        scroll(
          "All metrics",
          true,
          dense(["Metric", ...encoders.map(({ name }) => name)], rows, { id: "metrics-table" }),
        ),
      ],
    ),
    loose.map(({ command, file, metrics: of }) => {
      const title = `${command}: ${file}`,
        listed = Object.entries(of).map(([name, [value, ...ci95]]) => [name, { value, ci95 }]);
      return el(
        "div",
        { class: "card" },
        el("div", { class: "head" }, el("h3", {}, title)),
        tableOf({ title, columns: ["Metric", "Value"], rows: listed }).node,
      );
    }),
  );
}
