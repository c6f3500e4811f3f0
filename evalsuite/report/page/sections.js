// The parts of the page: a title, controls, and what they choose.

import { KINDS } from "./charts.js";
import { isEncoder, legend, who } from "./data.js";
import { el, pick, saves } from "./elements.js";
import { galleryOf } from "./gallery.js";
import { plot } from "./plot.js";
import { tableOf } from "./table.js";

const main = document.getElementById("main"),
  contents = document.getElementById("sections");
export function section({ key, short, title, about }, ...children) {
  const heading = el("h2", { id: `${key}-title` }, title);
  main.append(
    el("section", { id: key, "aria-labelledby": heading.id }, heading, el("p", { class: "about" }, about), children),
  );
  contents.append(el("a", { href: `#${key}` }, short));
}

/** Controls for the `where` of records, and those records that fit what they say. */
export function choices(records, change) {
  const found = new Map();
  for (const { where = {} } of records)
    for (const [label, value] of Object.entries(where)) found.set(label, (found.get(label) || new Set()).add(value));
  const picks = [...found].map(([label, values]) => [
    label,
    pick(
      label,
      [...values].map((each) => [each, each]),
      change,
    ),
  ]);
  return {
    nodes: picks.filter(([label]) => found.get(label).size > 1).map(([, { node }]) => node),
    fits: ({ where = {} }) => picks.every(([label, { value }]) => !(label in where) || where[label] === value()),
  };
}

let figures = 0;
const slug = (text) => text.toLowerCase().replaceAll(/[^a-z0-9]+/g, "_");
function figure(key, chart, made) {
  const id = `figure-${++figures}`,
    where = Object.entries(chart.where || {}),
    own = isEncoder(chart.title) ? [["encoder", chart.title]] : [],
    fixed = [...own, ...where.map(([label, value]) => [slug(label), value])];
  const table = () => {
    const { columns, rows } = made.table();
    return {
      columns: [...fixed.map(([label]) => label), ...columns],
      rows: rows.map((row) => [...fixed.map(([, value]) => value), ...row]),
    };
  };
  const small = where.map(([, value]) => value).filter((value) => !chart.title.includes(value));
  return el(
    "figure",
    { class: "card", "aria-labelledby": id },
    el(
      "figcaption",
      {},
      el("h3", { id }, who(chart.title), small.length > 0 && el("small", {}, small.join(" · "))),
      saves(key, `${chart.title}${small.length ? `, ${small.join(", ")}` : ""}`, table),
    ),
    made.node,
    [chart.note, made.note].filter(Boolean).map((text) => el("p", { class: "foot" }, text)),
  );
}

/** A section from its record: of its charts those that its controls choose. */
export function drawn(record) {
  const hidden = new Set(),
    keys = el("div", { class: "keys" }),
    place = el("div", { class: "figures" }),
    own = el("div", { class: "own" });
  let plots = [];
  const redraw = () => plots.forEach(({ render }) => render());
  const render = () => {
    const chosen = record.charts.filter(chooser.fits);
    plots = [];
    const made = chosen.map((chart) => {
      if (chart.kind === "Table") return tableOf(chart);
      if (chart.kind === "Gallery") return galleryOf(chart);
      const of = KINDS[chart.kind](chart, hidden, redraw),
        drawing = plot({ label: [chart.title, ...Object.values(chart.where || {})].join(", "), ...of });
      plots.push(drawing);
      return { ...of, node: drawing.host };
    });
    const all = new Map(made.flatMap((each) => each.keys || []).map((each) => [each.name, each]));
    keys.replaceChildren(all.size ? legend([...all.values()], hidden, redraw) : "");
    own.replaceChildren(...made.flatMap((each) => each.controls || []));
    const nodes = made.map((each, n) => [chosen[n].wide, figure(record.key, chosen[n], each)]),
      panels = nodes.filter(([wide]) => !wide).map(([, node]) => node);
    place.replaceChildren(
      ...nodes.filter(([wide]) => wide).map(([, node]) => node),
      // Two panels a row where three would leave one alone.
      panels.length ? el("div", { class: [1, 2, 4].includes(panels.length) ? "panels wide" : "panels" }, panels) : "",
      chosen.length ? "" : el("p", { class: "about" }, "No result has this."),
    );
  };
  const chooser = choices(record.charts, render);
  render();
  section(record, el("div", { class: "controls" }, chooser.nodes, own), keys, place);
}
