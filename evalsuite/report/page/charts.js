// One function for each kind of chart, each from its record in evalsuite/charts.py. It gives what `plot` wants, `keys` for
// a legend, the `table` that is saved, and `controls` and a `note` where it has them. `hidden` holds names not to draw.

import { encoders, fixed, held, holders, lookOf, percent, pictures, said, shown, whole } from "./data.js";
import { pick, svg } from "./elements.js";
import { axes, brief, clipped, domain, drawing, ends, line, path, shape, ticks, whisker, widthOf } from "./plot.js";

const keysOf = (series) =>
  series.map(({ name, tone, note }) => ({ name, note, look: lookOf(name, tone) })).filter(({ look }) => !look.quiet);
const encoderKeys = (which) => keysOf(which.map((i) => encoders[i]));

function dots(chart, hidden) {
  const { axis } = chart,
    rows = Object.entries(chart.rows),
    which = holders(Object.values(chart.rows));
  const draw = (width) => {
    const cells = rows.flatMap(([label, metric], row) =>
      which
        .filter((i) => !hidden.has(encoders[i].name) && held[i].has(metric))
        .map((i) => ({ label, row, i, found: held[i].get(metric) })),
    );
    const slot = Math.max(26, 9 * Math.min(which.length, 8) + 8),
      wide = Math.max(...rows.map(([label]) => widthOf(label))) + 16,
      left = Math.min(wide, width * 0.36);
    const xs = domain(axis, ends(cells.map(({ found }) => found)));
    const ax = axes(width, 50 + slot * rows.length, chart.title, axis, null, {
      xs,
      rows: rows.map(([label]) => label),
      left,
    });
    const marks = cells.map(({ label, row, i, found }) => {
      const x = ax.X(found.value),
        y = ax.top + slot * row + (slot * (which.indexOf(i) + 1)) / (which.length + 1),
        look = lookOf(encoders[i].name);
      if (found.low !== undefined) ax.node.append(whisker(ax.X(found.low), ax.X(found.high), y, y, look.colour));
      ax.node.append(shape(look, x, y, 4.2));
      return { x, y, text: said([encoders[i].name, label], axis, found) };
    });
    return { node: ax.node, marks };
  };
  const table = () => ({
    columns: ["encoder", chart.label || "row", "value", "ci95_low", "ci95_high"],
    rows: which.flatMap((i) =>
      rows.flatMap(([label, metric]) => {
        const found = held[i].get(metric);
        return found ? [[encoders[i].name, label, found.value, found.low, found.high]] : [];
      }),
    ),
  });
  return { draw, reach: 30, keys: encoderKeys(which), table };
}

