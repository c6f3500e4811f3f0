"""Patch tokens as a map: teacher and student may have grids of different sizes."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from featcache.rows import Rows


def resize_tokens(tokens: Float[Tensor, "b t d"], count: int) -> Float[Tensor, "b u d"]:
    """Patch tokens (row-major, of a square grid) resampled to `count` of them, also square.

    Bilinear between the centres of patches; averaged over what each patch covers where the grid shrinks.

    Raises:
        ValueError: the numbers differ and one is not that of a square.
    """
    if tokens.shape[1] == count:
        return tokens
    was, will = math.isqrt(tokens.shape[1]), math.isqrt(count)
    if was**2 != tokens.shape[1] or will**2 != count:
        raise ValueError(
            f"{tokens.shape[1]} tokens of the teacher cannot be resampled to the student's {count}: only square grids "
            "can; choose a student with as many tokens, or images that give square grids"
        )
    grid = tokens.mT.unflatten(2, (was, was))
    return F.interpolate(grid, size=(will, will), mode="bilinear", antialias=True).flatten(2).mT


def class_and_patches(embedding: Float[Tensor, "b d"], tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
    """One block an image: the class token, then the patch tokens."""
    return torch.cat([embedding[:, None], tokens], dim=1)


def check_tokens(rows: Rows) -> None:
    """Refuse rows whose patch tokens cannot go through the same head as their embedding.

    Raises:
        ValueError: a store has no tokens, or they are not as wide as the embedding.
    """
    for store in rows.stores:
        shape = store.manifest.fields.get("tokens")
        if shape is None:
            raise ValueError(
                f"{store.path}: has no patch tokens; extract it with `--fields embedding,tokens,prefix_tokens`"
            )
        if shape[-1] != store.embedding_dim:
            raise ValueError(
                f"{store.path}: its tokens have {shape[-1]} dimensions and its embedding {store.embedding_dim}, but one "
                "head must take both; extract with a teacher whose embedding is pooled from its tokens (`@pool=…`)"
            )
