// Drawings that fit their box and are read by pointer, touch and arrow keys; and their axes.

import { axisName, digitsOf, fixed } from "./data.js";
import { el, picture, svg } from "./elements.js";

const tip = document.getElementById("tip"),
  spoken = document.getElementById("said");
let follow = null; // puts the tip where its mark now is
let byKeys = false; // then a pointer that only lies there changes nothing
addEventListener("scroll", () => follow?.(), { passive: true, capture: true });

function showTip(text, image, x, y) {
  tip.replaceChildren(...(image ? [picture(image, 96)] : []), text);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const above = y - height - 14;
  tip.style.left = `${Math.max(8, Math.min(x - width / 2, document.documentElement.clientWidth - width - 8))}px`;
  tip.style.top = `${above > 6 ? above : y + 18}px`;
}

/** A drawing that is drawn again when its box changes. `draw(width)` gives its `node` and its `marks`, { x, y, text } in
    pixels, read by whoever points near them (`byX`: above or below) or presses arrow keys (`keyed`, if those are others);
    a mark's `node` stands out meanwhile, and its `image` is shown. */
export function plot({ label, draw, byX = false, reach = 42 }) {
  let drawn = { marks: [] },
    at = -1,
    width = 0,
    ring = null,
    lit = null;
  const host = el("div", {
    class: "plot",
    tabindex: "0",
    role: "group",
    "aria-label": `${label}. Arrow keys read its values.`,
  });
  const leave = () => {
    tip.hidden = true;
    follow = null;
    ring?.setAttribute("visibility", "hidden");
    lit?.classList.remove("on");
  };
  const point = (mark) => {
    leave();
    follow = () => {
      const box = host.getBoundingClientRect();
      showTip(mark.text, mark.image, box.left + mark.x, box.top + mark.y);
    };
    ring.setAttribute("cx", mark.x);
    ring.setAttribute("cy", mark.y);
    ring.setAttribute("visibility", "visible");
    lit = mark.node;
    lit?.classList.add("on");
    follow();
  };
  const render = () => {
    width = Math.floor(host.clientWidth);
    if (width < 40) return;
    drawn = draw(width);
    at = -1;
    ring = svg("circle", { class: "ring", r: 6, visibility: "hidden" });
    drawn.node.append(ring);
    host.replaceChildren(drawn.node);
  };
  const near = (event) => {
    if (event.type === "pointermove" && byKeys && !event.movementX && !event.movementY) return;
    byKeys = false;
    const box = host.getBoundingClientRect(),
      [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = null,
      least = (byX ? reach * 2 : reach) ** 2;
    for (const mark of drawn.marks) {
      const far = (mark.x - x) ** 2 + (mark.y - y) ** 2 * (byX ? 1e-4 : 1);
      if (far < least) [least, best] = [far, mark];
    }
    if (best) point(best);
    else leave();
  };
  host.addEventListener("pointermove", near);
  host.addEventListener("pointerdown", near);
  host.addEventListener("pointerleave", () => byKeys || leave());
  host.addEventListener("blur", leave);
  host.addEventListener("keydown", (event) => {
    const keyed = drawn.keyed || drawn.marks,
      n = keyed.length;
    const to = {
      ArrowRight: at + 1,
      ArrowDown: at + 1,
      ArrowLeft: Math.max(at, 0) - 1,
      ArrowUp: Math.max(at, 0) - 1,
      Home: 0,
      End: -1,
    }[event.key];
    if (event.key === "Escape") leave();
    if (to === undefined || !n) return;
    event.preventDefault();
    byKeys = true;
    at = (to + n) % n;
    point(keyed[at]);
    spoken.textContent = keyed[at].text;
  });
  new ResizeObserver(() => Math.floor(host.clientWidth) !== width && render()).observe(host);
  return { host, render };
}

// -- axes

export function ticks(low, high, wanted) {
  const raw = (high - low) / Math.max(1, wanted),
    power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  const digits = -Math.floor(Math.log10(step) + 1e-9) + (/[.]5|^2.5/.test(String(step / power)) ? 1 : 0);
  return { found, digits: Math.max(0, Math.min(8, digits)) };
}
/** The axis' range, or the values' with some room, within what the values can be. */
export function domain(axis, values, room = 0.06) {
  if (axis.range) return axis.range;
  const all = axis.line === undefined ? values : [...values, axis.line];
  if (!all.length) return [0, 1];
  const low = Math.min(...all),
    high = Math.max(...all),
    by = (high - low || Math.abs(high) * 0.1 || 1) * room;
  return [
    Math.min(low, Math.max(low - by, axis.least ?? -Infinity)),
    Math.max(high, Math.min(high + by, axis.most ?? Infinity)),
  ];
}
/** Values and the ends of their intervals. */
export const ends = (found) => found.flatMap(({ value, low, high }) => [value, low ?? value, high ?? value]);
function tickText(value, digits, share) {
  if (share) return fixed(value * 100, Math.max(0, digits - 2));
  return Math.abs(value) >= 1e5 ? value.toExponential(1) : fixed(value, digits);
}
export const drawing = (width, height, label) =>
  svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
const word = (attributes, text) => svg("text", attributes, text);

/** An SVG with axes, each over its domain, with its name, numbers (at `at`, where given) and dashed line, and where values
    stand in it. `rows` are names in place of the y axis' numbers, from the top. */
export function axes(width, height, label, x, y, { xs, ys, at, rows, left = rows ? 0 : 46 }) {
  const right = 14,
    top = rows ? 8 : 26,
    bottom = 42,
    node = drawing(width, height, label);
  const X = (value) => left + ((value - xs[0]) / (xs[1] - xs[0])) * (width - left - right);
  const Y = (value) => height - bottom - ((value - ys[0]) / (ys[1] - ys[0])) * (height - top - bottom);
  const across = at ? { found: at, digits: 0 } : ticks(...xs, (width - left - right) / 76);
  const lines = rows ? rows.map((_, n) => n) : ticks(...ys, (height - top - bottom) / 44);
  if (rows)
    rows.forEach((name, n) => {
      const below = top + ((height - top - bottom) * (n + 1)) / rows.length,
        middle = below - (height - top - bottom) / rows.length / 2 + 4;
      node.append(
        svg("line", { class: "grid", x1: 0, x2: width - right, y1: below, y2: below }),
        word({ x: 0, y: middle, class: "name" }, [svg("title", {}, name), clipped(name, left - 8)]),
      );
    });
  else
    for (const value of lines.found)
      node.append(
        svg("line", { class: "grid", x1: left, x2: width - right, y1: Y(value), y2: Y(value) }),
        word({ x: left - 8, y: Y(value) + 4, "text-anchor": "end" }, tickText(value, lines.digits, y.share)),
      );
  for (const value of across.found)
    node.append(
      svg("line", {
        class: rows ? "grid" : "axis",
        x1: X(value),
        x2: X(value),
        y1: rows ? top : height - bottom,
        y2: height - bottom + (rows ? 0 : 4),
      }),
      word({ x: X(value), y: height - bottom + 17, "text-anchor": "middle" }, tickText(value, across.digits, x.share)),
    );
  const reference = (x1, x2, y1, y2) => node.append(svg("line", { class: "reference", x1, x2, y1, y2 }));
  if (x.line !== undefined) reference(X(x.line), X(x.line), top, height - bottom);
  if (y?.line !== undefined) reference(left, width - right, Y(y.line), Y(y.line));
  if (!rows)
    node.append(
      svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
      word({ x: 0, y: 12, class: "name" }, clipped(axisName(y), width)),
    );
  node.append(
    word({ x: width - right, y: height - 6, "text-anchor": "end", class: "name" }, clipped(axisName(x), width - right)),
  );
  return { node, X, Y, left, right, top, bottom, reference };
}
export const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");
export const line = (points, { colour, dash, width, opacity = 1 }) =>
  svg("path", {
    d: path(points),
    fill: "none",
    "stroke-width": width,
    "stroke-dasharray": dash,
    "stroke-linejoin": "round",
    "stroke-opacity": opacity,
    paint: { stroke: colour },
  });
export const whisker = (x1, x2, y1, y2, colour) =>
  svg("line", { class: "whisker", x1, x2, y1, y2, paint: { stroke: colour } });
export const shape = ({ shape, colour }, x, y, r) => svg("path", { d: shape(x, y, r), paint: { fill: colour } });
const ruler = el("canvas").getContext("2d");
ruler.font = `12px ${getComputedStyle(document.documentElement).fontFamily}`;
export const widthOf = (text) => ruler.measureText(text).width;
export function clipped(text, pixels) {
  let n = text.length;
  const cut = () => (n < text.length ? `${text.slice(0, n)}…` : text);
  while (n > 3 && widthOf(cut()) > pixels) n--;
  return cut();
}
export const brief = (value, span) =>
  Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : fixed(value, digitsOf(span));
