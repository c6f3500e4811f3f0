"""Students whose weights lie in memory as they should not, for `odd_students:NAME`; (B, 3, 16, 16) → (B, 8)."""

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """One weight in two layers, both of the convolutions and of the linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.shrink, self.mix, self.again = nn.Linear(48, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.again.weight = self.mix.weight

    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(self.first(images).relu())
        rows = nn.functional.adaptive_avg_pool2d(maps, 4).flatten(1)
        return self.again(self.mix(self.shrink(rows)).relu())


class Shared(nn.Module):
    """Buffers and weights that are parts of one tensor, and a weight that is stored by columns."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.linspace(0.5, 1.5, 16)
        self.register_buffer("scale", both[:8])
        self.register_buffer("shift", both[8:])
        self.register_buffer("same", both[:8])
        self.weight = nn.Parameter(torch.randn(48, 8).T)
        biases = torch.zeros(2, 8)
        self.bias, self.other = nn.Parameter(biases[0]), nn.Parameter(biases[1])

    def forward(self, images: Tensor) -> Tensor:
        rows = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return (rows @ self.weight.T + self.bias + self.other) * self.scale + self.shift * self.same


class Plain(nn.Module):
    """One linear layer on 48 colours: a step takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))


class Fails(nn.Module):
    """Takes two images, and no batch of training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 2:
            raise RuntimeError("out of memory, say")
        return self.linear(images.flatten(1)[:, :8])
