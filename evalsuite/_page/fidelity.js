// Quality against fidelity.

const FIDELITY = {
  gram_pearson: "Gram correlation",
  gram_pearson_centred: "Gram correlation, centred",
  cka_debiased: "CKA",
  cka_debiased_unit: "CKA of unit embeddings",
  "agreement/top1": "Agreement",
  "agreement/kappa": "Kappa",
  cosine_mapped: "Cosine, mapped",
  procrustes: "Procrustes distance",
};
function tradeoff() {
  const all = headlines(detectors.includes("knn") ? "knn" : detectors[0]);
  const has = ({ metric }) => encoders.some((encoder, i) => held[i].has(metric));
  const faithful = [
    "gram_pearson",
    "gram_pearson_centred",
    "cka_debiased",
    "cka_debiased_unit",
    atK("mutual_knn"),
    "agreement/top1",
    "agreement/kappa",
    "cosine_mapped",
    "procrustes",
  ]
    .filter((metric) => metric && held_by(metric))
    .map((metric) => ({ metric, label: FIDELITY[metric] ? `${FIDELITY[metric]} (${metric})` : metric }));
  const accurate = all.filter(({ metric }) => !faithful.some((each) => each.metric === metric)).filter(has);
  if (!faithful.length || !accurate.length) return;
  const x = pick(
    "Fidelity (across)",
    faithful.map(({ metric, label }) => [metric, label]),
    () => redraw(),
  );
  const y = pick(
    "Quality (up)",
    accurate.map(({ metric, label, sub }) => [metric, sub ? `${label} (${sub})` : label]),
    () => redraw(),
  );
  const points = () => encoders.map((_, i) => i).filter((i) => held[i].has(x.value) && held[i].has(y.value));
  const draw = (width) => {
    const [a, b] = [x.value, y.value],
      drawn = points();
    const teachers = encoders.map((_, i) => i).filter((i) => encoders[i].teacher && held[i].has(b) && !held[i].has(a));
    const spread = (metric, rows) =>
      rows.flatMap((i) => {
        const { value, low, high } = held[i].get(metric);
        return low === undefined ? [value] : [value, low, high];
      });
    const height = Math.max(300, Math.min(420, width * 0.6));
    const label = `${b} against ${a}`;
    const ax = axes(
      width,
      height,
      {
        name: faithful.find((each) => each.metric === a).label + (isLower(a) ? " (lower is better)" : ""),
        domain: padded(drawn.length ? spread(a, drawn) : [0, 1], 0.16),
        share: isShare(a),
      },
      {
        name: accurate.find((each) => each.metric === b).label + (isLower(b) ? " (lower is better)" : ""),
        domain: padded(drawn.length || teachers.length ? spread(b, [...drawn, ...teachers]) : [0, 1], 0.12),
        share: isShare(b),
      },
      { label },
    );
    const marks = [];
    for (const i of teachers) {
      const { value } = held[i].get(b);
      ax.node.append(
        svg("line", { class: "reference", x1: ax.left, x2: width - ax.right, y1: ax.Y(value), y2: ax.Y(value) }),
        svg("text", { x: ax.left + 4, y: ax.Y(value) - 6 }, clipped(`teacher: ${encoders[i].name}`, width - 80)),
      );
      marks.push({ x: ax.left + 30, y: ax.Y(value), text: readMetric(i, b) });
    }
    const labels = []; // above every interval
    const taken = drawn.map((i) => {
      const x = ax.X(held[i].get(a).value);
      return { left: x - 8, right: x + 8, y: ax.Y(held[i].get(b).value) + 4 };
    });
    for (const i of drawn) {
      const p = held[i].get(a),
        q = held[i].get(b),
        { colour, shape } = LOOKS[i],
        [px, py] = [ax.X(p.value), ax.Y(q.value)];
      if (p.low !== undefined) ax.node.append(whisker(ax.X(p.low), ax.X(p.high), py, py, colour));
      if (q.low !== undefined) ax.node.append(whisker(px, px, ax.Y(q.low), ax.Y(q.high), colour));
      const side = px > width * 0.58;
      // The first place around the point that is free of other names and points, or else the first.
      const places = [
        [side, -9],
        [side, 19],
        [!side, -9],
        [!side, 19],
      ].map(([end, down]) => {
        const text = clipped(encoders[i].name, end ? px - 20 : width - px - 20),
          wide = text.length * 6.6;
        return { end, text, y: py + down, left: end ? px - 11 - wide : px + 11, right: end ? px - 11 : px + 11 + wide };
      });
      const free =
        places.find(
          (one) =>
            !taken.some((other) => one.left < other.right && other.left < one.right && Math.abs(one.y - other.y) < 14),
        ) || places[0];
      taken.push(free);
      ax.node.append(svg("path", { d: shape(px, py, 6), paint: { fill: colour } }));
      labels.push(
        svg(
          "text",
          { x: free.end ? free.right : free.left, y: free.y, "text-anchor": free.end ? "end" : "start", class: "name" },
          free.text,
        ),
      );
      marks.push({ x: px, y: py, text: `${readMetric(i, b)}\n${readMetric(i, a).split("\n").slice(1).join("\n")}` });
    }
    ax.node.append(...labels);
    return { node: ax.node, marks };
  };
  const host = plot("Quality against fidelity, a point an encoder", draw);
  const redraw = () => host.redraw();
  const table = () => ({
    columns: ["encoder", "metric", "value", "ci95_low", "ci95_high"],
    rows: points().flatMap((i) =>
      [x.value, y.value].map((metric) => {
        const { value, low, high } = held[i].get(metric);
        return [encoders[i].name, metric, value, low, high];
      }),
    ),
  });
  section(
    "tradeoff",
    "Fidelity",
    "Accuracy and fidelity",
    "How well an encoder does, against how much of its teacher's geometry it kept. Lines through a point are 95 % intervals; axes show the range of the values and do not start at zero.",
    el("div", { class: "controls" }, y.node, x.node),
    figure("Quality against fidelity", saves("accuracy-fidelity", "this figure", table), host),
  );
}
