"""The k largest of many logits, in the place of all: packed into 16-bit words, and what they stand for.

Of a sequence's logits, (T, classes), those of each position; a position that holds zeros is none, and stays zeros.

A row's words are its k + 1 values, in the field's dtype, then k columns, in uint16 (of up to 65,536 classes) or uint32: ln p of the k most
probable classes, the most probable first, and ln of what is left for all others together, p = softmax(logits).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float32, UInt16

if TYPE_CHECKING:
    from torch import Tensor
else:  # readers do without torch
    Tensor = Any

_LOWEST = float(np.finfo(np.float16).min)  # ln p below it is kept as this


def words(classes: int, k: int, dtype: str) -> int:
    """Of a row, each 2 bytes."""
    return ((k + 1) * np.dtype(dtype).itemsize + k * _columns(classes).itemsize) // 2


def _columns(classes: int) -> np.dtype:
    return np.dtype(np.uint16 if classes <= 2**16 else np.uint32)


def pack(logits: Tensor, k: int, dtype: str) -> UInt16[np.ndarray, "*n words"]:
    """Of (n, classes) or (n, T, classes) finite logits; computed in float32 where they lie."""
    if logits.ndim > 2:
        packed = pack(logits.flatten(0, -2), k, dtype)
        packed[(logits == 0).all(dim=-1).flatten().cpu().numpy()] = 0
        return packed.reshape(*logits.shape[:-1], -1)
    log_p = logits.float().log_softmax(dim=1)
    top, column = log_p.topk(k, dim=1)
    rest = log_p.scatter(1, column, -float("inf")).logsumexp(dim=1, keepdim=True)
    values = np.concatenate([top.cpu().numpy(), rest.cpu().numpy()], axis=1).clip(_LOWEST).astype(dtype)
    columns = column.cpu().numpy().astype(_columns(logits.shape[1]))
    return np.concatenate([values.view(np.uint16), columns.view(np.uint16)], axis=1)


def unpack(
    packed: UInt16[np.ndarray, "*n words"], classes: int, k: int, dtype: str
) -> Float32[np.ndarray, "*n classes"]:
    """ln p of every class: of the k kept ones as kept, of the others as if what is left were spread evenly over them."""
    if packed.ndim > 2:
        logits = unpack(packed.reshape(-1, packed.shape[-1]), classes, k, dtype)
        logits[~packed.reshape(len(logits), -1).any(axis=1)] = 0
        return logits.reshape(*packed.shape[:-1], classes)
    values, columns = _parts(packed, classes, k, dtype)
    logits = np.repeat(values[:, k:] - np.float32(np.log(classes - k)), classes, axis=1)
    np.put_along_axis(logits, columns.astype(np.int64), values[:, :k], axis=1)
    return logits


def outside(packed: UInt16[np.ndarray, "n words"], classes: int, k: int, dtype: str) -> Float[np.ndarray, " n"]:
    """The probability of all classes that are not among the k, of each row: what was not kept of their order."""
    return np.exp(_parts(packed, classes, k, dtype)[0][:, k])


def _parts(
    packed: UInt16[np.ndarray, "n words"], classes: int, k: int, dtype: str
) -> tuple[Float32[np.ndarray, "n k1"], np.ndarray]:
    at = (k + 1) * np.dtype(dtype).itemsize // 2
    values = np.ascontiguousarray(packed[:, :at]).view(dtype).astype(np.float32)
    return values, np.ascontiguousarray(packed[:, at:]).view(_columns(classes))
