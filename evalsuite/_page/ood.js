// OOD detection: every detector, score histograms, ROC curves.

const encoderLegend = (which, change, extra = () => "") =>
  legend(
    which.map((i) => ({ key: i, label: encoders[i].name + extra(i), look: LOOKS[i] })),
    change,
  );

function byDetector() {
  const sets = [...new Set([...ood.values()].flatMap((each) => [...each]))];
  const real = (group) => sets.filter((set) => set.startsWith(`${group}/`) && !set.endsWith("/mean"));
  const offered = ["near", "far", "near_fs", "far_fs"].flatMap((group) => [
    ...(sets.includes(`${group}/mean`) ? [`${group}/mean`] : []),
    ...(real(group).length > 1 || !sets.includes(`${group}/mean`) ? real(group) : []),
  ]);
  const set = pick(
    "OOD set",
    offered.map((each) => [each, setWord(each)]),
    () => host.redraw(),
  );
  const metric = pick(
    "Metric",
    [...oodMetrics].map((each) => [each, word(each)]),
    () => host.redraw(),
  );
  const which = encoders
    .map((_, i) => i)
    .filter(
      (i) =>
        detectors.some((each) => held[i].has(`${each}/${set.value}/${metric.value}`)) ||
        detectors.some((each) => [...oodMetrics].some((m) => offered.some((s) => held[i].has(`${each}/${s}/${m}`)))),
    );
  let hidden = new Set();
  const draw = (width) => {
    const name = (each) => `${each}/${set.value}/${metric.value}`;
    const cells = detectors.flatMap((each, row) =>
      which
        .filter((i) => !hidden.has(i) && held[i].has(name(each)))
        .map((i) => ({ each, row, i, ...held[i].get(name(each)) })),
    );
    const slot = Math.max(26, 9 * Math.min(which.length, 8) + 8),
      top = 8,
      bottom = 42,
      left = Math.min(170, width * 0.34),
      right = 16;
    const height = top + bottom + slot * detectors.length;
    const domain = padded(
      cells.length
        ? cells.flatMap(({ value, low, high }) => (low === undefined ? [value] : [value, low, high]))
        : [0, 1],
      0.05,
    );
    const share = isShare(metric.value);
    const node = svg("svg", {
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
      role: "img",
      "aria-label": `${word(metric.value)} of each detector on ${setWord(set.value)}`,
    });
    const X = (value) => left + ((value - domain[0]) / (domain[1] - domain[0])) * (width - left - right);
    const { found, digits } = ticks(...domain, (width - left - right) / 76);
    for (const value of found)
      node.append(
        svg("line", { class: "grid", x1: X(value), x2: X(value), y1: top, y2: height - bottom }),
        svg("text", { x: X(value), y: height - bottom + 17, "text-anchor": "middle" }, tickText(value, digits, share)),
      );
    detectors.forEach((each, row) =>
      node.append(
        svg("line", {
          class: "grid",
          x1: 0,
          x2: width - right,
          y1: top + slot * (row + 1),
          y2: top + slot * (row + 1),
        }),
        svg(
          "text",
          { x: 0, y: top + slot * (row + 0.5) + 4, class: "name" },
          svg("title", {}, each),
          clipped(each, left - 8),
        ),
      ),
    );
    node.append(
      svg(
        "text",
        { x: width - right, y: height - 6, "text-anchor": "end", class: "name" },
        word(metric.value) +
          (share ? " (%)" : "") +
          (isLower(metric.value) ? ", lower is better" : ", higher is better"),
      ),
    );
    const marks = cells.map(({ each, row, i, value, low, high }) => {
      const at = which.indexOf(i),
        y = top + slot * row + (slot * (at + 1)) / (which.length + 1),
        { colour, shape } = LOOKS[i];
      if (low !== undefined) node.append(whisker(X(low), X(high), y, y, colour));
      node.append(svg("path", { d: shape(X(value), y, 4.2), paint: { fill: colour } }));
      return {
        x: X(value),
        y,
        text: `${encoders[i].name}\n${each}, ${setWord(set.value)}\n${word(metric.value)} ${shown(metric.value, value)}${low === undefined ? "" : `\n95 % interval ${interval(metric.value, { low, high })}`}`,
      };
    });
    return { node, marks };
  };
  const host = plot("Every detector, a point an encoder", draw, { reach: 30 });
  const table = () => ({
    columns: ["encoder", "detector", "set", "metric", "value", "ci95_low", "ci95_high"],
    rows: which.flatMap((i) =>
      detectors.flatMap((each) =>
        [...ood.get(each)].flatMap((s) =>
          [...oodMetrics]
            .filter((m) => held[i].has(`${each}/${s}/${m}`))
            .map((m) => {
              const { value, low, high } = held[i].get(`${each}/${s}/${m}`);
              return [encoders[i].name, each, s, m, value, low, high];
            }),
        ),
      ),
    ),
  });
  return [
    el("div", { class: "controls" }, metric.node, set.node),
    figure(
      "Detectors",
      saves("ood-detectors", "this figure", table),
      encoderLegend(which, (now) => {
        hidden = now;
        host.redraw();
      }),
      host,
    ),
  ];
}

