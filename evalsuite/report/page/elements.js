// Elements and files to save. Every name reaches the page as text or as an attribute's value, never as markup.

function make(space, tag, attributes, children) {
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "paint") for (const [what, how] of Object.entries(value)) node.style.setProperty(what, how);
    else if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, String(value));
  }
  for (const child of children.flat(3))
    if (child !== null && child !== undefined && child !== false && child !== "") node.append(child);
  return node;
}
export const el = (tag, attributes, ...children) => make(null, tag, attributes, children);
export const svg = (tag, attributes, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);
/** A name that may break after its separators. */
export const breakable = (name) => name.split(/(?<=[/_:,.@-])/).flatMap((part, n) => (n ? [el("wbr"), part] : [part]));

/** A picture of the page, { name, source }: its name is its alternative text. */
export const picture = ({ name, source }, size) =>
  el("img", { src: source, alt: name, title: name, width: size, height: size });

export function pick(label, options, change) {
  const select = el(
    "select",
    { on: { change: () => change(select.value) } },
    options.map(([value, text]) => el("option", { value }, text)),
  );
  return { node: el("label", {}, label, select), value: () => select.value };
}

// -- data to take away

function cell(value) {
  if (value === null || value === undefined) return "";
  let text = String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`; // or a spreadsheet would run it
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
const csv = ({ columns, rows }) => [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
const objects = ({ columns, rows }) =>
  rows.map((row) => Object.fromEntries(columns.map((name, i) => [name, row[i] ?? null])));
export const json = (value) => JSON.stringify(value, null, 1);
export function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 30000);
}
/** Two buttons that save `table()`, its columns and rows. */
export function saves(stem, what, table) {
  const button = (kind, type, text) =>
    el(
      "button",
      {
        type: "button",
        "aria-label": `Save ${what} as ${kind}`,
        on: { click: () => save(`${stem}.${kind.toLowerCase()}`, type, text()) },
      },
      kind,
    );
  return el(
    "div",
    { class: "save" },
    button("CSV", "text/csv", () => csv(table())),
    button("JSON", "application/json", () => json(objects(table()))),
  );
}
