"""`gru/DIM`, a student of texts to be trained: a GRU over its tokens' vectors of DIM numbers; the mean of its states, and a layer
behind it. What lies behind a text's end changes no state before it."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from featcache.models import Model, Variant
from featcache.models._texts import TextStudent, pooled, recorded_texts, trained_here, width_of


class Gru(nn.Module):
    """Token ids (B, L), −1 behind the end of each text → (B, width)."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.vectors = nn.Embedding(vocabulary, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.last = nn.Linear(width, width)

    def forward(self, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch width"]:
        states, _ = self.recurrent(self.vectors(ids.clamp(min=0)))
        found: Tensor = self.last(pooled(states, ids >= 0, "mean"))
        return found


def open_model(rest: str) -> Model:
    raise trained_here(f"gru/{rest}")


def make_model(rest: str, variant: Variant) -> TextStudent:
    variant.refuse_all_but_size(f"gru/{rest}")
    texts, width = variant.of_texts(f"gru/{rest}"), width_of("gru", rest)
    return TextStudent(f"gru/{width}", Gru(texts.vocabulary, width), texts, {"vocabulary": texts.vocabulary})


def rebuild_model(rest: str, record: Mapping[str, Any]) -> TextStudent:
    width, (texts, vocabulary) = width_of("gru", rest), recorded_texts(record)
    return TextStudent(f"gru/{width}", Gru(vocabulary, width), texts, {"vocabulary": vocabulary})
