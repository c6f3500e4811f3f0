"""Teacher space → student space, one file each: estimators in the manner of scikit-learn, fitted from a store, then
frozen.

A file defines exactly one public class, a `FeatureMapping`, and is registered under its own name. Other people's packages
add mappings through the entry-point group `distill.mappings`, each entry naming such a module.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from featcache.plugins import load_plugin, only_class
from featcache.rows import Rows
from featcache.store import FeatureStore

Told = Callable[[int, int], None]
"""Is told how much is done, and of how much."""


class FeatureMapping(ABC):
    """From `teacher_dim` to `dim` dimensions. `__init__(dim, *, …)` only stores; `fit` learns from a store alone.

    A student wider than its teacher gets a `lift`: nothing is lost, so there is nothing to learn. Of one as wide, `sne`'s
    is the identity.

    Learned state:
        weight_: (dim, teacher_dim) float32, the matrix of the linear part.
        report_: numbers about the fit, where there are any; `lifted_from`, the teacher's dimensions, of a lift.
    """

    dim: int
    weight_: Float[np.ndarray, "dim teacher_dim"]
    report_: dict[str, float]

    turns: ClassVar[bool] = True
    """Whether rows point elsewhere afterwards even in as many dimensions as the teacher has."""

    @abstractmethod
    def fit(self, store: Rows | FeatureStore, progress: Told | None = None) -> "FeatureMapping":
        """Reads the store in blocks of a fixed number of rows: memory does not grow with the rows' features.

        Args:
            progress: called with (done, of how many).

        Raises:
            ValueError: `dim` or another option does not suit the store.
        """

    def _lift(self, rows: Rows, seed: int) -> None:
        """Learn `lift` alone."""
        self.weight_ = lift(self.dim, rows.embedding_dim, seed)
        self.report_ = {"lifted_from": float(rows.embedding_dim)}

    @abstractmethod
    def module(self) -> nn.Module:
        """(…, teacher_dim) → (…, dim) float32: what `transform` does, as a module of buffers that never trains."""

    def transform(self, embedding: Float[np.ndarray, "n teacher_dim"]) -> Float[np.ndarray, "n dim"]:
        """The teacher's embeddings, as they are stored, in the student's space; float32."""
        with torch.inference_mode():
            mapped: np.ndarray = self.module()(torch.tensor(np.asarray(embedding, np.float32))).numpy()
        return mapped


class Frozen(nn.Module):
    """weight · normalised(features − mean) + bias, over the last dimension.

    Args:
        weight: (dim, teacher_dim).
        mean: (teacher_dim,), subtracted first.
        normalised: "unit", to length one (a row of zeros stays zero); "layer", to mean 0 and variance 1 over the
            row's own dimensions; "none".
        bias: (dim,).
    """

    weight: Tensor
    mean: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Float[np.ndarray, "dim teacher_dim"],
        *,
        mean: Float[np.ndarray, " teacher_dim"] | None = None,
        normalised: Literal["unit", "layer", "none"] = "unit",
        bias: Float[np.ndarray, " dim"] | None = None,
    ):
        super().__init__()
        self.normalised = normalised
        for name, value in {"weight": weight, "mean": mean, "bias": bias}.items():
            # Row-major, as it is when read from a file again: in another order, small batches give other bits.
            self.register_buffer(name, None if value is None else torch.tensor(value, dtype=torch.float32).contiguous())

    def forward(self, features: Float[Tensor, "*batch teacher_dim"]) -> Float[Tensor, "*batch dim"]:
        features = features.float()
        if self.mean is not None:
            features = features - self.mean
        if self.normalised == "unit":
            features = F.normalize(features, dim=-1)
        elif self.normalised == "layer":
            features = F.layer_norm(features, features.shape[-1:])
        return F.linear(features, self.weight, self.bias)


def lift(dim: int, teacher_dim: int, seed: int) -> Float[np.ndarray, "dim teacher_dim"]:
    """W with WᵀW = 1, so every inner product and cosine stays what it was: the identity, or an isometry into more dimensions.

    Uniform over all such: QR of a Gaussian, R's diagonal positive (Mezzadri 2007, arXiv math-ph/0609050). Random rather
    than padded with zeros, so that every dimension of the student has something to learn.
    """
    if dim == teacher_dim:
        return np.eye(dim, dtype=np.float32)
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, teacher_dim)))
    return np.ascontiguousarray(q * np.sign(np.diagonal(r)), np.float32)


def restored(mapping: FeatureMapping, tensors: dict[str, Tensor], teacher_dim: int) -> Frozen | None:
    """The module that an earlier `fit` of such a mapping left, None where it takes more or other tensors than these.

    Args:
        mapping: not fitted yet.
        tensors: "weight", "mean" and "bias", those that the module has.
    """
    try:
        for name, tensor in tensors.items():
            setattr(mapping, f"{name}_", tensor.numpy())
        module = mapping.module()
        if isinstance(module, Frozen) and module.state_dict().keys() == tensors.keys():
            return module if module(torch.zeros(1, teacher_dim)).shape == (1, mapping.dim) else None
    except (AttributeError, RuntimeError, TypeError, ValueError):  # tensors of another mapping
        pass
    return None


def checked_rows(store: Rows | FeatureStore, dim: int, least_rows: int = 1) -> Rows:
    """The rows to fit a mapping to `dim` dimensions from.

    Raises:
        ValueError: `dim` is less than 1, or there are too few rows.
    """
    rows = Rows.of(store)
    if dim < 1:
        raise ValueError(f"{rows.name}: a mapping needs 1 dimension or more to map to, got {dim}")
    if len(rows) < least_rows:
        raise ValueError(f"{rows.name}: {len(rows)} rows with features; a mapping needs two or more")
    return rows


def orthogonality(weight: Float[np.ndarray, "dim teacher_dim"]) -> dict[str, float]:
    """How far a map is from an orthogonal projection, or an isometry into more dimensions, up to one scale c.

    Returns:
        singular_min, singular_max: of W. deviation: ‖WWᵀ/c − I‖_F / √dim with c = tr(WWᵀ)/dim; 0 is orthogonal. Of a W
            with more rows than columns, WᵀW and the columns instead.
    """
    rows = (weight if len(weight) <= weight.shape[1] else weight.T).astype(np.float64)
    gram = rows @ rows.T
    singular = np.sqrt(np.linalg.eigvalsh(gram).clip(0))
    scale = np.trace(gram) / len(gram)
    deviation = np.linalg.norm(gram / scale - np.eye(len(gram))) / math.sqrt(len(gram))
    return {"singular_min": float(singular[0]), "singular_max": float(singular[-1]), "deviation": float(deviation)}


def load_mapping(name: str) -> type[FeatureMapping]:
    """The class of `distill/mappings/NAME.py`. Raises ValueError, with near names, when there is none."""
    return only_class(load_plugin(__name__, name), FeatureMapping)  # type: ignore[type-abstract]
