"""The dataset card of a store: which teacher saw what, how, what the columns are, and how to load them."""

from collections import Counter
from collections.abc import Sequence

from featcache.public import public
from featcache.store import FeatureStore
from featcache.store.layout import FAILED, OK

METADATA = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
task_categories:
- image-feature-extraction
tags:
- featcache
- image-embeddings
---"""
SHOWN = 10


def dataset_card(store: FeatureStore, place: str) -> str:
    """Markdown, with the metadata that the hub reads; the licence is for the user to give.

    Args:
        place: USER/NAME[@REVISION] on the hub, or a folder.
    """
    manifest, at_hub = store.manifest, place != "."
    encoder, views, made = manifest.encoder, manifest.views, manifest.extraction
    name, _, revision = place.partition("@")
    given = f'"{name}"' + (f', revision="{revision}"' if revision else "")
    rows = f"{len(store):,}, {len(store.failed):,} of them failed" if len(store.failed) else f"{len(store):,}"
    parts = [
        METADATA,
        f"# What {public(encoder.name)} saw",
        "Embeddings of images by a frozen encoder, computed once. The images are not in here.",
        _table(
            [
                ("teacher", f"{public(encoder.name)}, fingerprint `{encoder.fingerprint}`"),
                ("output", encoder.output or "not recorded"),
                (
                    "preprocess",
                    " ".join(f"{key}={value}" for key, value in encoder.preprocess.items()) or "not recorded",
                ),
                ("precision", made.precision or made.dtype or "not recorded"),
                ("images", public(manifest.corpus.spec) or "not recorded"),
                ("rows", rows),
                ("classes", f"{len(store.class_names):,}" if store.class_names else "not named"),
                ("views", " ".join(f"{key}={value}" for key, value in views.to_json().items() if key != "parameters")),
            ]
        ),
        "## Columns",
        _table(
            [
                *(
                    (
                        f"`{field}`",
                        f"{' × '.join(map(str, shape)) or 1}{', flat' if len(shape) > 1 else ''}, {manifest.dtype(field)}{_of_views(field, store.views)}",
                    )
                    for field, shape in manifest.fields.items()
                ),
                *(
                    [("`cosine`", "of the embedding to that in fp32; NaN: not computed of this row")]
                    if made.spot_checked
                    else []
                ),
                ("`sample_id`", "which image"),
                ("`label`", "its class; −1: none"),
                ("`state`", f"{OK}, or {FAILED}: the image could not be read, and its features are zeros"),
                ("`reason`", "why it could not"),
                ("`content`", "BLAKE2b of the image file, 128 bits"),
                ("`view`", f"{', '.join(views.parameters)}{_of_views('view', store.views)}"),
            ]
        ),
        *_failures(store),
        "## Loading",
        f'```python\nfrom datasets import load_dataset\n\nrows = load_dataset({given}, split="train")\n'
        f'rows = rows.filter(lambda row: row["state"] == {OK})\n```',
        f"As a store of featcache, bit for bit: `featcache import {'hf:' if at_hub else ''}{place} STORE`.",
        "## Licence",
        "None is given by the program that wrote this. The terms of the images and of the encoder may bind what was computed "
        "from them; whoever shares it says under what.",
    ]
    return "\n\n".join(parts) + "\n"


def _of_views(column: str, views: int) -> str:
    """Where the other views are."""
    last = f" … `{column}_{views - 1}`" if views > 2 else ""
    return f"; view 0, the plain one; the others are `{column}_1`{last}" if views > 1 else ""


def _failures(store: FeatureStore) -> list[str]:
    if not len(store.failed):
        return []
    reasons = Counter(store.reasons.values())
    lines = [f"- {count:,} × {public(' '.join(reason.split()))}" for reason, count in reasons.most_common(SHOWN)]
    more = f"\n- and {len(reasons) - SHOWN:,} other reasons" if len(reasons) > SHOWN else ""
    return ["## Failed rows", "\n".join(lines) + more]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = [("", ""), ("---", "---"), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
