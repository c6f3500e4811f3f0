"""Text embeddings from a store or a file, for the detectors that compare images with words."""

from __future__ import annotations

import os

import numpy as np
from jaxtyping import Float

from featcache.geometry import unit
from featcache.rows import Rows


def text_embeddings(path: str | None, bank: Rows, argument: str) -> Float[np.ndarray, "c d"]:
    """The rows of `path` scaled to norm 1, in float64: a store, a .npy of shape (C, D), or a .safetensors whose only
    array, or the one named `embedding`, is (C, D). `argument` is what the user set, as `mcm:text`, for messages.

    Raises `ValueError` when no path was given, it holds no such array, its dimension is not the bank's, or a row is
    zero or not finite.
    """
    if path is None:
        raise ValueError(
            f"{argument.partition(':')[0]} needs text embeddings: give {argument}=FILE, a .npy, .safetensors or store "
            "made by the text tower of the images' model"
        )
    path = str(path)
    text = _read(path, argument)
    if text.shape[1] != bank.embedding_dim:
        raise ValueError(
            f"{path} holds text embeddings of {text.shape[1]} dimensions, the images of {bank.name} have "
            f"{bank.embedding_dim}; embed the text with the same model's text tower, and project both"
        )
    bad = ~(np.isfinite(text).all(axis=1) & (text != 0).any(axis=1))
    if bad.any():
        raise ValueError(f"{path} row {int(bad.argmax())} is zero or not finite; embed this text again")
    return unit(text)


def _read(path: str, argument: str) -> Float[np.ndarray, "c d"]:
    suffix = os.path.splitext(path)[1]
    if suffix not in (".npy", ".safetensors"):
        rows = Rows.of(path)
        failed = rows.record()["failed"]
        if failed:  # a class name that is missing would be nobody's fault and change every score
            raise ValueError(f"{path}: {failed:,} of {len(rows) + failed:,} texts failed; embed them again")
        return rows.take(np.arange(len(rows))).astype(np.float64)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        if suffix == ".npy":
            text = np.load(path, allow_pickle=False)
        else:
            arrays = load_file(path)
            if len(arrays) != 1 and "embedding" not in arrays:
                raise ValueError(f"of its arrays {', '.join(sorted(arrays))} none is called 'embedding'")
            text = next(iter(arrays.values())) if len(arrays) == 1 else arrays["embedding"]
        if text.ndim != 2 or not len(text) or text.dtype.kind not in "fiu":
            raise ValueError(f"{text.dtype} of shape {text.shape}")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give another {argument}=FILE") from None
    except (OSError, EOFError, ValueError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path} holds no (texts, dimensions) array ({said}); give another {argument}=FILE") from error
    return text.astype(np.float64)