function histogram(drawn, hiddenSets) {
  const bins = drawn.sets[0].counts.length,
    span = drawn.high - drawn.low,
    edge = (b) => drawn.low + (span * b) / bins;
  const look = (set) => setLook(set, drawn.sets);
  const short = (value) =>
    Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3)
      ? value.toExponential(2)
      : fixed(value, span < 0.05 ? 5 : span < 5 ? 3 : 1);
  const draw = (width) => {
    const sets = drawn.sets.filter((set) => !hiddenSets().has(`${set.group}/${set.name}`));
    const share = (set, b) => set.counts[b] / set.rows,
      most = Math.max(1e-9, ...sets.flatMap((set) => set.counts.map((_, b) => share(set, b))));
    const label = `Scores of ${drawn.detector} for ${encoders[drawn.encoder].name}: share of ${drawn.sets.map(setTitle).join(", ")} in each bin`;
    const ax = axes(
      width,
      226,
      { name: "score (higher: more OOD)", domain: [drawn.low, drawn.high] },
      { name: "share of set per bin", domain: [0, most * 1.05], share: true },
      { label, left: 34 },
    );
    for (const set of sets) {
      const steps = [[ax.X(drawn.low), ax.Y(0)]];
      set.counts.forEach((_, b) =>
        steps.push([ax.X(edge(b)), ax.Y(share(set, b))], [ax.X(edge(b + 1)), ax.Y(share(set, b))]),
      );
      steps.push([ax.X(drawn.high), ax.Y(0)]);
      ax.node.append(
        svg("path", { d: path(steps), "fill-opacity": 0.13, paint: { fill: look(set).colour } }),
        line(steps, { ...look(set), width: 1.6 }),
      );
    }
    const marks = sets.length
      ? drawn.sets[0].counts.map((_, b) => ({
          x: ax.X(edge(b + 0.5)),
          y: ax.Y(Math.max(...sets.map((set) => share(set, b)))),
          text: `${b ? `${short(edge(b))} to` : "up to"} ${b < bins - 1 ? short(edge(b + 1)) : "…"}\n${sets.map((set) => `${setTitle(set)}: ${percent(share(set, b))} (${set.counts[b].toLocaleString("en")})`).join("\n")}`,
        }))
      : [];
    return { node: ax.node, marks };
  };
  const host = plot(`Scores of ${drawn.detector} for ${encoders[drawn.encoder].name}`, draw, { byX: true });
  return {
    host,
    rows: drawn.sets.flatMap((set) =>
      set.counts.map((counted, b) => [
        encoders[drawn.encoder].name,
        drawn.detector,
        set.group,
        set.name,
        edge(b),
        edge(b + 1),
        counted,
        set.rows,
      ]),
    ),
  };
}

function lastOf(list, key) {
  return [...new Map(list.map((each) => [key(each), each])).values()];
}

function histograms() {
  const all = lastOf(DATA.histograms, (each) => JSON.stringify([each.encoder, each.detector]));
  const own = [...new Set(all.map((each) => each.detector))];
  let hidden = new Set(),
    hosts = [];
  const panels = el("div", { class: "panels" });
  const sets = lastOf(
    all.flatMap((each) => each.sets),
    setTitle,
  );
  const columns = ["encoder", "detector", "group", "set", "bin_low", "bin_high", "count", "rows"];
  const render = () => {
    const made = all
      .filter((each) => each.detector === detector.value)
      .sort((a, b) => a.encoder - b.encoder)
      .map((each) => [each, histogram(each, () => hidden)]);
    hosts = made.map(([, { host }]) => host);
    fit(panels, made.length);
    panels.replaceChildren(
      ...made.map(([each, { host, rows }]) =>
        figure(
          who(each.encoder),
          saves("score-histogram", `the scores of ${encoders[each.encoder].name}`, () => ({ columns, rows })),
          host,
        ),
      ),
    );
  };
  const detector = pick(
    "Detector",
    own.map((each) => [each, each]),
    render,
  );
  if (own.includes("knn")) detector.value = "knn";
  render();
  section(
    "scores",
    "Scores",
    "Scores",
    "How a detector's scores spread over each set: the less ID and OOD overlap, the better they can be told apart. Scores of different encoders have different scales; the outermost bins hold what lies beyond the axis.",
    el(
      "div",
      { class: "controls" },
      detector.node,
      legend(
        sets.map((set) => ({ key: `${set.group}/${set.name}`, label: setTitle(set), look: setLook(set, sets) })),
        (now) => {
          hidden = now;
          hosts.forEach((host) => host.redraw());
        },
      ),
    ),
    panels,
  );
}

