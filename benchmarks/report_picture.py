"""docs/report.webp: parts of the report that `featcache demo` ends with, as a browser shows them. Needs Chromium and playwright.

featcache demo
python benchmarks/report_picture.py featcache-demo/report.html
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH = 1240
PARTS = {"#edges": 1, "#neighbours": 1, "#map": 1}
"""Sections, and how many of their figures (or rows of them), from the first."""
STRIPS = 3
MOST_BYTES = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "report.webp")
    options = parser.parse_args()
    parts = shots(options.page)
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "#f7f7f5")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    file = io.BytesIO()
    whole.save(file, "WEBP", quality=82, method=6)
    if file.tell() > MOST_BYTES:
        raise SystemExit(f"{file.tell():,} bytes: more than {MOST_BYTES:,}; take fewer parts")
    options.out.write_bytes(file.getvalue())
    print(f"{options.out}: {whole.width} × {whole.height} px, {file.tell():,} bytes")


def shots(page: Path) -> list[Image.Image]:
    """Each part from the top of its section to the end of the last figure, or row of pictures, that is shown."""
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        opened.goto(page.resolve().as_uri())
        opened.wait_for_function("document.querySelectorAll('details').length > 0")
        opened.locator("#map select").select_option("ID against OOD")
        found = []
        for selector, figures in PARTS.items():
            section = opened.locator(selector)
            last = section.locator("figure.card, .card").nth(figures - 1)
            rows = last.locator(".strip")
            last = rows.nth(STRIPS - 1) if rows.count() > STRIPS else last
            first, end = section.bounding_box(), last.bounding_box()
            bottom = end["y"] + end["height"] + 8
            clip = {"x": 0, "y": first["y"] - 12, "width": WIDTH, "height": bottom - first["y"] + 12}
            found.append(Image.open(io.BytesIO(opened.screenshot(clip=clip, full_page=True))).convert("RGB"))
        browser.close()
    return found


if __name__ == "__main__":
    main()
