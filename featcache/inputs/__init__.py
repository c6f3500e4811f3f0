"""Inputs, one file a kind: how a sample becomes what a model takes.

A plugin has `open_input(record) -> Input`, from what the manifest of a store records. Nothing here imports PyTorch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from featcache.plugins import load_plugin

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

AUGMENTS = ("none", "flip", "rotate4", "rotate4_crop", "rrc")
BY_ID = ("rotate4_crop", "rrc")
"""Augments whose views are drawn for each sample, of its id."""
CROP_AREA = 0.35


@dataclass(frozen=True, kw_only=True)
class Views:
    """The recipe for a sample's views, which an `Input` draws.

    Attributes:
        count: views a sample. View 0 is always the encoder's plain evaluation view.
        augment: what views 1, 2, … are. "none": nothing, `count` must be 1. "flip": odd views mirror the plain view.
            "rotate4": view v turns the plain view by (v mod 4) × 90° counter-clockwise. "rotate4_crop": as that, each
            of its own crop: the plain view's square, moved by up to an eighth of its side each way, black beyond the
            image. One mirroring for all of a group of four; the first, which has the plain view, has none. "rrc":
            random resized crop (area `crop_area`…1 of the image, aspect 3/4…4/3), mirrored with probability 1/2.
        seed: changes every drawn view.
        crop_area: of "rrc", least area of a random crop, as a share of the image's, above 0 and up to 1.
    """

    count: int = 1
    augment: Literal["none", "flip", "rotate4", "rotate4_crop", "rrc"] = "none"
    seed: int = 0
    crop_area: float = CROP_AREA

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTS:
            raise ValueError(f"unknown augment {self.augment!r}; known: {', '.join(AUGMENTS)}")
        if self.count < 1 or (self.augment == "none") != (self.count == 1):
            raise ValueError(
                f"{self.count} views with augment {self.augment!r}: give --views 2 or more together with "
                "--augment flip, rotate4, rotate4_crop or rrc, or --views 1 alone"
            )
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"crop area {self.crop_area} is no share of an image; give one above 0 and up to 1")
        if self.crop_area != CROP_AREA and self.augment != "rrc":
            raise ValueError(f"crop area {self.crop_area} with augment {self.augment!r}: only --augment rrc has one")

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Views":
        """What `record` was made of; of a store's manifest, too."""
        return cls(**{each.name: record[each.name] for each in fields(cls) if each.name in record})

    @property
    def record(self) -> dict[str, Any]:
        """As the manifest holds it. Without `crop_area` where it is the usual one, so that stores from before there
        was a choice are still of the same recipe."""
        record = asdict(self)
        if self.crop_area == CROP_AREA:
            del record["crop_area"]
        return record


@runtime_checkable
class ViewParameters(Protocol):
    """A drawn view: what `Input.render` does to a sample."""

    @property
    def parameters(self) -> tuple[float, ...]:
        """A row of the store's `view` array."""


Item = TypeVar("Item")
OneView = TypeVar("OneView", bound=ViewParameters)


class Input(ABC, Generic[Item, OneView]):
    """How a sample becomes what a model takes: frozen, hashable (models with equal inputs share what is rendered), in
    the manifest of every store, part of an encoder's fingerprint.

    Attributes:
        kind: of corpora whose samples it takes.
        augments: those of `Views` that it can draw.
        parameters: columns of the store's `view` array.
        alike: whether all that it renders goes through a model in one shape. Where not, `width` says which samples may share
            a forward pass.
    """

    kind: ClassVar[str]
    alike: ClassVar[bool] = True
    augments: ClassVar[tuple[str, ...]] = ("none",)
    parameters: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    @abstractmethod
    def decode(encoded: bytes, *, seen: bool = False) -> Item:
        """A sample's bytes → the sample; the same for all inputs of a kind.

        Args:
            seen: a teacher has decoded it: no limit of its size is asked for.

        Raises:
            Exception: it is none; the message says what is wrong.
        """

    @abstractmethod
    def size_of(self, item: Item) -> tuple[int, int]:
        """What `draw` needs to know of a sample: of images (width, height) in px, which a store keeps too; of texts (tokens
        of the whole text, 1)."""

    @abstractmethod
    def draw(self, size: tuple[int, int], views: Views, sample_id: str, view: int) -> OneView:
        """The view numbered `view` of a sample of that size: a pure function of these and nothing else, so any process,
        in any order, on any machine, in either stage, renders the same."""

    @abstractmethod
    def render(self, item: Item, view: OneView, size: tuple[int, int] | None = None) -> Shaped[np.ndarray, "..."]:
        """What is sent to the device.

        Args:
            size: that the view was drawn for, where `item` is a smaller copy of that sample.
        """

    @abstractmethod
    def to_model(self, rendered: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "batch ..."]:
        """A batch of what `render` gives, on the device → what the model takes."""

    @abstractmethod
    def blank(self, count: int) -> Shaped[Tensor, "count ..."]:
        """What `render` gives of so many samples in which nothing is to be seen, for trying a model: black images."""

    def trimmed(self, rendered: Shaped[np.ndarray, "n ..."]) -> Shaped[np.ndarray, "n ..."]:
        """The same samples without what none of them needs: of texts, as wide as the longest."""
        return rendered

    def width(self, parameters: Sequence[float]) -> int:
        """How much of what `render` gives goes through a model, by a row of the store's `view` array: a sample shares forward
        passes with those of the same width alone, and it depends on nothing but the sample. Of images all: 0."""
        return 0

    def by_width(
        self, rendered: Shaped[Tensor, "n ..."]
    ) -> Iterator[tuple[Shaped[Tensor, " m"] | slice, Shaped[Tensor, "m ..."]]]:
        """Which samples go through a model together, and what of each goes; of images all of all."""
        yield slice(None), rendered

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """As the manifest holds it; of any kind but images with "input", the name of its plugin."""


def input_of(record: Mapping[str, Any]) -> Input[Any, Any]:
    """The input that a manifest or `student.json` records.

    Raises:
        ValueError: no such kind of input, or it is damaged.
    """
    found: Input[Any, Any] = load_plugin("featcache.inputs", record.get("input", "images")).open_input(record)
    return found
