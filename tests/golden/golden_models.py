"""Tiny encoders and students for `golden_models:NAME`, and files of random weights for timm's smallest models."""

import torch
from torch import Tensor, nn

from featcache import Encoder, Preprocess


class Convolution(nn.Module):
    """(B, 3, 16, 16) → an embedding of 6, 3 logits and 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.conv(images).relu().flatten(2).transpose(1, 2)
        embedding = tokens.mean(1) + 0.1
        return {
            "embedding": embedding,
            "logits": self.head(embedding),
            "tokens": tokens,
            "prefix_tokens": torch.stack([embedding, -embedding], 1),
        }


def _encoder(name: str, seed: int, resize: int) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Convolution()
    return Encoder(
        name=f"golden_models:{name}",
        module=module,
        preprocess=Preprocess(resize=resize, crop=16, size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)),
        fields={"embedding": (6,), "logits": (3,), "tokens": (16, 6), "prefix_tokens": (2, 6)},
        output="mean of the patches",
    )


def first() -> Encoder:
    return _encoder("first", 0, 18)


def second() -> Encoder:
    """Other weights, and another crop of the image."""
    return _encoder("second", 1, 22)


class Plain(nn.Module):
    """One linear layer on 48 colours: (B, 3, S, S) → (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))