function rocs() {
  const all = lastOf(DATA.rocs, (each) => JSON.stringify([each.encoder, each.detector, each.group, each.name]));
  const own = [...new Set(all.map((each) => each.detector))],
    sets = [...new Set(all.map((each) => `${each.group}/${each.name}`))];
  let hidden = new Set();
  const chosen = () =>
    all
      .filter((each) => each.detector === detector.value && `${each.group}/${each.name}` === set.value)
      .sort((a, b) => a.encoder - b.encoder);
  const draw = (width) => {
    const size = Math.min(width, 520);
    const ax = axes(
      width,
      size,
      { name: "ID taken for OOD", domain: [0, 1], share: true },
      { name: "OOD found", domain: [0, 1], share: true },
      { label: `ROC curves of ${detector.value} on ${setWord(set.value)}` },
    );
    ax.node.append(svg("line", { class: "reference", x1: ax.X(0), y1: ax.Y(0), x2: ax.X(1), y2: ax.Y(1) }));
    const marks = [];
    for (const each of chosen()) {
      if (hidden.has(each.encoder)) continue;
      const points = each.fpr.map((x, n) => [ax.X(x), ax.Y(each.tpr[n])]);
      ax.node.append(line(points, { ...LOOKS[each.encoder], width: 2.1 }));
      points.forEach(([x, y], n) =>
        marks.push({
          x,
          y,
          text: `${encoders[each.encoder].name}\n${percent(each.tpr[n])} of OOD found\nat ${percent(each.fpr[n])} of ID taken for OOD`,
        }),
      );
    }
    return { node: ax.node, marks };
  };
  const host = plot("ROC curves, a line an encoder", draw);
  const key = el("div"),
    table = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Areas under the curves" });
  const title = el("h3", {}, "");
  const render = () => {
    hidden = new Set();
    key.replaceChildren(
      encoderLegend([...new Set(chosen().map((each) => each.encoder))], (now) => {
        hidden = now;
        host.redraw();
      }),
    );
    const columns = ["auroc", "fpr95_id", "fpr95_ood"].filter((m) =>
      chosen().some((each) => m === "auroc" || held[each.encoder].has(`${detector.value}/${set.value}/${m}`)),
    );
    title.textContent = `${detector.value}, ${setWord(set.value)}`;
    table.replaceChildren(
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "col" }, "Encoder"),
            columns.map((m) =>
              el(
                "th",
                { scope: "col", class: "number" },
                word(m),
                el("small", {}, isLower(m) ? "lower is better" : "higher is better"),
              ),
            ),
          ),
        ),
        el(
          "tbody",
          {},
          chosen().map((each) =>
            el(
              "tr",
              {},
              el("th", { scope: "row" }, who(each.encoder)),
              columns.map((m) => {
                const found =
                  held[each.encoder].get(`${detector.value}/${set.value}/${m}`) ||
                  (m === "auroc" ? { value: each.auroc } : null);
                return el(
                  "td",
                  { class: "number" },
                  found
                    ? [
                        el("data", { class: "value", value: found.value }, shown(m, found.value)),
                        el("span", { class: "interval" }, interval(m, found)),
                      ]
                    : "–",
                );
              }),
            ),
          ),
        ),
      ),
    );
    host.redraw();
  };
  const detector = pick(
      "Detector",
      own.map((each) => [each, each]),
      render,
    ),
    set = pick(
      "OOD set",
      sets.map((each) => [each, setWord(each)]),
      render,
    );
  if (own.includes("knn")) detector.value = "knn";
  render();
  section(
    "roc",
    "ROC",
    "ROC curves",
    "What share of OOD a threshold finds, against what share of ID it takes for OOD. Towards the upper left is better; the dashed diagonal is chance.",
    el("div", { class: "controls" }, detector.node, set.node),
    el(
      "div",
      { class: "pair" },
      figure(
        "OOD found against ID rejected",
        saves("roc", "these curves", () => ({
          columns: ["encoder", "detector", "set", "id_flagged", "ood_flagged"],
          rows: chosen().flatMap((each) =>
            each.fpr.map((x, n) => [encoders[each.encoder].name, each.detector, set.value, x, each.tpr[n]]),
          ),
        })),
        key,
        host,
      ),
      el("div", { class: "card" }, el("div", { class: "head" }, title), table),
    ),
  );
}
