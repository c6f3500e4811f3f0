// The results' numbers: what each encoder has, how it is written, and how encoders and sets look.

const DATA = JSON.parse(document.getElementById("data").textContent);
const { encoders, results } = DATA;

// -- metrics by encoder; of several results the last counts

const chanceOf = ({ parameters }, name) => {
  const chance = parameters.chance?.[name];
  return typeof chance === "number" ? chance : undefined;
};
const held = encoders.map(() => new Map());
for (const result of results) {
  if (result.encoder === null) continue;
  for (const [name, [value, low, high]] of Object.entries(result.metrics)) {
    const of = held[result.encoder],
      before = of.get(name),
      chance = chanceOf(result, name);
    const others = before ? [...before.others, ...(before.value === value ? [] : [before])] : [];
    of.set(name, { value, low, high, chance, result, others });
  }
}
const names = [...new Set(held.flatMap((of) => [...of.keys()]))];
const last = (name) => name.slice(name.lastIndexOf("/") + 1);
const isShare = (name) => /^(macro_)?top\d+(@\d+)?$|^fpr95_/.test(last(name));
const isLower = (name) => /^(fpr95_|procrustes|mce|error)/.test(last(name).toLowerCase());
const MINUS = "−";
const fixed = (value, digits) =>
  (Object.is(value, -0) || (value < 0 && Number(value.toFixed(digits)) === 0) ? 0 : value)
    .toFixed(digits)
    .replace("-", MINUS);
const percent = (value, digits = 1) => `${fixed(value * 100, digits)} %`;
const shown = (name, value) => (isShare(name) ? percent(value) : fixed(value, 3));
const range = (low, high) => low + (`${low}${high}`.includes(MINUS) ? " to " : "–") + high;
const interval = (name, { low, high }) =>
  low === undefined
    ? ""
    : isShare(name)
      ? `${range(fixed(low * 100, 1), fixed(high * 100, 1))} %`
      : range(fixed(low, 3), fixed(high, 3));
const gap = (name, value) => {
  const by = isShare(name) ? value * 100 : value,
    text = fixed(Math.abs(by), isShare(name) ? 1 : 3);
  return `${Number(text) === 0 ? "±" : by > 0 ? "+" : MINUS}${text}${isShare(name) ? " pp" : ""}`;
};

// -- how encoders and sets look: colour, and dash and shape for who cannot tell colours apart

const SHAPES = [
  (x, y, r) => `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
  (x, y, r) => `M${x - r * 0.9},${y - r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}z`,
  (x, y, r) => `M${x},${y - r * 1.2}L${x + r * 1.1},${y + r * 0.8}H${x - r * 1.1}z`,
  (x, y, r) => `M${x},${y - r * 1.3}L${x + r * 1.3},${y}L${x},${y + r * 1.3}L${x - r * 1.3},${y}z`,
  (x, y, r) => `M${x},${y + r * 1.2}L${x + r * 1.1},${y - r * 0.8}H${x - r * 1.1}z`,
  (x, y, r) =>
    `M${x - r * 1.1},${y - r * 0.4}h${r * 0.7}v${-r * 0.7}h${r * 0.8}v${r * 0.7}h${r * 0.7}v${r * 0.8}h${-r * 0.7}v${r * 0.7}h${-r * 0.8}v${-r * 0.7}h${-r * 0.7}z`,
];
/** A name that may break after its separators only. */
const breakable = (name) => name.split(/(?<=[/_:,])/).flatMap((part, n) => (n ? [el("wbr"), part] : [part]));
let student = 0;
const LOOKS = encoders.map((encoder) => {
  const n = encoder.teacher ? -1 : student++;
  return n < 0
    ? { colour: "var(--ink)", dash: "", shape: SHAPES[3] }
    : {
        colour: `var(--e${n % 6})`,
        dash: ["", "7 3", "2 3", "9 3 2 3"][Math.floor(n / 6) % 4],
        shape: SHAPES[(n + Math.floor(n / 6)) % 6],
      };
});
const setTitle = (set) =>
  ({ id: "ID test", csid: `ID, shifted: ${set.name}` })[set.group] || `${set.group}-OOD: ${set.name}`;
function setLook(set, sets) {
  if (set.group === "id") return { colour: "var(--id)", dash: "" };
  const at = sets.filter((other) => other.group === set.group).findIndex((other) => other.name === set.name);
  return { colour: `var(--${set.group}-${at % 3})`, dash: set.group === "far" ? "5 3" : ["", "1.5 3"][at % 2] };
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
const dot = (i) =>
  svg(
    "svg",
    { class: "dot", width: 14, height: 14, "aria-hidden": "true" },
    svg("path", { d: LOOKS[i].shape(7, 7, 4.6), paint: { fill: LOOKS[i].colour } }),
  );

const who = (i, badge) =>
  el(
    "span",
    { class: "who" },
    dot(i),
    el(
      "span",
      {},
      breakable(encoders[i].name),
      badge && encoders[i].teacher && el("span", { class: "badge" }, "teacher"),
    ),
  );

function legend(items, change) {
  const hidden = new Set();
  const list = el(
    "ul",
    { class: "legend" },
    items.map(({ key, label, look }) => {
      if (!change) return el("li", {}, el("span", { class: "key" }, swatch(look), el("span", {}, label)));
      const button = el(
        "button",
        {
          type: "button",
          "aria-pressed": "true",
          on: {
            click: () => {
              const now = !hidden.delete(key);
              if (now) hidden.add(key);
              button.setAttribute("aria-pressed", String(!now));
              change(hidden);
            },
          },
        },
        swatch(look),
        el("span", {}, label),
      );
      return el("li", {}, button);
    }),
  );
  return list;
}
