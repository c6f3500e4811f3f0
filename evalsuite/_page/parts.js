// What the parts of the page are made of, and which metrics they show.

const main = document.getElementById("main"),
  contents = document.getElementById("sections");
function section(id, short, title, about, ...children) {
  const part = el(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, title),
    el("p", { class: "about" }, about),
    children,
  );
  main.append(part);
  contents.append(el("a", { href: `#${id}` }, short));
  return part;
}
function pick(label, options, change) {
  const select = el(
    "select",
    { on: { change: () => change(select.value) } },
    options.map(([value, text]) => el("option", { value }, text)),
  );
  return {
    node: el("label", {}, label, select),
    get value() {
      return select.value;
    },
    set value(to) {
      select.value = to;
    },
  };
}
function choice(label, options, chosen, change) {
  const buttons = options.map(([value, text]) =>
    el(
      "button",
      {
        type: "button",
        "aria-pressed": String(value === chosen),
        on: {
          click: () => {
            for (const [i, button] of buttons.entries())
              button.setAttribute("aria-pressed", String(options[i][0] === value));
            change(value);
          },
        },
      },
      text,
    ),
  );
  return el("div", { class: "choice", role: "group", "aria-label": label }, buttons);
}
function figure(title, saved, ...children) {
  const id = fresh("figure");
  return el(
    "figure",
    { class: "card", "aria-labelledby": id },
    el("figcaption", {}, el("h3", { id }, title), saved),
    children,
  );
}
/** Two panels a row where three would leave one alone. */
const fit = (panels, n) => {
  panels.classList.toggle("wide", [1, 2, 4].includes(n));
  return panels;
};
const held_by = (name) => held.filter((of) => of.has(name)).length;
/** Of the metrics STEM@K the one that most encoders have, then K = 20, then the lowest K. */
function atK(stem) {
  const found = names.filter((name) => name.startsWith(`${stem}@`) && /^\d+$/.test(name.slice(stem.length + 1)));
  const k = (name) => Number(name.slice(stem.length + 1));
  return found.sort((a, b) => held_by(b) - held_by(a) || (k(b) === 20) - (k(a) === 20) || k(a) - k(b))[0];
}
const oodName = (name, command) => command === "ood" && /^(.+)\/((?:near|far)(?:_fs)?)\/([^/]+)\/([^/]+)$/.exec(name);
const ood = new Map(); // detector → set of "near/tin"
const oodMetrics = new Set();
for (const result of results)
  if (result.encoder !== null)
    for (const name of Object.keys(result.metrics)) {
      const parts = oodName(name, result.command);
      if (!parts) continue;
      if (!ood.has(parts[1])) ood.set(parts[1], new Set());
      ood.get(parts[1]).add(`${parts[2]}/${parts[3]}`);
      oodMetrics.add(parts[4]);
    }
const detectors = [...ood.keys()];
const WORDS = {
  auroc: "AUROC",
  aupr_in: "AUPR, ID positive",
  aupr_out: "AUPR, OOD positive",
  ap_in: "average precision, ID positive",
  ap_out: "average precision, OOD positive",
  fpr95_id: "FPR95_id",
  fpr95_ood: "FPR95_ood",
};
const word = (metric) => WORDS[metric] || metric;
function setWord(set) {
  const [group, name] = set.split("/"),
    own = [...new Set([...ood.values()].flatMap((each) => [...each]))].filter(
      (each) => each.startsWith(`${group}/`) && !each.endsWith("/mean"),
    );
  const title = group.endsWith("_fs") ? `${group.slice(0, -3)}-OOD, full spectrum` : `${group}-OOD`;
  return name !== "mean" ? `${title}: ${name}` : own.length === 1 ? setWord(own[0]) : `${title}, mean of sets`;
}

function headlines(detector) {
  const k = (metric) => (metric && metric.includes("@") ? `k = ${metric.slice(metric.lastIndexOf("@") + 1)}` : "");
  const top1 = atK("top1"),
    mutual = atK("mutual_knn"),
    corrupted = atK("mean/top1") || "mean/top1";
  return [
    ["kNN top‑1", k(top1), top1],
    ["Probe top‑1", "linear", "probe/top1"],
    ...["near", "far"].flatMap((group) => [["AUROC", `${group}, ${detector}`, `${detector}/${group}/mean/auroc`]]),
    ...["near", "far"].flatMap((group) => [
      ["FPR95_id", `${group}, ${detector}`, `${detector}/${group}/mean/fpr95_id`],
    ]),
    ["Gram correlation", "", "gram_pearson"],
    ["CKA", "debiased", "cka_debiased"],
    ["Mutual kNN", k(mutual), mutual],
    ["Agreement", "top-1 votes", "agreement/top1"],
    ["Corrupted top‑1", ["mean", k(corrupted)].filter(Boolean).join(", "), corrupted],
    ["mCE", "", "mce"],
  ]
    .filter(([, , metric]) => metric && held_by(metric))
    .map(([label, sub, metric]) => ({ label, sub, metric }));
}
/** Over what a mean of corruptions was taken. */
function meanOf({ metrics, inputs }, metric) {
  const parts = Object.keys(metrics)
    .map((name) => /^([^/]+)\/(\d+)\/(.+)$/.exec(name))
    .filter((found) => found && metric === `mean/${found[3]}`);
  const [corruptions, severities] = [1, 2].map((n) => [...new Set(parts.map((found) => found[n]))].sort());
  const plural = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
  return (
    `mean over ${plural(corruptions.length, "corruption", "corruptions")} at ` +
    `${severities.length === 1 ? "severity" : "severities"} ${severities.join(", ")}` +
    (inputs.clean?.rows ? ` of ${plural(inputs.clean.rows, "image", "images")}` : "")
  );
}
const source = ({ value, chance }, file) => `${value}${chance === undefined ? "" : `, chance ${chance}`} · ${file}`;
const noun = encoders.some((each) => each.teacher) ? "student" : "encoder";
const taught = (i) => encoders[i].taught_by;
function bests(metric) {
  const students = encoders.map((_, i) => i).filter((i) => !encoders[i].teacher && held[i].has(metric));
  if (students.length < 2) return [];
  const values = students.map((i) => held[i].get(metric).value),
    best = isLower(metric) ? Math.min(...values) : Math.max(...values);
  return students.filter((i) => held[i].get(metric).value === best);
}
const readMetric = (i, metric) => {
  const found = held[i].get(metric);
  return `${encoders[i].name}\n${metric} ${shown(metric, found.value)}${found.low === undefined ? "" : `\n95 % interval ${interval(metric, found)}`}${found.chance === undefined ? "" : `\nchance ${shown(metric, found.chance)}`}`;
};
