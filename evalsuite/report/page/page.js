// The page from top to bottom, in light or dark, on a screen or paper.

import { DATA } from "./data.js";
import { el, json, save } from "./elements.js";
import { introduction, metrics, summary } from "./numbers.js";
import { drawn } from "./sections.js";
import { sources } from "./sources.js";

const KEPT = "featcache-theme";
const PAPER = 960; // px: what a landscape page of A4 or Letter has between its margins
const LETTERS = "13px"; // there, as the style has it

function theme() {
  const root = document.documentElement;
  try {
    root.dataset.theme = localStorage.getItem(KEPT) || "auto";
  } catch {
    // files may have no storage
  }
  const buttons = ["Auto", "Light", "Dark"].map((name) => {
    const value = name.toLowerCase();
    const click = () => {
      root.dataset.theme = value;
      show();
      try {
        localStorage.setItem(KEPT, value);
      } catch {
        // as above
      }
    };
    return el("button", { type: "button", value, on: { click } }, name);
  });
  const show = () =>
    buttons.forEach((each) => each.setAttribute("aria-pressed", String(each.value === root.dataset.theme)));
  show();
  document
    .getElementById("theme")
    .append(el("div", { class: "choice", role: "group", "aria-label": "Colours" }, buttons));
}

/** Tables that are too wide for a page get smaller. */
function paper() {
  const root = document.documentElement;
  addEventListener("beforeprint", () => {
    root.style.fontSize = LETTERS;
    for (const table of document.querySelectorAll("table")) {
      table.style.width = "min-content";
      table.style.setProperty("--fit", Math.min(1, PAPER / table.offsetWidth));
      table.style.width = "";
    }
    root.style.fontSize = "";
  });
}

function notices() {
  if (DATA.notices.length)
    document.getElementById("notices").append(
      el(
        "aside",
        { class: "notice", "aria-label": "Remarks" },
        el("p", {}, "Remarks"),
        el(
          "ul",
          {},
          DATA.notices.map((text) => el("li", {}, text)),
        ),
      ),
    );
}

function footer() {
  const click = () => save("report.json", "application/json", json(DATA));
  document
    .getElementById("footer")
    .append(
      el("span", {}, `Made by evalsuite report, featcache ${DATA.version}.`),
      el("button", { type: "button", class: "quiet", on: { click } }, "Save everything as JSON"),
    );
}

theme();
paper();
introduction();
notices();
summary();
DATA.sections.forEach(drawn);
metrics();
sources();
footer();