function scatter(chart, hidden, redraw) {
  const choose = (label, axes) =>
    pick(
      label,
      Object.entries(axes).map(([metric, { name }]) => [metric, name === metric ? name : `${name} (${metric})`]),
      () => redraw(),
    );
  const across = choose("Across", chart.x),
    up = choose("Up", chart.y);
  const both = () => holders([across.value()]).filter((i) => held[i].has(up.value()));
  const which = holders(Object.keys(chart.y));
  const draw = (width) => {
    const [a, b] = [across.value(), up.value()],
      [x, y] = [chart.x[a], chart.y[b]],
      height = Math.max(300, Math.min(420, width * 0.6));
    const drawn = both().filter((i) => !hidden.has(encoders[i].name));
    const levels = which.filter(
      (i) => encoders[i].teacher && held[i].has(b) && !held[i].has(a) && !hidden.has(encoders[i].name),
    );
    const of = (rows, metric) => ends(rows.map((i) => held[i].get(metric)));
    const ax = axes(width, height, `${b} against ${a}`, x, y, {
      xs: domain(x, of(drawn, a), 0.16),
      ys: domain(y, of([...drawn, ...levels], b), 0.12),
    });
    const marks = levels.map((i) => {
      const found = held[i].get(b),
        at = ax.Y(found.value),
        own = encoders[i].name === "teacher" ? "teacher" : `teacher: ${encoders[i].name}`;
      ax.reference(ax.left, width - ax.right, at, at);
      ax.node.append(svg("text", { x: ax.left + 4, y: at - 6 }, clipped(own, width - 80)));
      return { x: ax.left + 30, y: at, text: said([encoders[i].name], y, found) };
    });
    const names = []; // above every interval
    const box = (left, right, top, bottom) => ({ left, right, top, bottom }),
      meet = (one, other) =>
        one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom;
    const points = drawn.map((i) => {
      const [p, q] = [held[i].get(a), held[i].get(b)];
      return { i, p, q, px: ax.X(p.value), py: ax.Y(q.value), look: lookOf(encoders[i].name) };
    });
    const taken = points.map(({ px, py }) => box(px - 8, px + 8, py - 8, py + 8));
    for (const { p, q, px, py, look } of points) {
      const ends = [
        p.low !== undefined && [ax.X(p.low), ax.X(p.high), py, py],
        q.low !== undefined && [px, px, ax.Y(q.high), ax.Y(q.low)],
      ].filter(Boolean);
      for (const [x1, x2, y1, y2] of ends) {
        ax.node.append(whisker(x1, x2, y1, y2, look.colour));
        taken.push(box(x1 - 2, x2 + 2, y1 - 2, y2 + 2));
      }
    }
    for (const { i, p, q, px, py, look } of points) {
      // The first place around the point that is free of names, points and intervals; without one, the legend has the name.
      const free = [-9, 19]
        .flatMap((down) => [px > width * 0.58, px <= width * 0.58].map((end) => [end, down]))
        .map(([end, down]) => {
          const room = end ? px - 11 - ax.left : width - px - 11,
            text = clipped(encoders[i].name, Math.min(room, 300)),
            [at, long, y] = [end ? px - 11 : px + 11, widthOf(text), py + down];
          return { room, end, text, at, y, ...box(end ? at - long : at, end ? at : at + long, y - 11, y + 3) };
        })
        .find((one) => one.room > 100 && !taken.some((other) => meet(one, other)));
      if (free) {
        taken.push(free);
        names.push(svg("text", { x: free.at, y: free.y, "text-anchor": free.end && "end", class: "name" }, free.text));
      }
      ax.node.append(shape(look, px, py, 6));
      marks.push({ x: px, y: py, text: said([said([encoders[i].name], y, q)], x, p) });
    }
    ax.node.append(...names);
    return { node: ax.node, marks };
  };
  const table = () => ({
    columns: ["encoder", "metric", "value", "ci95_low", "ci95_high"],
    rows: both().flatMap((i) =>
      [across.value(), up.value()].map((metric) => {
        const { value, low, high } = held[i].get(metric);
        return [encoders[i].name, metric, value, low, high];
      }),
    ),
  });
  return { draw, keys: encoderKeys(which), controls: [up.node, across.node], table };
}

