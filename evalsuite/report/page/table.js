// Tables that scroll where they are too wide.

import { number4, range } from "./data.js";
import { breakable, el } from "./elements.js";

export const scroll = (label, tall, table) =>
  el("div", { class: tall ? "scroll tall" : "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
/** The first column has names, those of `words` text, the others numbers. */
export const dense = (columns, rows, { id, words = [] } = {}) =>
  el(
    "table",
    { class: "dense", id },
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        columns.map((text, n) =>
          el("th", { scope: "col", class: n && !words.includes(text) && "number" }, breakable(text)),
        ),
      ),
    ),
    el("tbody", {}, rows),
  );
/** A value as its file has it, and the ends of its interval. */
export const exact = ({ value, low, high }, title) =>
  el(
    "span",
    { title },
    el("data", { class: "value", value }, number4(value)),
    typeof low === "number" && el("span", { class: "interval" }, range(number4(low), number4(high))),
  );

/** A `Table` record's node, and what is saved of it. */
export function tableOf({ title, columns, rows }) {
  const isMetric = (value) => value !== null && typeof value === "object";
  const counts = columns.map((_, n) => rows.every((row) => Number.isInteger(row[n])));
  const shownAs = (value, n) => {
    if (isMetric(value)) return exact({ value: value.value, low: value.ci95?.[0], high: value.ci95?.[1] });
    return typeof value === "number" ? el("data", { value }, counts[n + 1] ? value : number4(value)) : value;
  };
  const body = rows.map(([name, ...cells]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, breakable(String(name))),
      cells.map((value, n) => el("td", { class: typeof value !== "string" && "number" }, shownAs(value, n))),
    ),
  );
  const words = columns.filter((_, n) => rows.every((row) => typeof row[n] === "string"));
  const metrics = columns.map((_, n) => rows.some((row) => isMetric(row[n])));
  const table = () => ({
    columns: columns.flatMap((name, n) => (metrics[n] ? [name, "ci95_low", "ci95_high"] : [name])),
    rows: rows.map((row) =>
      row.flatMap((value, n) => (metrics[n] ? [value?.value, ...(value?.ci95 || [null, null])] : [value])),
    ),
  });
  return { node: scroll(title, true, dense(columns, body, { words })), table };
}
