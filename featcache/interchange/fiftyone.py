"""fiftyone: a folder that Voxel51's FiftyOne opens as a dataset, with its embeddings."""

import base64
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from featcache.interchange import Format
from featcache.interchange._arrays import Arrays
from featcache.interchange.embedding_atlas import beside_embeddings
from featcache.store import FeatureStore
from featcache.store.layout import OK, STATE

_FIELD = "fiftyone.core.fields."
FIELDS = {
    "filepath": f"{_FIELD}StringField",
    "tags": f"{_FIELD}ListField({_FIELD}StringField)",
    "metadata": f"{_FIELD}EmbeddedDocumentField(fiftyone.core.metadata.ImageMetadata)",
    "sample_id": f"{_FIELD}StringField",
    "row": f"{_FIELD}IntField",
    "ground_truth": f"{_FIELD}EmbeddedDocumentField(fiftyone.core.labels.Classification)",
    "embedding": f"{_FIELD}VectorField",
}
"""FiftyOne's types of a sample's fields."""


class FiftyOne(Format):
    """metadata.json and samples.json as FiftyOne 0.7 wrote them: the form without a version, which all later ones read too. A
    sample a row with features: filepath, sample_id, row (of the store), ground_truth (where it has a label), embedding (float32,
    view 0). Images that are files here are pointed to where they lie; others are written to data/."""

    folder = True
    shows = "needed"

    def rows(self, store: FeatureStore) -> int:
        return len(store.ok)

    def write(self, store: FeatureStore, units: Iterator[Arrays], out: Path, *, as_is: bool) -> None:
        out.mkdir()
        classes, manifest = list(store.class_names or []), store.manifest
        told = {"encoder": store.encoder_name, "fingerprint": store.fingerprint, "corpus": manifest.corpus.spec}
        metadata = {"media_type": "image", "sample_fields": FIELDS, "info": {"classes": classes, **told}}
        (out / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
        first = 0
        with (out / "samples.json").open("w", encoding="utf-8") as file:
            file.write('{"samples": [')
            for unit in units:
                for row in np.flatnonzero(unit[STATE] == OK).tolist():
                    sample = self._sample(unit, row, first + row, classes, out)
                    file.write(f"{',' if first + row != store.ok[0] else ''}\n{json.dumps(sample)}")
                first += len(unit[STATE])
            file.write("\n]}\n")

    def _sample(self, unit: Arrays, here: int, row: int, classes: list[str], out: Path) -> dict[str, Any]:
        label = int(unit["label"][here])
        named = classes[label] if 0 <= label < len(classes) else str(label)
        return {
            "filepath": self._image(row, out),
            "tags": [],
            "sample_id": unit["sample_id"][here],
            "row": row,
            "ground_truth": None if label < 0 else {"_cls": "Classification", "tags": [], "label": named},
            "embedding": _packed(unit["embedding"][here, 0].astype(np.float32)),
        }

    def _image(self, row: int, out: Path) -> str:
        """Where the image lies: a path, absolute or from `out`."""
        assert self.pictures is not None
        if path := self.pictures.file(row):
            self.pictures.read(row)  # it is the one that was extracted
            return str(path)
        encoded, ending = self.pictures.shown(row)
        (out / "data").mkdir(exist_ok=True)
        (out / f"data/{row:08d}{ending}").write_bytes(encoded)
        return f"data/{row:08d}{ending}"

    def left_out(self, store: FeatureStore, *, as_is: bool) -> list[str]:
        return beside_embeddings(store)

    def opened_by(self, store: FeatureStore, out: Path) -> str:
        return f"fiftyone.Dataset.from_dir({str(out)!r}, dataset_type=fiftyone.types.FiftyOneDataset), in Python"


def _packed(vector: np.ndarray) -> dict[str, Any]:
    """A vector as FiftyOne keeps it: a .npy, compressed, in MongoDB's extended JSON."""
    file = io.BytesIO()
    np.save(file, vector, allow_pickle=False)
    return {"$binary": {"base64": base64.b64encode(zlib.compress(file.getvalue())).decode(), "subType": "00"}}
