// Drawings that fit their box and are read by pointer, touch and arrow keys.

const tip = document.getElementById("tip"),
  said = document.getElementById("said");
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(x - width / 2, document.documentElement.clientWidth - width - 8));
  const above = y - height - 14;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 6 ? above : y + 18}px`;
}
let follow = null; // puts the tip where its mark now is
let byKeys = false; // then a pointer that only lies there changes nothing
const hideTip = () => {
  tip.hidden = true;
  follow = null;
};
addEventListener("scroll", () => follow?.(), { passive: true, capture: true });

/** A drawing that fits its box and is drawn again when that changes; `draw(width)` gives its node and its marks:
    { x, y, text } in pixels, read by whoever points near them (`byX`: above or below) or presses arrow keys. */
function plot(label, draw, { byX = false, reach = 42 } = {}) {
  let marks = [],
    keyed = [],
    at = -1,
    width = 0,
    ring = null;
  const host = el("div", {
    class: "plot",
    tabindex: "0",
    role: "group",
    "aria-label": `${label}. Arrow keys read its values.`,
  });
  const point = (mark) => {
    follow = () => {
      const box = host.getBoundingClientRect();
      showTip(mark.text, box.left + mark.x, box.top + mark.y);
    };
    if (ring) {
      ring.setAttribute("cx", mark.x);
      ring.setAttribute("cy", mark.y);
      ring.setAttribute("visibility", "visible");
    }
    follow();
  };
  const leave = () => {
    hideTip();
    if (ring) ring.setAttribute("visibility", "hidden");
  };
  const render = () => {
    width = Math.floor(host.clientWidth);
    if (width < 40) return;
    const drawn = draw(width);
    marks = drawn.marks;
    keyed = drawn.keyed || marks;
    at = -1;
    const layer = drawn.over || drawn.node;
    ring = svg("circle", { class: "ring", r: 6, visibility: "hidden" });
    layer.append(ring);
    host.replaceChildren(...(drawn.over ? [drawn.node, drawn.over] : [drawn.node]));
  };
  const near = (event) => {
    if (event.type === "pointermove" && byKeys && !event.movementX && !event.movementY) return;
    byKeys = false;
    const box = host.getBoundingClientRect(),
      x = event.clientX - box.left,
      y = event.clientY - box.top;
    let best = null,
      least = (byX ? reach * 2 : reach) ** 2;
    for (const mark of marks) {
      const far = byX ? (mark.x - x) ** 2 + (mark.y - y) ** 2 * 1e-4 : (mark.x - x) ** 2 + (mark.y - y) ** 2;
      if (far < least) {
        least = far;
        best = mark;
      }
    }
    if (best) point(best);
    else leave();
  };
  host.addEventListener("pointermove", near);
  host.addEventListener("pointerdown", near);
  host.addEventListener("pointerleave", () => byKeys || leave());
  host.addEventListener("blur", leave);
  host.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") leave();
    if (step === undefined || !keyed.length) return;
    event.preventDefault();
    byKeys = true;
    at =
      step === -Infinity
        ? 0
        : step === Infinity
          ? keyed.length - 1
          : (at + step + keyed.length + (at < 0 && step < 0 ? 1 : 0)) % keyed.length;
    point(keyed[at]);
    said.textContent = keyed[at].text;
  });
  new ResizeObserver(() => {
    if (Math.floor(host.clientWidth) !== width) render();
  }).observe(host);
  host.redraw = render;
  return host;
}

function ticks(low, high, wanted) {
  const raw = (high - low) / Math.max(1, wanted),
    power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return {
    found,
    digits: Math.max(
      0,
      Math.min(8, -Math.floor(Math.log10(step) + 1e-9) + (/[.]5|^2.5/.test(String(step / power)) ? 1 : 0)),
    ),
  };
}
const padded = (values, share = 0.08) => {
  const low = Math.min(...values),
    high = Math.max(...values),
    by = (high - low || Math.abs(high) * 0.1 || 1) * share;
  return [low - by, high + by];
};
function tickText(value, digits, asShare) {
  if (asShare) return `${fixed(value * 100, Math.max(0, digits - 2))}`;
  return Math.abs(value) >= 1e5 ? value.toExponential(1) : fixed(value, digits);
}

/** Axes with names and units on an SVG; gives the places of values. x and y: { name, domain, share?, whole? }. */
function axes(width, height, x, y, { left = 46, right = 14, top = 26, bottom = 42, label } = {}) {
  const node = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const X = (value) => left + ((value - x.domain[0]) / (x.domain[1] - x.domain[0])) * (width - left - right);
  const Y = (value) =>
    height - bottom - ((value - y.domain[0]) / (y.domain[1] - y.domain[0])) * (height - top - bottom);
  const of = (axis, wanted) => (axis.whole ? { found: axis.whole, digits: 0 } : ticks(...axis.domain, wanted));
  const across = of(x, (width - left - right) / 76),
    up = of(y, (height - top - bottom) / 44);
  for (const value of up.found)
    node.append(
      svg("line", { class: "grid", x1: left, x2: width - right, y1: Y(value), y2: Y(value) }),
      svg("text", { x: left - 8, y: Y(value) + 4, "text-anchor": "end" }, tickText(value, up.digits, y.share)),
    );
  for (const value of across.found)
    node.append(
      svg("line", { class: "axis", x1: X(value), x2: X(value), y1: height - bottom, y2: height - bottom + 4 }),
      svg(
        "text",
        { x: X(value), y: height - bottom + 17, "text-anchor": "middle" },
        tickText(value, across.digits, x.share),
      ),
    );
  node.append(
    svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    svg("text", { x: 0, y: 12, class: "name" }, y.name + (y.share ? " (%)" : "")),
    svg(
      "text",
      { x: width - right, y: height - 6, "text-anchor": "end", class: "name" },
      x.name + (x.share ? " (%)" : ""),
    ),
  );
  return { node, X, Y, left, right, top, bottom };
}
const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");
const line = (points, { colour, dash, width = 2, opacity = 1 }) =>
  svg("path", {
    d: path(points),
    fill: "none",
    "stroke-width": width,
    "stroke-dasharray": dash,
    "stroke-linejoin": "round",
    "stroke-opacity": opacity,
    paint: { stroke: colour },
  });
const whisker = (x1, x2, y1, y2, colour) =>
  svg("line", { x1, x2, y1, y2, "stroke-width": 1.5, "stroke-opacity": 0.7, paint: { stroke: colour } });
function clipped(text, pixels) {
  const most = Math.max(4, Math.floor(pixels / 6.6));
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}
