"""A tiny encoder for tests."""

import hashlib

import torch
from torch import nn

from featcache.encoder import Encoder
from featcache.inputs.images import Preprocess


class TinyModule(nn.Module):
    """One convolution and a head; remembers how many images it saw and a hash of each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, 4)
        self.head = nn.Linear(6, 3)
        self.calls = 0
        self.seen: list[str] = []

    def forward(self, images):
        self.calls += 1
        self.seen += dict.fromkeys(map(hash_of, images))  # a pass is filled up with one of its images
        feature_map = self.conv(images).relu()
        embedding = feature_map.mean((2, 3)) + 0.1
        tokens = feature_map.flatten(2).transpose(1, 2)
        return {"embedding": embedding, "logits": self.head(embedding), "tokens": tokens}


def hash_of(image: torch.Tensor) -> str:
    """Of one normalised image; the same however it lies in memory."""
    return hashlib.sha256(image.detach().float().contiguous().numpy().tobytes()).hexdigest()


def tiny_encoder(weights: int = 0, resize: int = 18) -> Encoder:
    """16 px, 6-dimensional embedding, 3 logits, 16 tokens; `weights` seeds them."""
    with torch.random.fork_rng():
        torch.manual_seed(weights)
        module = TinyModule()
    return Encoder(
        name="tiny",
        module=module,
        preprocess=Preprocess(resize=resize, crop=16, size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)),
        fields={"embedding": (6,), "logits": (3,), "tokens": (16, 6)},
        output="mean pool",
    )


class PatchModule(nn.Module):
    """One number for each patch of 8 px and channel; remembers a hash of each image it saw."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 8, 8)
        self.seen: list[str] = []

    def forward(self, images):
        self.seen += dict.fromkeys(map(hash_of, images))  # a pass is filled up with one of its images
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        embedding = tokens.mean(1) + 0.1
        return {"embedding": embedding, "tokens": tokens, "prefix_tokens": torch.stack([embedding, -embedding], 1)}


def patch_encoder(width: int = 6, size: int = 16, weights: int = 0) -> Encoder:
    """`size` px, embedding and tokens of `width`, a token for each 8 px square, 2 prefix tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(weights)
        module = PatchModule(width)
    return Encoder(
        name=f"patches{width}",
        module=module,
        preprocess=Preprocess(resize=size + 2, crop=size, size=size),
        fields={"embedding": (width,), "tokens": ((size // 8) ** 2, width), "prefix_tokens": (2, width)},
        output="mean of the patches",
    )