function lines(chart, hidden) {
  const { x, y } = chart,
    own = ({ low = [], high = [], ...of }) =>
      of.x.map((at, n) => ({ at, value: of.y[n], low: low[n] ?? undefined, high: high[n] ?? undefined })),
    all = chart.series.map((each) => ({ ...each, look: lookOf(each.name, each.tone), points: own(each) }));
  const draw = (width) => {
    const drawn = all.filter(({ name }) => !hidden.has(name)),
      height = chart.diagonal ? Math.min(width, 520) : chart.wide ? 300 : 270;
    const numbers = chart.ticks && { range: [chart.ticks[0] - 0.15, chart.ticks[chart.ticks.length - 1] + 0.15] };
    const ax = axes(width, height, chart.title, x, y, {
      xs: domain(
        numbers || x,
        drawn.flatMap(({ points }) => points.map(({ at }) => at)),
        0,
      ),
      ys: domain(
        y,
        drawn.flatMap(({ points }) => ends(points)),
      ),
      at: chart.ticks,
    });
    if (chart.diagonal) ax.reference(ax.X(0), ax.X(1), ax.Y(0), ax.Y(1));
    const marks = drawn.flatMap(({ name, look, points }) => {
      const at = points.map((each) => [ax.X(each.at), ax.Y(each.value)]),
        node = line(at, look);
      ax.node.append(node);
      return points.map((each, n) => {
        if (!look.quiet && each.low !== undefined)
          ax.node.append(whisker(at[n][0], at[n][0], ax.Y(each.low), ax.Y(each.high), look.colour));
        if (chart.marked) ax.node.append(shape(look, ...at[n], 4));
        const where = `${x.name.replace(/ \(.*\)$/, "")} ${chart.ticks ? each.at : shown(x, each.at)}`;
        return { x: at[n][0], y: at[n][1], node, text: said([name, where], y, each) };
      });
    });
    return { node: ax.node, marks };
  };
  const table = () => ({
    columns: [chart.by || "encoder", x.column || x.name, y.column || y.name, "ci95_low", "ci95_high"],
    rows: all.flatMap(({ name, points }) => points.map(({ at, value, low, high }) => [name, at, value, low, high])),
  });
  return { draw, keys: keysOf(chart.series), table };
}

function histogram(chart, hidden) {
  const { low, high, sets } = chart,
    bins = sets[0].counts.length,
    edge = (b) => low + ((high - low) * b) / bins,
    say = (b) => brief(edge(b), high - low);
  const draw = (width) => {
    const drawn = sets.filter(({ name }) => !hidden.has(name)),
      share = (set, b) => set.counts[b] / set.rows,
      most = Math.max(1e-9, ...drawn.flatMap((set) => set.counts.map((_, b) => share(set, b))));
    const y = { name: "share of set per bin", share: true };
    const ax = axes(width, 226, chart.title, chart.axis, y, { xs: [low, high], ys: [0, most * 1.05], left: 34 });
    for (const set of drawn) {
      const look = lookOf(set.name, set.tone),
        tops = set.counts.flatMap((_, b) => [edge(b), edge(b + 1)].map((at) => [ax.X(at), ax.Y(share(set, b))])),
        steps = [[ax.X(low), ax.Y(0)], ...tops, [ax.X(high), ax.Y(0)]];
      ax.node.append(
        svg("path", { d: path(steps), "fill-opacity": 0.13, paint: { fill: look.colour } }),
        line(steps, look),
      );
    }
    const of = (b) => drawn.map((set) => `${set.name}: ${percent(share(set, b))} (${whole(set.counts[b])})`);
    const marks = sets[0].counts.map((_, b) => ({
      x: ax.X(edge(b + 0.5)),
      y: ax.Y(Math.max(0, ...drawn.map((set) => share(set, b)))),
      text: [`${say(b)} to ${say(b + 1)}`, ...of(b)].join("\n"),
    }));
    return { node: ax.node, marks };
  };
  const beyond = sets
    .filter(({ below, above }) => below || above)
    .map(({ name, rows, below, above }) => {
      const parts = [below && `${whole(below)} below`, above && `${whole(above)} above`].filter(Boolean);
      return `${name} ${parts.join(" and ")} of ${whole(rows)}`;
    });
  const columns = ["set", "bin_low", "bin_high", "count", "rows"];
  const table = () => ({
    columns,
    rows: sets.flatMap(({ name, counts, rows, below, above }) => [
      [name, null, low, below, rows],
      ...counts.map((count, b) => [name, edge(b), edge(b + 1), count, rows]),
      [name, high, null, above, rows],
    ]),
  });
  const keys = keysOf(sets).map((key, n) => ({ ...key, note: `${whole(sets[n].rows)} rows` }));
  return { draw, byX: true, keys, table, note: beyond.length && `Beyond the axis: ${beyond.join("; ")}.` };
}

