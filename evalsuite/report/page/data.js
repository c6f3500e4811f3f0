// The results' numbers: what each encoder has, how it is written, and how encoders and sets look.

import { breakable, el, svg } from "./elements.js";

export const DATA = JSON.parse(document.getElementById("data").textContent);
export const { encoders, pictures, results } = DATA;

// -- metrics by encoder; of several results the last counts

export function chanceOf({ parameters }, name) {
  const chance = parameters.chance?.[name];
  return typeof chance === "number" ? chance : undefined;
}
export const held = encoders.map(() => new Map());
for (const result of results) {
  if (result.encoder === null) continue;
  for (const [name, [value, low, high]] of Object.entries(result.metrics)) {
    const of = held[result.encoder],
      before = of.get(name);
    const others = before ? [...before.others, ...(before.value === value ? [] : [before])] : [];
    of.set(name, { value, low, high, chance: chanceOf(result, name), result, others });
  }
}
/** The numbers of the encoders that have any of these metrics. */
export const holders = (metrics) =>
  encoders.map((_, i) => i).filter((i) => metrics.some((metric) => held[i].has(metric)));

// -- numbers in words

const MINUS = "−";
export const fixed = (value, digits) =>
  (Object.is(value, -0) || (value < 0 && Number(value.toFixed(digits)) === 0) ? 0 : value)
    .toFixed(digits)
    .replace("-", MINUS);
export const percent = (value, digits = 1) => `${fixed(value * 100, digits)} %`;
export const whole = (value) => value.toLocaleString("en");
/** Digits enough to tell two values `span` apart. */
export const digitsOf = (span) => Math.max(0, Math.min(8, 2 - Math.floor(Math.log10(span || 1))));
export const shown = (axis, value) => (axis.share ? percent(value) : fixed(value, 3));
export const range = (low, high) => low + (`${low}${high}`.includes(MINUS) ? " to " : "–") + high;
export function interval(axis, { low, high }) {
  if (low === undefined || low === null) return "";
  const [a, b] = [low, high].map((end) => (axis.share ? fixed(end * 100, 1) : fixed(end, 3)));
  return range(a, b) + (axis.share ? " %" : "");
}
export const gap = (axis, value) => {
  const by = axis.share ? value * 100 : value,
    text = fixed(Math.abs(by), axis.share ? 1 : 3);
  return `${Number(text) === 0 ? "±" : by > 0 ? "+" : MINUS}${text}${axis.share ? " pp" : ""}`;
};
export const number4 = (value) =>
  Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-4)
    ? value.toExponential(3).replace("-", MINUS)
    : fixed(value, 4);
export const axisName = ({ name, share, better }) =>
  name + (share ? " (%)" : "") + (better ? `, ${better} is better` : "");
/** A value in words: what it is of, its name and value, its interval and what chance reaches. */
export const said = (lines, axis, found) =>
  [
    ...lines,
    `${axis.name} ${shown(axis, found.value)}`,
    interval(axis, found) && `95 % interval ${interval(axis, found)}`,
    found.chance !== undefined && `chance ${shown(axis, found.chance)}`,
  ]
    .filter(Boolean)
    .join("\n");

// -- looks: colour, and dash and shape for who cannot tell colours apart

export const SHAPES = [
  (x, y, r) => `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
  (x, y, r) => `M${x - r * 0.9},${y - r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}z`,
  (x, y, r) => `M${x},${y - r * 1.2}L${x + r * 1.1},${y + r * 0.8}H${x - r * 1.1}z`,
  (x, y, r) => `M${x},${y - r * 1.3}L${x + r * 1.3},${y}L${x},${y + r * 1.3}L${x - r * 1.3},${y}z`,
  (x, y, r) => `M${x},${y + r * 1.2}L${x + r * 1.1},${y - r * 0.8}H${x - r * 1.1}z`,
  (x, y, r) =>
    `M${x - r * 1.1},${y - r * 0.4}h${r * 0.7}v${-r * 0.7}h${r * 0.8}v${r * 0.7}h${r * 0.7}v${r * 0.8}h${-r * 0.7}v${r * 0.7}h${-r * 0.8}v${-r * 0.7}h${-r * 0.7}z`,
];
const nth = (n) => ({
  colour: `var(--e${n % 6})`,
  dash: ["", "7 3", "2 3", "9 3 2 3"][Math.floor(n / 6) % 4],
  shape: SHAPES[(n + Math.floor(n / 6)) % 6],
  width: 2,
});
const INK = { colour: "var(--ink)", dash: "", width: 2.5 };
const QUIET = { colour: "var(--soft)", dash: "", width: 1.1, opacity: 0.5, quiet: true };
let student = 0;
const LOOKS = new Map(
  encoders.map(({ name, teacher }) => [name, teacher ? { ...INK, shape: SHAPES[3] } : nth(student++)]),
);
const met = { "": [] }; // the names of each tone, in order
/** How a series of this name and tone looks, the same all over the page. */
export function lookOf(name, tone = "") {
  if (tone === "quiet") return QUIET;
  if (tone === "strong") return INK;
  if (!tone && LOOKS.has(name)) return LOOKS.get(name);
  const of = (met[tone] ||= []);
  if (!of.includes(name)) of.push(name);
  const at = of.indexOf(name);
  if (!tone) return nth(student + at);
  if (tone === "class") return nth(at);
  if (tone === "rest") return { colour: "var(--soft)", dash: "", shape: SHAPES[at % 3], width: 1.6 };
  return {
    colour: tone === "id" ? "var(--id)" : `var(--${tone}-${at % 3})`,
    dash: tone === "far" ? "5 3" : ["", "1.5 3"][at % 2],
    shape: SHAPES[{ near: 1, far: 2 }[tone] || 0],
    width: 1.6,
  };
}
const swatch = ({ colour, dash, shape }) =>
  svg(
    "svg",
    { width: 26, height: 14, "aria-hidden": "true" },
    svg("line", {
      x1: 2,
      x2: 24,
      y1: 7,
      y2: 7,
      "stroke-width": 2.25,
      "stroke-dasharray": dash,
      paint: { stroke: colour },
    }),
    shape && svg("path", { d: shape(13, 7, 4.2), paint: { fill: colour } }),
  );
/** A button for each of `keys`, { name, look, note }, that hides it; `hidden` holds the names that are. */
export const legend = (keys, hidden, change) =>
  el(
    "ul",
    { class: "legend" },
    keys.map(({ name, look, note }) => {
      const button = el(
        "button",
        {
          type: "button",
          "aria-pressed": String(!hidden.has(name)),
          on: {
            click: () => {
              if (!hidden.delete(name)) hidden.add(name);
              button.setAttribute("aria-pressed", String(!hidden.has(name)));
              change();
            },
          },
        },
        swatch(look),
        el("span", {}, breakable(name), note && el("small", {}, ` ${note}`)),
      );
      return el("li", {}, button);
    }),
  );
/** The encoder's name beside its mark; text where no encoder is called so. */
export const who = (name, badge) =>
  !LOOKS.has(name)
    ? name.split("\n").flatMap((line, n) => [n ? el("br") : null, ...breakable(line)])
    : el(
        "span",
        { class: "who" },
        svg(
          "svg",
          { class: "dot", width: 14, height: 14, "aria-hidden": "true" },
          svg("path", { d: LOOKS.get(name).shape(7, 7, 4.6), paint: { fill: LOOKS.get(name).colour } }),
        ),
        el("span", {}, breakable(name), badge && el("span", { class: "badge" }, badge)),
      );
export const isEncoder = (name) => LOOKS.has(name);
