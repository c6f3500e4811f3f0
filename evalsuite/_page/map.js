// Embeddings on two directions.

function maps() {
  const all = lastOf(DATA.maps, (each) => each.encoder).sort((a, b) => a.encoder - b.encoder);
  const sets = lastOf(
    all.flatMap((each) => each.sets),
    setTitle,
  );
  let hidden = new Set();
  const probe = el("span", { hidden: true });
  document.body.append(probe);
  const colour = (value) => {
    probe.style.color = value;
    return getComputedStyle(probe).color;
  };
  const made = all.map((each) => {
    const place = (set, n) =>
      [0, 1].map(
        (axis) => each.low[axis] + ((axis ? set.y : set.x)[n] / each.steps) * (each.high[axis] - each.low[axis]),
      );
    const host = plot(
      `Map of ${encoders[each.encoder].name}`,
      (width) => {
        const height = Math.round(Math.min(width, 380)),
          pad = 10,
          room = 24,
          dense = devicePixelRatio || 1;
        const scale = Math.min(
          ...[0, 1].map((axis) => (axis ? height - 2 * room : width - 2 * pad) / (each.high[axis] - each.low[axis])),
        );
        const at = ([x, y]) => [
          width / 2 + (x - (each.low[0] + each.high[0]) / 2) * scale,
          height / 2 - (y - (each.low[1] + each.high[1]) / 2) * scale,
        ];
        const canvas = el("canvas", {
          width: Math.round(width * dense),
          height: Math.round(height * dense),
          role: "img",
          "aria-label": `Map of ${encoders[each.encoder].name}: ${each.sets.map((set) => `${setTitle(set)}, ${set.x.length} of ${set.rows} rows`).join("; ")}`,
        });
        canvas.style.height = `${height}px`;
        const pen = canvas.getContext("2d");
        pen.scale(dense, dense);
        pen.globalAlpha = 0.6;
        const dots = each.sets
          .filter((set) => !hidden.has(`${set.group}/${set.name}`))
          .flatMap((set) => {
            const ink = colour(setLook(set, sets).colour);
            return set.x.map((_, n) => ({ set, n, ink, turn: (n + 0.5) / set.x.length }));
          })
          .sort((a, b) => a.turn - b.turn);
        const marks = dots.map(({ set, n, ink }) => {
          const where = place(set, n),
            [x, y] = at(where),
            r = 2;
          pen.fillStyle = ink;
          pen.beginPath();
          if (set.group === "far") {
            pen.moveTo(x, y - r * 1.5);
            pen.lineTo(x + r * 1.4, y + r);
            pen.lineTo(x - r * 1.4, y + r);
          } else if (set.group === "near") pen.rect(x - r * 0.85, y - r * 0.85, r * 1.7, r * 1.7);
          else pen.arc(x, y, r * 0.9, 0, 7);
          pen.fill();
          return { x, y, text: `${setTitle(set)}\n${where.map((value) => fixed(value, 3)).join(", ")}` };
        });
        const keyed = each.sets
          .filter((set) => !hidden.has(`${set.group}/${set.name}`))
          .map((set) => {
            const middle = [0, 1].map(
                (axis) => set.x.reduce((sum, _, n) => sum + place(set, n)[axis], 0) / set.x.length,
              ),
              [x, y] = at(middle);
            return {
              x,
              y,
              text: `${setTitle(set)}\nmiddle at ${middle.map((value) => fixed(value, 3)).join(", ")}\n${set.x.length.toLocaleString("en")} of ${set.rows.toLocaleString("en")} rows drawn`,
            };
          });
        const over = svg("svg", {
          width,
          height,
          "aria-hidden": "true",
          paint: { position: "absolute", inset: "0", "pointer-events": "none" },
        });
        const rod = ticks(0, Math.max(each.high[0] - each.low[0], 1e-12), 3),
          long = rod.found[1] || each.high[0] - each.low[0];
        over.append(
          svg("path", { class: "rod", d: `M${pad},${height - pad - 4}v4h${(long * scale).toFixed(1)}v-4` }),
          svg("text", { x: pad + 6, y: height - pad - 6 }, fixed(long, rod.digits)),
          svg("text", { x: width - 2, y: height - 6, "text-anchor": "end", class: "name" }, "1st direction →"),
          svg("text", { x: 2, y: 12, class: "name" }, "↑ 2nd direction"),
        );
        return { node: canvas, over, marks, keyed };
      },
      { reach: 14 },
    );
    const table = () => ({
      columns: ["encoder", "group", "set", "x", "y"],
      rows: each.sets.flatMap((set) =>
        set.x.map((_, n) => [
          encoders[each.encoder].name,
          set.group,
          set.name,
          ...place(set, n).map((value) => Number(value.toPrecision(6))),
        ]),
      ),
    });
    return {
      host,
      node: figure(who(each.encoder), saves("map", `the map of ${encoders[each.encoder].name}`, table), host),
    };
  });
  repaint.push(() => made.forEach(({ host }) => host.redraw()));
  section(
    "map",
    "Map",
    "Map of embeddings",
    "Unit embeddings on the two principal directions of the ID training rows, one scale for both axes, and each encoder has its own; at most 2,000 rows a set, evenly spread over it. Two directions show little of a space: sets that overlap here may be far apart in it.",
    el(
      "div",
      { class: "controls" },
      legend(
        sets.map((set) => ({
          key: `${set.group}/${set.name}`,
          label: setTitle(set),
          look: { ...setLook(set, sets), dash: "", shape: SHAPES[{ id: 0, csid: 0, near: 1, far: 2 }[set.group]] },
        })),
        (now) => {
          hidden = now;
          made.forEach(({ host }) => host.redraw());
        },
      ),
    ),
    fit(
      el(
        "div",
        { class: "panels" },
        made.map(({ node }) => node),
      ),
      made.length,
    ),
  );
}
