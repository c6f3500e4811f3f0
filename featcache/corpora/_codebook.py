"""A vector quantiser without weights to download: images put together of the patches of a codebook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Shaped, UInt8

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

PATCHES, IMAGES = 100_000, 2_000
"""That a codebook is fitted to, at most."""
_AT_ONCE = 1 << 14


class Codebook:
    """Every patch of `patch` × `patch` px of an image becomes the nearest of `codes` by Euclidean distance.

    What VQ autoencoders do in the space of a learned encoder (van den Oord et al. 2017, arXiv 1711.00937), done with pixels:
    coarser pictures, blocks to be seen, and nothing that has to be had from elsewhere.

    Attributes:
        codes: (C, 3 · patch²), channel by channel, 0…1.
    """

    def __init__(self, codes: Float[np.ndarray, "c d"], patch: int):
        self.codes, self.patch = codes, patch

    @classmethod
    def fit(cls, images: Iterable[UInt8[np.ndarray, "_ _ 3"]], *, codes: int, patch: int, seed: int) -> Codebook:
        """k-means of the patches of `images`, fewer codes where there are fewer different patches.

        Raises:
            ValueError: scikit-learn is missing, or there is no image to learn from.
        """
        try:
            from sklearn.cluster import MiniBatchKMeans
        except ImportError:
            raise ValueError("a codebook of patches needs scikit-learn: pip install 'featcache[demo]'") from None
        import torch

        rng, drawn = np.random.default_rng(seed), []
        for image in images:
            rows = _patches(torch.tensor(image).permute(2, 0, 1)[None].float() / 255, patch)[0].numpy()
            drawn.append(rows[rng.permutation(len(rows))[: max(1, PATCHES // IMAGES)]])
        if not drawn:
            raise ValueError("no image could be read to learn a codebook of patches from")
        rows = np.concatenate(drawn)[:PATCHES]
        different = len(np.unique(rows, axis=0))
        found = MiniBatchKMeans(
            min(codes, different), random_state=seed, n_init=1, batch_size=4096, max_iter=50, reassignment_ratio=0
        )
        return cls(found.fit(rows).cluster_centers_.astype(np.float32).clip(0, 1), patch)

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The same images, of codes only; where a side is no multiple of the patch, its last px are repeated to fill one."""
        import torch
        import torch.nn.functional as F

        codes = torch.from_numpy(self.codes).to(images)
        patches = _patches(images, self.patch)
        nearest = torch.cat(
            [
                (some @ codes.T - codes.square().sum(dim=1) / 2).argmax(dim=1)
                for some in patches.flatten(0, 1).split(_AT_ONCE)
            ]
        )
        height, width = ((side + self.patch - 1) // self.patch * self.patch for side in images.shape[2:])
        of_codes = codes[nearest].view(patches.shape).mT
        whole = F.fold(of_codes, (height, width), self.patch, stride=self.patch)
        return whole[:, :, : images.shape[2], : images.shape[3]]


def _patches(images: Float[Tensor, "b 3 h w"], patch: int) -> Shaped[Tensor, "b n d"]:
    import torch.nn.functional as F

    height, width = images.shape[2:]
    filled = F.pad(images, (0, -width % patch, 0, -height % patch), mode="replicate")
    return F.unfold(filled, patch, stride=patch).mT
