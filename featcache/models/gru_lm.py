"""`gru_lm/DIM`, a small causal language model to be trained: a GRU of DIM over vectors of a quarter of that, and a head behind it.

Its embedding is the mean of its states. `distill fit --method next_token` trains it alone, `--method okd` from a teacher.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from featcache.models import Features, Field, Model, Variant
from featcache.models._language import language_features, language_fields
from featcache.models._texts import TextStudent, pooled, recorded_texts, trained_here, width_of


class GruLM(nn.Module):
    """Token ids (B, L), −1 behind the end of each text → the mean of the states (B, DIM)."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        narrow = -(-width // 4)
        self.vectors = nn.Embedding(vocabulary, narrow)
        self.recurrent = nn.GRU(narrow, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def states(self, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch length d"]:
        found: Tensor = self.recurrent(self.vectors(ids.clamp(min=0)))[0]
        return found

    def forward(self, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch d"]:
        return pooled(self.states(ids), ids >= 0, "mean")


class LanguageStudent(TextStudent):
    """A `GruLM` and all that a language model gives."""

    network: GruLM

    @property
    def token_head(self) -> nn.Linear:
        return self.network.head

    @property
    def own_fields(self) -> Mapping[str, Field]:
        head = self.token_head
        fields = language_fields(self.input.max_length, head.in_features, head.out_features)
        return {name: field for name, field in fields.items() if name != "embedding"}

    def forward(self, images: Int64[Tensor, "batch length"]) -> Features:
        hidden = self.network.states(images)
        return language_features(hidden, self.token_head(hidden), images, "mean")


def open_model(rest: str) -> Model:
    raise trained_here(f"gru_lm/{rest}")


def make_model(rest: str, variant: Variant) -> LanguageStudent:
    variant.refuse_all_but_size(f"gru_lm/{rest}")
    texts, width = variant.of_texts(f"gru_lm/{rest}"), width_of("gru_lm", rest)
    made = {"vocabulary": texts.vocabulary}
    return LanguageStudent(f"gru_lm/{width}", GruLM(texts.vocabulary, width), texts, made)


def rebuild_model(rest: str, record: Mapping[str, Any]) -> LanguageStudent:
    width, (texts, vocabulary) = width_of("gru_lm", rest), recorded_texts(record)
    return LanguageStudent(f"gru_lm/{width}", GruLM(vocabulary, width), texts, {"vocabulary": vocabulary})
