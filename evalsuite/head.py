"""A linear classifier on embeddings, for the detectors that need one."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Head:
    """logits = embedding · `weight`ᵀ + `bias`, in float64; `labels` are the classes of the rows of `weight`, as the
    ID training store numbers them. `class_names` are their names, where known. `name` is the file, for messages;
    `fingerprint` that of the encoder, None for any."""

    weight: Float[np.ndarray, "c d"]
    bias: Float[np.ndarray, " c"]
    labels: Int[np.ndarray, " c"]
    name: str = "head"
    fingerprint: str | None = None
    class_names: list[str] | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Head:
        """The classifier that `evalsuite.probe` saved, or any safetensors file with `weight` (C, D) and `bias` (C,)
        whose class i is label i.

        Raises `ValueError` when there is no such file or it holds no such classifier.
        """
        from safetensors import SafetensorError, safe_open

        remedy = "give a head that `evalsuite probe … --save FILE` wrote"
        if not os.path.isfile(path):
            what = "this is a store or another folder" if os.path.isdir(path) else "no such file"
            raise ValueError(f"{path}: {what}; {remedy}")
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                weight, bias = (file.get_tensor(name).astype(np.float64) for name in ("weight", "bias"))
            labels = np.asarray(json.loads(metadata.get("labels", "null")) or np.arange(len(weight)), np.int64)
            class_names = json.loads(metadata.get("class_names", "null"))
            names = labels if class_names is None else class_names
            if weight.ndim != 2 or not len(weight) == len(bias) == len(labels) == len(names):
                raise ValueError(
                    f"weight {weight.shape}, bias {bias.shape}, {len(labels)} labels, {len(names)} class names"
                )
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path} holds no classifier ({error}); {remedy}") from error
        return cls(weight, bias, labels, str(path), metadata.get("fingerprint"), class_names)

    def logits(self, embedding: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """(n, classes) float64."""
        return embedding.astype(np.float64) @ self.weight.T + self.bias
