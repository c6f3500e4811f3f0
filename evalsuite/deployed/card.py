"""The README of a deployed detector: what it is, how sure its threshold is, and the lines that load it without this project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMAGES = '''import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FOLDER = "."  # where this README is
about = json.loads(Path(FOLDER, "detector.json").read_text("utf-8"))
encoder, detector = (onnxruntime.InferenceSession(f"{FOLDER}/{name}.onnx") for name in ("encoder", "detector"))


def score(path):
    """How OOD an image is (higher: more), whether that is beyond the threshold, and its embedding."""
    image = Image.open(path)
    if image.mode[0] in "IF":  # more than 8 bits, of which Pillow clips the bright ones
        raise ValueError(f"{path}: convert it to 8 bits first")
    given = encoder.run(None, {"pixels": np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]})
    features = dict(zip([each.name for each in encoder.get_outputs()], given))
    found = detector.run(None, {each.name: features[each.name] for each in detector.get_inputs()})[0][0]
    return found, found > about["threshold"]["value"], features["embedding"][0]
'''
NEIGHBOURS = '''

bank, ids = np.load(f"{FOLDER}/bank.npy"), json.loads(Path(FOLDER, "bank.json").read_text("utf-8"))


def nearest(embedding, k=3):
    """The bank images most like it, with their cosines."""
    cosine = bank @ (embedding / np.linalg.norm(embedding))
    return [(ids[i], cosine[i]) for i in np.argsort(-cosine, kind="stable")[:k]]
'''
FEATURES = '''import json

import numpy as np
import onnxruntime

FOLDER = "."  # where this README is
with open(f"{FOLDER}/detector.json", encoding="utf-8") as file:
    about = json.load(file)
detector = onnxruntime.InferenceSession(f"{FOLDER}/detector.onnx")


def score(**features):
    """Of rows of features, float32 (n, d), by name: how OOD each is (higher: more), and whether beyond the threshold."""
    found = detector.run(None, features)[0]
    return found, found > about["threshold"]["value"]
'''

WITH_FEATCACHE = """import evalsuite

detector = evalsuite.load_detector(".")  # where this README is
found = detector.score("new/")
print(found.ids, found.score, found.is_ood, found.reason)
"""


def write_card(path: Path, record: Mapping[str, Any]) -> None:
    """Write the README of the folder that `record`, its `detector.json`, is of."""
    store, of, limit = record["store"], record["bank"], record["threshold"]
    graph, weights = "encoder.onnx" in record["files"], "encoder.safetensors" in record["files"]
    code = IMAGES if graph else WITH_FEATCACHE if weights else FEATURES
    code += NEIGHBOURS if graph and record["nearest"] else ""
    open_low, open_high = (limit[side] is None for side in ("low", "high"))
    low, high = ("−∞" if open_low else f"{limit['low']:.6g}"), ("∞" if open_high else f"{limit['high']:.6g}")
    lines = [
        f"# A detector of out-of-distribution images: {record['detector']}",
        f"Fitted to {of['rows']:,} rows of `{_cell(of['path'])}`, features of {_cell(store['encoder']['name'])} (fingerprint "
        f"`{store['encoder']['fingerprint']}`). A score is **higher for what is more OOD**; what is above the threshold is "
        "said to be OOD.",
        "| | |\n|---|---|",
        f"| threshold | {limit['value']:.8g}, 95 % interval {low} … {high} |",
        f"| to keep | {record['keep']:g} of ID images; by {limit['rows']:,} held-out rows this very threshold keeps "
        f"{limit['kept_low']:.4f} … {limit['kept_high']:.4f} of further ones (95 %) |",
        *(
            f"| finds of {_cell(name)} | {_share(each)}, of {each['rows']:,} images |"
            for name, each in record["ood"].items()
        ),
    ]
    table = "\n".join(lines[2:])
    remarks = "\n".join(f"- {_cell(line)}" for line in record["remarks"])
    text = [
        *lines[:2],
        table,
        *([f"To know:\n\n{remarks}"] if remarks else []),
        _LOADING,
        f"```python\n{code}```",
        _ENDING,
    ]
    path.write_text("\n\n".join(text) + "\n", encoding="utf-8")


_LOADING = (
    "## Use it\n\nWith ONNX Runtime, NumPy and Pillow (`pip install onnxruntime numpy pillow`), nothing else; no file here "
    "holds code or a pickle."
)
_WEIGHTS = "## Use it\n\nWith featcache and the code of the encoder, of which the weights alone are here."
_ENDING = (
    "With featcache: `evalsuite detector score THIS_FOLDER --images NEW/ --out scores.csv`, which also reads images "
    "of 16 bits, keeps a row for every image that cannot be read, and checks that no file here is damaged.\n\n"
    "The threshold holds for images like the ID ones: taken the same way, of the same classes. Once they are not, more than "
    "it should be is said to be OOD; `evalsuite detector drift` watches for that."
)


def _share(found: Mapping[str, Any]) -> str:
    interval = f"95 % interval {found['ci95'][0]:.4f} … {found['ci95'][1]:.4f}" if found["ci95"] else found["no_ci95"]
    return f"{found['found']:.4f} ({interval})"


def _cell(text: object) -> str:
    """On one line, and no markup: names come from data."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(f"\\{c}" if c in "|`*_[]<>" else c for c in shown)
