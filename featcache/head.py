"""A linear classifier on embeddings: what a probe fits, detectors score with and methods learn from."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Head:
    """logits = embedding · `weight`ᵀ + `bias`, (C, D) and (C,), in float64; `labels` (C,) are the classes of the rows of `weight`, as the
    ID training store numbers them. `class_names` are their names, where known: by them classes are found again in stores
    that number them otherwise. `name` is the file, for messages; `fingerprint` that of the encoder, None for any.

    Raises `ValueError` when a value is not finite, there is no class, or the parts do not fit each other.
    """

    weight: Float[np.ndarray, "*c_d"]
    bias: Float[np.ndarray, "*c"]
    labels: Int[np.ndarray, "*labels"]
    name: str = "head"
    fingerprint: str | None = None
    class_names: list[str] | None = None

    def __post_init__(self) -> None:
        classes = len(self.weight) if self.weight.ndim == 2 else 0
        names = classes if self.class_names is None else len(self.class_names)
        if not (self.weight.size and self.bias.shape == self.labels.shape == (classes,) and names == classes):
            raise ValueError(
                f"weight {self.weight.shape}, bias {self.bias.shape}, {self.labels.size} labels, "
                f"{'no' if self.class_names is None else names} class names, not (C, D), (C,), C and C or none"
            )
        for what, values in (("weight", self.weight), ("bias", self.bias)):
            wrong = int((~np.isfinite(values)).sum())
            if wrong:
                raise ValueError(f"{wrong:,} of {values.size:,} values of {what} are not finite")
        if len(np.unique(self.labels)) < classes or self.labels.min() < 0:
            raise ValueError("labels are not distinct numbers from 0")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Head:
        """The classifier that `evalsuite.probe` saved, or any safetensors file with `weight` (C, D) and `bias` (C,), of any
        number type. As metadata it may have `class_names` (a JSON list of words, one a class) and `labels` (one of
        whole numbers); without, class i is label i.

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
                lacking = {"weight", "bias"} - set(file.keys())
                if lacking:
                    held = ", ".join(sorted(file.keys())[:5]) or "nothing"
                    raise ValueError(f"no {' and no '.join(sorted(lacking, reverse=True))}, but {held}")
                weight, bias = (_float64(file, path, name) for name in ("weight", "bias"))
            labels = _listed(metadata, "labels", int)
            numbers = np.arange(len(bias) if bias.ndim else 0) if labels is None else np.asarray(labels, np.int64)
            names = _listed(metadata, "class_names", str)
            return cls(weight, bias, numbers, str(path), metadata.get("fingerprint"), names)
        except (OSError, SafetensorError, OverflowError, ValueError) as error:
            raise ValueError(f"{path} holds no classifier ({' '.join(str(error).split())}); {remedy}") from error

    @property
    def digest(self) -> str:
        """128-bit BLAKE2b, in hex, of weights, bias and names: not of how a file lays them out."""
        found = hashlib.blake2b(json.dumps([self.class_names, self.labels.tolist()]).encode(), digest_size=16)
        for values in (self.weight, self.bias):
            found.update(np.ascontiguousarray(values, np.float64).tobytes())
        return found.hexdigest()

    def to_bytes(self, **said: str) -> bytes:
        """What `read` reads, of a safetensors file, the same bytes each time; `said` is kept with it (which encoder, how it was
        fitted)."""
        from safetensors.numpy import save

        names = [str(label) for label in self.labels.tolist()] if self.class_names is None else self.class_names
        metadata = {"class_names": json.dumps(names), "labels": json.dumps(self.labels.tolist())}
        if self.fingerprint is not None:
            metadata["fingerprint"] = self.fingerprint
        data = save({"weight": np.ascontiguousarray(self.weight), "bias": self.bias})
        end = 8 + int.from_bytes(data[:8], "little")
        # The library's own metadata comes in another order each time.
        header = {"__metadata__": dict(sorted((metadata | said).items())), **json.loads(data[8:end])}
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data[end:]

    def logits(self, embedding: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """(n, classes) float64."""
        return embedding.astype(np.float64) @ self.weight.T + self.bias


def _float64(file: Any, path: str | os.PathLike[str], name: str) -> Float[np.ndarray, "*shape"]:
    kind = file.get_slice(name).get_dtype()
    if kind.startswith(("BF", "F8", "F4", "F6")):  # numpy has no such numbers
        from safetensors import safe_open

        with safe_open(path, "pt") as wide:
            return wide.get_tensor(name).double().numpy()
    if not kind.startswith(("F", "I", "U")):
        raise ValueError(f"{name} is {kind}, no numbers")
    return file.get_tensor(name).astype(np.float64)


def _listed(metadata: dict[str, str], key: str, kind: type) -> list[Any] | None:
    """A JSON list of the metadata, None where there is none."""
    found = json.loads(metadata.get(key, "null"))
    if found is not None and not (isinstance(found, list) and all(type(each) is kind for each in found)):
        raise ValueError(f"{key} is no list of {'whole numbers' if kind is int else 'words'}")
    return found
