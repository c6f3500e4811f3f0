// Where the numbers come from.

import { DATA, encoders, pictures, results, whole } from "./data.js";
import { breakable, el, saves } from "./elements.js";
import { section } from "./sections.js";

function flat(value, at = "") {
  const nested = value !== null && typeof value === "object";
  if (!nested) return [[at, value === null ? "none" : String(value)]];
  if (!Object.keys(value).length) return [[at, "none"]];
  if (Array.isArray(value) && value.every((each) => typeof each !== "object")) return [[at, value.join(", ")]];
  return Object.entries(value).flatMap(([key, each]) => flat(each, at ? `${at} › ${key}` : key));
}
const facts = (title, value) =>
  Object.keys(value).length > 0 && [
    el("h4", {}, title),
    el(
      "dl",
      { class: "facts" },
      flat(value).map(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]),
    ),
  ];

/** What was not read again, and how many pictures there are, and are not. */
const notes = () =>
  [
    ["Stores that were not read again", DATA.unread],
    ["Pictures", [...(pictures.length ? [`${whole(pictures.length)} are shown`] : []), ...DATA.unpictured]],
  ]
    .filter(([, lines]) => lines.length)
    .map(([title, lines]) => el("p", { class: "foot" }, `${title}: ${lines.join("; ")}.`));

export function sources() {
  const name = ({ encoder }) => (encoder === null ? "" : encoders[encoder].name);
  const table = () => ({
    columns: ["file", "command", "encoder", "part", "name", "value"],
    rows: results.flatMap((result) =>
      ["inputs", "parameters", "versions"].flatMap((part) =>
        flat(result[part])
          .filter(([fact]) => fact)
          .map(([fact, text]) => [result.file, result.command, name(result), part, fact, text]),
      ),
    ),
  });
  const about = "What went into each result, how it was measured, and with which versions.";
  section(
    { key: "provenance", short: "Sources", title: "Where the numbers come from", about },
    el(
      "div",
      { class: "card" },
      el(
        "div",
        { class: "head" },
        el("h3", {}, "Results"),
        saves("provenance", "inputs, parameters and versions", table),
      ),
      results.map((result) =>
        el(
          "details",
          {},
          el(
            "summary",
            {},
            el("span", { class: "what" }, [result.command, name(result)].filter(Boolean).join(", ")),
            el("span", { class: "where" }, result.file),
          ),
          el(
            "div",
            { class: "fold" },
            result.remarks.length > 0 && [
              el("h4", {}, "Remarks"),
              el(
                "ul",
                {},
                result.remarks.map((text) => el("li", {}, breakable(text))),
              ),
            ],
            facts("Inputs", result.inputs),
            facts("Parameters", result.parameters),
            facts("Versions", result.versions),
          ),
        ),
      ),
      notes(),
    ),
  );
}
