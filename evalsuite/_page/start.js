// Light and dark, and the order of the parts.

const repaint = [];
function theme() {
  const root = document.documentElement;
  const set = (value) => {
    root.dataset.theme = value;
    repaint.forEach((act) => act());
  };
  let kept = "auto";
  try {
    kept = localStorage.getItem("featcache-theme") || "auto";
  } catch {
    /* files may have no storage */
  }
  if (["light", "dark"].includes(kept)) set(kept);
  else kept = "auto";
  document.getElementById("theme").append(
    choice(
      "Colours",
      [
        ["auto", "Auto"],
        ["light", "Light"],
        ["dark", "Dark"],
      ],
      kept,
      (value) => {
        set(value);
        try {
          localStorage.setItem("featcache-theme", value);
        } catch {
          /* as above */
        }
      },
    ),
  );
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => repaint.forEach((act) => act()));
}

theme();
introduction();
summary();
tradeoff();
if (detectors.length)
  section(
    "ood",
    "Detectors",
    "Out-of-distribution detection",
    "How well each detector tells ID images from others. Lines through a point are 95 % intervals; the axis shows the range of the values.",
    byDetector(),
  );
if (DATA.histograms.length) histograms();
if (DATA.rocs.length) rocs();
if (DATA.robustness.length) robustness();
if (DATA.maps.length) maps();
comparisons();
metrics();
provenance();
