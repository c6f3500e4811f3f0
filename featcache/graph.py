"""An encoder as an ONNX graph, from normalised images or, with the preprocessing inside, from images as they are."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from featcache.inputs.images import Preprocess


class Preprocessed(nn.Module):
    """An encoder of plain images: the resize, crop and normalisation of its plain view, then the encoder.

    The resampling is Pillow's: an antialiasing filter, first along rows, then along columns, each rounded to whole levels.
    """

    def __init__(self, encoder: nn.Module, preprocess: Preprocess):
        super().__init__()
        self.encoder, self._preprocess = encoder, preprocess
        self._mean, self._std = (
            torch.tensor(each).mul(255).view(3, 1, 1) for each in (preprocess.mean, preprocess.std)
        )

    def forward(self, pixels: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch ..."] | tuple[Tensor, ...]:
        images = self.square(pixels.permute(0, 3, 1, 2).float())
        return self.encoder((images - self._mean) / self._std)

    def square(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 size size"]:
        """The plain view, in whole levels 0…255."""
        height, width = (torch.ones((), dtype=torch.int64) * side for side in images.shape[2:])
        tall, down = self._resampling(torch.arange(images.shape[2]), height, width)
        wide, across = self._resampling(torch.arange(images.shape[3]), width, height)
        rows_first = _rounded(down @ _rounded(images @ across.T))
        columns_first = _rounded(_rounded(down @ images) @ across.T)
        # As Pillow decides since version 13.
        by_columns = (height > tall) & (height - tall > 2 * (width - wide))
        return torch.where(by_columns, columns_first, rows_first)

    def _resampling(self, positions: Tensor, side: Tensor, other: Tensor) -> tuple[Tensor, Float[Tensor, "size side"]]:
        """One side of the image: its length once resampled, before any crop, and how much each of its pixels counts in
        each pixel of the square."""
        like = self._preprocess
        resized = torch.full_like(side, like.resize)
        if like.mode != "squash":  # the shorter side; the longer one is rounded down, as torchvision does
            resized = torch.maximum(resized, like.resize * side // other)
        start = torch.round((resized - like.crop).double() / 2)  # half to even, as Python's
        scale = like.crop * side.double() / (resized * like.size)
        left = start * side / resized
        steps = torch.arange(like.size).double()
        made = resized if like.size == like.crop else torch.full_like(side, like.size)
        if like.interpolation == "nearest":
            # Pillow adds up its steps, in double precision.
            centre = torch.cat([(left + 0.5 * scale)[None], scale.expand(like.size - 1)]).cumsum(0)
            return made, (positions == centre.floor()[:, None]).float()
        centre = left + (steps + 0.5) * scale
        distance = ((positions + 0.5 - centre[:, None]) / scale.clamp(min=1)).abs()
        weights = _FILTERS[like.interpolation](distance)
        return made, (weights / weights.sum(1, keepdim=True)).float()


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x).clamp(min=0)


def _bicubic(x: Tensor) -> Tensor:
    """Keys 1981 with a = −1/2."""
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _lanczos(x: Tensor) -> Tensor:
    """sinc(x) sinc(x / 3) for |x| < 3."""
    angle = math.pi * x.clamp(min=1e-9)
    return torch.where(x < 3, 3 * torch.sin(angle) * torch.sin(angle / 3) / angle**2, torch.zeros_like(x))


_FILTERS = {"bilinear": _bilinear, "bicubic": _bicubic, "lanczos": _lanczos}


def _rounded(levels: Tensor) -> Tensor:
    return (levels + 0.5).floor().clamp(0, 255)


def pixels(count: int, height: int, width: int) -> UInt8[Tensor, "count height width 3"]:
    """Images with large shapes, edges and some grain, as photographs have; always the same."""
    generator = torch.Generator().manual_seed(count)
    sides = (height, width)
    shapes = nn.functional.interpolate(torch.rand(count, 3, 5, 5, generator=generator), sides, mode="bicubic")
    edges = nn.functional.interpolate(torch.rand(count, 3, 3, 3, generator=generator), sides, mode="nearest")
    grain = torch.rand(count, 3, *sides, generator=generator)
    levels = (0.6 * shapes + 0.3 * edges + 0.1 * grain).clamp(0, 1) * 255
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def refuse_missing_onnx() -> None:
    """Raises ValueError where a package of the extra `onnx` is missing."""
    try:
        import onnx  # noqa: F401  `describe` needs it
        import onnxruntime  # noqa: F401  what was written is tried with it
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ValueError(f"exporting to ONNX needs {error.name}; pip install 'featcache[onnx]'") from None


def write_graph(
    file: Path, model: nn.Module, preprocess: Preprocess, gives: Sequence[str], *, with_preprocessing: bool
) -> str:
    """Write a model as an ONNX file, of any batch size; returns what its input is, in words.

    Args:
        model: from normalised images (batch, 3, S, S) to one tensor, or a tuple of them.
        preprocess: put inside `with_preprocessing`: the graph's input is then `pixels`, uint8 (batch, height, width, 3) of
            any size, else `images`, as the model's.
        gives: names of the outputs.

    Raises:
        ValueError: the packages of the extra `onnx` are missing.
    """
    refuse_missing_onnx()
    size, name = preprocess.size, "pixels" if with_preprocessing else "images"
    if with_preprocessing:
        model = Preprocessed(model, preprocess)
        example, sides = torch.zeros(2, 3 * size, 2 * size, 3, dtype=torch.uint8), {1: "height", 2: "width"}
        takes = "pixels: uint8 (batch, height, width, 3), RGB, upright, of any size"
    else:
        example, sides = torch.zeros(2, 3, size, size), {}
        takes = f"images: float32 (batch, 3, {size}, {size}), RGB scaled to 0…1, minus mean, over std"
    program = torch.onnx.export(
        model.eval(),
        (example,),
        dynamo=True,
        input_names=[name],
        output_names=list(gives),
        dynamic_shapes=({0: "batch", **sides},),
        verbose=False,
    )
    assert program is not None
    program.save(str(file), external_data=False)
    return takes


def describe(file: Path, said: Mapping[str, str]) -> None:
    """Give an ONNX file these words about itself, and no others."""
    import onnx

    written = onnx.load(file)
    onnx.helper.set_model_props(written, dict(said))
    onnx.save(written, file)