function cloud(chart, hidden) {
  const { low, high, steps, sets } = chart,
    value = (axis, step) => low[axis] + (step / steps) * (high[axis] - low[axis]),
    place = (a, b) => `${fixed(a, 3)}, ${fixed(b, 3)}`;
  const draw = (width) => {
    const height = Math.round(Math.min(width, 380)),
      [pad, room, slices] = [10, 24, 12];
    const scale = Math.min((width - 2 * pad) / (high[0] - low[0]), (height - 2 * room) / (high[1] - low[1]));
    const X = (x) => width / 2 + (x - (low[0] + high[0]) / 2) * scale,
      Y = (y) => height / 2 - (y - (low[1] + high[1]) / 2) * scale;
    const drawn = sets.filter(({ name }) => !hidden.has(name));
    const about = drawn.map(({ name, x, rows }) => `${name}, ${whole(x.length)} of ${whole(rows)} rows`);
    const node = drawing(width, height, `${chart.title}: ${about.join("; ")}`),
      marks = [];
    // In turn some of each set, so that none covers the others.
    for (let slice = 0; slice < slices; slice++)
      for (const set of drawn) {
        const look = lookOf(set.name, set.tone),
          parts = [];
        for (let n = slice; n < set.x.length; n += slices) {
          const [a, b] = [value(0, set.x[n]), value(1, set.y[n])],
            at = { x: Math.round(X(a) * 10) / 10, y: Math.round(Y(b) * 10) / 10 };
          parts.push(look.shape(at.x, at.y, 2));
          const image = pictures[set.pictures?.[n]];
          marks.push({ ...at, image, text: [set.name, image?.name, place(a, b)].filter(Boolean).join("\n") });
        }
        node.append(svg("path", { d: parts.join(""), class: "places", paint: { fill: look.colour } }));
      }
    const mean = (of) => of.reduce((sum, each) => sum + each, 0) / of.length;
    const middles = drawn.map(({ x, y }, n) => {
      const [a, b] = [value(0, mean(x)), value(1, mean(y))];
      return { x: X(a), y: Y(b), text: `${about[n]}\nmiddle at ${place(a, b)}` };
    });
    const keyed = [...middles, ...marks.filter(({ image }) => image)];
    const rod = ticks(0, Math.max(high[0] - low[0], 1e-12), 3),
      long = rod.found[1] || high[0] - low[0];
    node.append(
      svg("path", { class: "rod", d: `M${pad},${height - pad - 4}v4h${(long * scale).toFixed(1)}v-4` }),
      svg("text", { x: pad + 6, y: height - pad - 6 }, fixed(long, rod.digits)),
      svg("text", { x: width - 2, y: height - 6, "text-anchor": "end", class: "name" }, `${chart.x.name} →`),
      svg("text", { x: 2, y: 12, class: "name" }, `↑ ${chart.y.name}`),
    );
    return { node, marks, keyed };
  };
  const table = () => ({
    columns: ["set", chart.x.column || "x", chart.y.column || "y"],
    rows: sets.flatMap(({ name, x, y }) =>
      x.map((_, n) => [name, ...[value(0, x[n]), value(1, y[n])].map((at) => Number(at.toPrecision(6)))]),
    ),
  });
  const keys = keysOf(sets).map((key, n) => ({ ...key, note: `${whole(sets[n].rows)} rows` }));
  const places = sets.reduce((sum, { x }) => sum + x.length, 0),
    seen = sets.reduce((sum, set) => sum + (set.pictures || []).filter((n) => n >= 0).length, 0);
  const note = seen > 0 && `${whole(seen)} of ${whole(places)} places show their picture, by pointer or arrow keys.`;
  return { draw, reach: 14, keys, table, note };
}

export const KINDS = { Dots: dots, Scatter: scatter, Lines: lines, Histogram: histogram, Cloud: cloud };
