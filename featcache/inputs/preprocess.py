"""The explicit record of how an image becomes an encoder's input."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize, centre crop and normalisation of one encoder; stored in the manifest and part of its fingerprint.

    Attributes:
        resize: length in px that the shorter side is resized to ("shortest"), or that both sides are
            resized to without keeping the aspect ratio ("squash").
        crop: side in px of the centre square then cut out; `crop <= resize`.
        size: side in px at which that square is rendered. Equal to `crop` for a teacher; a student that
            works at another resolution keeps the teacher's square and changes only this.
        interpolation: Pillow filter, always with antialiasing.
        mode: "shortest" or "squash".
        mean, std: per channel (RGB), applied to pixels scaled to 0…1.
    """

    resize: int
    crop: int
    size: int
    interpolation: str = "bicubic"
    mode: Literal["shortest", "squash"] = "shortest"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize or self.size <= 0:
            raise ValueError(f"need 0 < crop <= resize and size > 0 px, got {self}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is not one of {', '.join(INTERPOLATIONS)}")
        if self.mode not in ("shortest", "squash"):
            raise ValueError(f"resize mode {self.mode!r} is not 'shortest' or 'squash'")

    def __str__(self) -> str:
        """In words, on one line."""
        how = "both sides" if self.mode == "squash" else "the shorter side"
        rendered = f", rendered at {self.size}" if self.size != self.crop else ""
        mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{how} to {self.resize} px ({self.interpolation}), centre {self.crop} px{rendered}, mean {mean}, std {std}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Preprocess":
        return cls(**{**record, "mean": tuple(record["mean"]), "std": tuple(record["std"])})
