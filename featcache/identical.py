"""Which rows are of the same image, by 128-bit hashes: of the encoded image, as stores keep them, or of the embedding."""

import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt8

Hashes = UInt8[np.ndarray, "_ 16"]


def numbered(hashes: Hashes) -> Int64[np.ndarray, " n"]:
    """The same number for the same hash, whole numbers from 0 on.

    A million rows take under a second and some 40 MB: one sort, nothing is compared pair by pair.
    """
    low, high = np.ascontiguousarray(hashes).view(np.uint64).reshape(-1, 2).T
    order = np.lexsort((low, high))
    new = (low[order[1:]] != low[order[:-1]]) | (high[order[1:]] != high[order[:-1]])
    numbers = np.empty(len(hashes), np.int64)
    numbers[order] = np.concatenate([np.zeros(min(1, len(hashes)), np.int64), np.cumsum(new)])
    return numbers


def copies(hashes: Hashes, others: Hashes) -> Int64[np.ndarray, " n"]:
    """How many of `others` each of `hashes` equals."""
    theirs, ours = (np.ascontiguousarray(each[:, :8]).view(np.uint64)[:, 0] for each in (others, hashes))
    # Few, as a rule: sorting whole hashes takes five times as long as half of each.
    likely = others[np.isin(theirs, ours)]
    numbers = numbered(np.concatenate([likely, hashes]))
    return np.bincount(numbers[: len(likely)], minlength=len(numbers))[numbers[len(likely) :]]


def again(hashes: Hashes) -> Bool[np.ndarray, " n"]:
    """Which of `hashes` have been there before, in an earlier row."""
    repeated = np.ones(len(hashes), bool)
    repeated[np.unique(numbered(hashes), return_index=True)[1]] = False
    return repeated


def embedding_hashes(blocks: Iterable[Shaped[np.ndarray, "_ d"]]) -> Hashes:
    """Of embeddings: equal where all values are, whatever their dtype (float16 or float32)."""
    found = bytearray()
    for block in blocks:
        values = np.ascontiguousarray(block, np.float32) + np.float32(0)  # of −0 too
        for row in values:
            found += hashlib.blake2b(row.tobytes(), digest_size=16).digest()
    return np.frombuffer(bytes(found), np.uint8).reshape(-1, 16)
