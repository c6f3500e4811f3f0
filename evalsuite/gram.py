"""Measures over all pairs of rows of two spaces, of which no n×n matrix is formed.

With rows x of one space and y of the other, Σᵢⱼ(xᵢ·xⱼ)(yᵢ·yⱼ) = ‖XᵀY‖²_F, so sums over all pairs of entries of two Gram
matrices follow from sums over rows. Memory is O(d·d'), time O(n·d·d').
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from evalsuite.pairs import LEAST_ROWS
from featcache.geometry import GramSums, unit
from featcache.rows import Rows

Blocks = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]

_BLOCK_ROWS = 8192


def blocks(x: Rows, y: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The embeddings of paired rows, block by block."""
    for start in range(0, len(x), _BLOCK_ROWS):
        part = np.arange(start, min(start + _BLOCK_ROWS, len(x)))
        yield x.take(part), y.take(part)


def over_all_pairs(blocks: Blocks, *, seed: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """The measures of `fidelity` over all pairs by name, and their chance levels, on paired blocks of rows
    ((b, d), (b, d')); `blocks()` is called twice.

    Raises `ValueError` when there are fewer than 4 rows or all rows of one side are alike.
    """
    n, x_mean, y_mean, x_unit_mean, y_unit_mean = 0, 0.0, 0.0, 0.0, 0.0
    for x, y in blocks():
        x, y = x.astype(np.float64), y.astype(np.float64)
        n += len(x)
        x_mean, y_mean = x_mean + x.sum(axis=0), y_mean + y.sum(axis=0)
        x_unit_mean, y_unit_mean = x_unit_mean + unit(x).sum(axis=0), y_unit_mean + unit(y).sum(axis=0)
    if n < LEAST_ROWS:
        raise ValueError(f"{n} rows were paired, at least {LEAST_ROWS} are needed; extract both from one corpus")
    x_mean, y_mean, x_unit_mean, y_unit_mean = x_mean / n, y_mean / n, x_unit_mean / n, y_unit_mean / n

    cosine, centred, raw, units = GramSums(), GramSums(), GramSums(), GramSums()
    signed: Any = 0.0  # XᵀY with a random sign for each row: the pairing is lost, everything else is kept
    rng = np.random.default_rng(seed)
    for x, y in blocks():
        x, y = x.astype(np.float64), y.astype(np.float64)
        x_unit, y_unit = unit(x), unit(y)
        cosine.add(x_unit, y_unit)
        # Neither HSIC nor what Procrustes leaves changes when a space is shifted; centring first keeps a large
        # offset from eating the digits.
        raw.add(x - x_mean, y - y_mean)
        x_unit, y_unit = x_unit - x_unit_mean, y_unit - y_unit_mean
        units.add(x_unit, y_unit)
        centred.add(unit(x_unit), unit(y_unit))
        signed = signed + x_unit.T @ np.where(rng.random((len(x), 1)) < 0.5, -y_unit, y_unit)
    values = {
        "gram_pearson": cosine.pearson(),
        "gram_pearson_centred": centred.pearson(),
        "cka_debiased": raw.cka_debiased(),
        "cka_debiased_unit": units.cka_debiased(),
        "procrustes": units.procrustes(units.xy),
    }
    return values, dict.fromkeys(values, 0.0) | {"procrustes": units.procrustes(signed)}


@dataclass(frozen=True)
class LinearMap:
    """Linear map (up to a scale a row) from the teacher's space to the student's: weight · (embedding − mean)."""

    weight: Float[np.ndarray, "e d"]
    mean: Float[np.ndarray, " d"]

    @classmethod
    def read(cls, path: str | os.PathLike[str], x: Rows, y: Rows) -> LinearMap:
        """Raises `ValueError` when the file holds no linear mapping or one between other dimensions."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; give mapping.safetensors of a run folder of `distill fit`")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file ({error}); give mapping.safetensors of a run") from error
        found = sorted(name for name in tensors if name.startswith("mapping."))
        if "mapping.weight" not in found or not {*found} <= {"mapping.weight", "mapping.mean"}:
            raise ValueError(
                f"{path} holds {', '.join(found or sorted(tensors)) or 'nothing'}, not a linear mapping of the teacher "
                "(mapping.weight); leave the mapping out for this run"
            )
        weight = tensors["mapping.weight"].astype(np.float64)
        if weight.shape != (y.embedding_dim, x.embedding_dim):
            raise ValueError(
                f"{path} maps {weight.shape[-1]} dimensions to {weight.shape[0]}, but {x.name} has {x.embedding_dim} "
                f"and {y.name} {y.embedding_dim}; give the mapping of the student's own run"
            )
        return cls(weight, tensors.get("mapping.mean", np.zeros(x.embedding_dim)).astype(np.float64))

    def cosines(self, blocks: Blocks) -> tuple[Float[np.ndarray, " n"], float]:
        """Of each row, and their mean over all pairs of different rows."""
        parts, mapped_sum, student_sum = [], 0.0, 0.0
        for x, y in blocks():
            mapped, student = unit((x - self.mean) @ self.weight.T), unit(y.astype(np.float64))
            parts.append((mapped * student).sum(axis=1))
            mapped_sum, student_sum = mapped_sum + mapped.sum(axis=0), student_sum + student.sum(axis=0)
        cosines = np.concatenate(parts)
        pairs = float(np.dot(mapped_sum, student_sum)) - float(cosines.sum())
        return cosines, pairs / (len(cosines) * (len(cosines) - 1))
