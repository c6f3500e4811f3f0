"""`bag/DIM`, a student of texts to be trained: the mean of its tokens' vectors of DIM numbers, and two layers behind it."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from featcache.models import Model, Variant
from featcache.models._texts import TextStudent, pooled, recorded_texts, trained_here, width_of


class Bag(nn.Module):
    """Token ids (B, L), −1 behind the end of each text → (B, width)."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.vectors = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch width"]:
        found: Tensor = self.layers(pooled(self.vectors(ids.clamp(min=0)), ids >= 0, "mean"))
        return found


def open_model(rest: str) -> Model:
    raise trained_here(f"bag/{rest}")


def make_model(rest: str, variant: Variant) -> TextStudent:
    variant.refuse_all_but_size(f"bag/{rest}")
    texts, width = variant.of_texts(f"bag/{rest}"), width_of("bag", rest)
    return TextStudent(f"bag/{width}", Bag(texts.vocabulary, width), texts, {"vocabulary": texts.vocabulary})


def rebuild_model(rest: str, record: Mapping[str, Any]) -> TextStudent:
    width, (texts, vocabulary) = width_of("bag", rest), recorded_texts(record)
    return TextStudent(f"bag/{width}", Bag(vocabulary, width), texts, {"vocabulary": vocabulary})
