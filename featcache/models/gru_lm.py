"""`gru_lm/DIM`, a small causal language model to be trained: a GRU of DIM over vectors of a quarter of that, and a head behind it.

Its embedding is the mean of its states. `distill fit --method next_token` trains it alone, `--method okd` from a teacher.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from featcache.models import Model, Variant
from featcache.models._language import LanguageStudent, Speaker
from featcache.models._texts import recorded_texts, trained_here, width_of


class GruLM(Speaker):
    """A GRU, and a linear layer that reads its states."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        narrow = -(-width // 4)
        self.vectors = nn.Embedding(vocabulary, narrow)
        self.recurrent = nn.GRU(narrow, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    @property
    def token_head(self) -> nn.Linear:
        return self.head

    def states(self, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch length d"]:
        found: Tensor = self.recurrent(self.vectors(ids.clamp(min=0)))[0]
        return found


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
