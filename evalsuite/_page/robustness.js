// Quality by corruption and severity.

function robustness() {
  const all = lastOf(DATA.robustness, (each) => JSON.stringify([each.encoder, each.metric]));
  const metrics = [...new Set(all.map((each) => each.metric))].sort(
    (a, b) => (b === atK("top1")) - (a === atK("top1")),
  );
  const chosen = () => all.filter((each) => each.metric === metric.value).sort((a, b) => a.encoder - b.encoder);
  const whole = el("div"),
    panels = el("div", { class: "panels" }),
    lines = [...new Set(all.flatMap((each) => Object.keys(each.lines)))];
  const scale = () => {
    const values = chosen().flatMap((each) =>
      [...Object.values(each.lines).flat(), ...each.mean, ...(each.clean ? [[0, ...each.clean]] : [])].flatMap(
        ([, ...rest]) => rest,
      ),
    );
    const [low, high] = padded(values, 0.06);
    return isShare(metric.value) ? [Math.max(0, low), Math.min(1, high)] : [low, high];
  };
  const levels = () =>
    [
      ...new Set(chosen().flatMap((each) => [...(each.clean ? [0] : []), ...each.mean.map(([severity]) => severity)])),
    ].sort((a, b) => a - b);
  const withClean = (each, points) => (each.clean ? [[0, ...each.clean], ...points] : points);
  const base = (width, height, label) => {
    const at = levels(),
      x = {
        name: at[0] === 0 ? "severity (0: clean)" : "severity",
        domain: [at[0] - 0.15, at[at.length - 1] + 0.15],
        whole: at,
      };
    return axes(
      width,
      height,
      x,
      {
        name: metric.value + (isLower(metric.value) ? " (lower is better)" : ""),
        domain: scale(),
        share: isShare(metric.value),
      },
      { label },
    );
  };
  const say = (i, what, [severity, value, low, high]) =>
    `${encoders[i].name}\n${what}, ${severity ? `severity ${severity}` : "clean"}\n${metric.value} ${shown(metric.value, value)}${low === undefined ? "" : `\n95 % interval ${interval(metric.value, { low, high })}`}`;
  const put = (ax, i, what, points, style, marks) => {
    const at = points.map(([severity, value]) => [ax.X(severity), ax.Y(value)]);
    ax.node.append(line(at, style));
    if (style.shape)
      points.forEach(([, , low, high], n) => {
        if (low !== undefined) ax.node.append(whisker(at[n][0], at[n][0], ax.Y(low), ax.Y(high), style.colour));
        ax.node.append(svg("path", { d: style.shape(...at[n], 4), paint: { fill: style.colour } }));
      });
    points.forEach((each, n) => marks.push({ x: at[n][0], y: at[n][1], text: say(i, what, each) }));
  };
  const columns = ["encoder", "metric", "corruption", "severity", "value", "ci95_low", "ci95_high"];
  const rowsOf = (each) =>
    [
      ...Object.entries(each.lines),
      ["mean", each.mean],
      ...(each.clean ? [["clean", [[0, ...each.clean]]]] : []),
    ].flatMap(([name, points]) =>
      points.map(([severity, value, low, high]) => [
        encoders[each.encoder].name,
        each.metric,
        name,
        severity,
        value,
        low,
        high,
      ]),
    );
  let hosts = [];
  const render = () => {
    const mean = plot("Mean over corruptions by severity, a line an encoder", (width) => {
      const ax = base(width, 300, `${metric.value}, mean over corruptions, by severity`),
        marks = [];
      for (const each of chosen())
        put(
          ax,
          each.encoder,
          "mean of corruptions",
          withClean(each, each.mean),
          { ...LOOKS[each.encoder], width: 2.25 },
          marks,
        );
      return { node: ax.node, marks };
    });
    const each = chosen().map((one) => [
      one,
      plot(`${encoders[one.encoder].name} by corruption and severity`, (width) => {
        const ax = base(width, 270, `${metric.value} of ${encoders[one.encoder].name} by corruption and severity`),
          marks = [];
        const order = Object.entries(one.lines).sort(([a], [b]) => (a === marked.value) - (b === marked.value));
        for (const [name, points] of order)
          put(
            ax,
            one.encoder,
            name,
            withClean(one, points),
            name === marked.value
              ? { colour: "var(--ink)", width: 2.25, dash: "6 3" }
              : { colour: "var(--soft)", width: 1.1, opacity: 0.5 },
            marks,
          );
        put(
          ax,
          one.encoder,
          "mean of corruptions",
          withClean(one, one.mean),
          { ...LOOKS[one.encoder], width: 2.5 },
          marks,
        );
        return { node: ax.node, marks };
      }),
    ]);
    hosts = each.map(([, host]) => host);
    fit(panels, each.length);
    whole.replaceChildren(
      figure(
        "Mean over corruptions",
        saves("robustness-mean", "the means", () => ({
          columns,
          rows: chosen().flatMap((one) => rowsOf(one).filter(([, , name]) => name === "mean" || name === "clean")),
        })),
        encoderLegend(chosen().map((one) => one.encoder)),
        mean,
      ),
    );
    panels.replaceChildren(
      ...each.map(([one, host]) =>
        figure(
          who(one.encoder),
          saves("robustness", `the corruptions of ${encoders[one.encoder].name}`, () => ({
            columns,
            rows: rowsOf(one),
          })),
          host,
        ),
      ),
    );
  };
  const metric = pick(
    "Metric",
    metrics.map((each) => [each, each]),
    render,
  );
  const marked = pick("Highlight a corruption", [["", "none"], ...lines.map((each) => [each, each])], () =>
    hosts.forEach((host) => host.redraw()),
  );
  render();
  section(
    "robustness",
    "Robustness",
    "Robustness",
    "How the encoder does as images get worse. Thin lines are single corruptions, the thick one is their mean; axes show the range of the values.",
    el("div", { class: "controls" }, metric.node, marked.node),
    whole,
    panels,
  );
}
