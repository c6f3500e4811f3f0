// Strips of pictures.

import { pictures } from "./data.js";
import { breakable, el, picture } from "./elements.js";

const SIZE = 64; // px

const item = ({ picture: n, words, mark }) =>
  el("li", { class: mark }, picture(pictures[n], SIZE), words && el("span", {}, words));

/** A `Gallery` record's node, and what is saved of it. */
export function galleryOf({ strips }) {
  const strip = ({ name, note, head, groups }) =>
    el(
      "div",
      { class: "strip" },
      el(
        "div",
        { class: "lead" },
        head && el("ul", { class: "pictures" }, item(head)),
        el("h4", {}, breakable(name), note && el("small", {}, note)),
      ),
      Object.entries(groups || {}).map(([group, found]) =>
        el(
          "div",
          { class: "group" },
          group && el("h5", {}, breakable(group)),
          found.length ? el("ul", { class: "pictures" }, found.map(item)) : el("p", { class: "foot" }, "no picture"),
        ),
      ),
    );
  const table = () => ({
    columns: ["strip", "of", "group", "place", "sample", "words"],
    rows: strips.flatMap(({ name, head, groups }) =>
      Object.entries(groups || {}).flatMap(([group, found]) =>
        found.map(({ picture: n, words }, at) => {
          const of = head && pictures[head.picture].name;
          return [name, of, group, at + 1, pictures[n].name, words];
        }),
      ),
    ),
  });
  return { node: el("div", { class: "gallery" }, strips.map(strip)), table };
}
