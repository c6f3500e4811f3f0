"""What language models give of a text: hidden states, the logits of the next token, and how well they foretell it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from featcache.models import Features, Field
from featcache.models._texts import TextStudent, pooled
from featcache.store.layout import EMBEDDING, HIDDEN, LENGTH, TOKEN_LOGITS

NLL, PREDICTED, TOKEN_NLL = "nll", "predicted", "token_nll"
GIVES = "hidden: what the head reads; token_logits: of the next token; nll: nats a token, mean over the `predicted` tokens that follow another"
"""The fields, in words."""


class Speaker(nn.Module, ABC):
    """A network to be trained: token ids (B, L), −1 behind the end of each text → the mean of its hidden states (B, D)."""

    @property
    @abstractmethod
    def token_head(self) -> nn.Linear:
        """What reads the hidden states."""

    @abstractmethod
    def states(self, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch length d"]:
        """The hidden states; of those of a text, each follows from no later token."""

    def forward(self, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch d"]:
        return pooled(self.states(ids), ids >= 0, "mean")


class LanguageStudent(TextStudent):
    """A language model to be trained, and all that it gives."""

    network: Speaker

    @property
    def token_head(self) -> nn.Linear:
        return self.network.token_head

    @property
    def own_fields(self) -> Mapping[str, Field]:
        head = self.token_head
        fields = language_fields(self.input.max_length, head.in_features, head.out_features)
        return {name: field for name, field in fields.items() if name != EMBEDDING}

    def forward(self, images: Int64[Tensor, "batch length"]) -> Features:
        hidden = self.network.states(images)
        return language_features(hidden, self.token_head(hidden), images, "mean")


def language_fields(length: int, width: int, vocabulary: int) -> dict[str, Field]:
    """Of texts of up to `length` tokens, hidden states of `width`."""
    return {
        EMBEDDING: Field((width,)),
        HIDDEN: Field((length, width)),
        LENGTH: Field((), "int32"),
        TOKEN_LOGITS: Field((length, vocabulary)),
        NLL: Field((), "float32"),
        PREDICTED: Field((), "int32"),
        TOKEN_NLL: Field((length,), "float32"),
    }


def language_features(
    hidden: Float[Tensor, "batch length d"],
    logits: Float[Tensor, "batch length tokens"],
    ids: Int64[Tensor, "batch length"],
    pool: str,
) -> Features:
    """The fields above of token ids, −1 behind the end of each text; zeros there.

    `token_nll` stands at the token that is foretold, so the first of a text has none, and is 0. `nll` of a text of one token is 0,
    and `predicted` too.
    """
    known = ids >= 0
    follows = known[:, 1:]
    log_p = logits[:, :-1].float().log_softmax(dim=-1)
    told = -log_p.gather(2, ids[:, 1:].clamp(min=0)[..., None])[..., 0].where(follows, 0.0)
    predicted = follows.sum(1)
    return {
        EMBEDDING: pooled(hidden, known, pool),
        HIDDEN: hidden.masked_fill(~known[..., None], 0.0),
        LENGTH: known.sum(1).int(),
        TOKEN_LOGITS: logits.masked_fill(~known[..., None], 0.0),
        NLL: told.sum(1) / predicted.clamp(min=1),
        PREDICTED: predicted.int(),
        TOKEN_NLL: torch.cat([told.new_zeros(len(told), 1), told], dim=1),
    }


def refuse_other_head(spec: str, features: Features, head: nn.Module | None) -> None:
    """Raises ValueError unless the logits are what this head makes of the hidden states: then the states are all that is to be kept."""
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{spec}: has no linear layer that reads its hidden states; give a causal language model that has"
        )
    if not torch.allclose(head(features[HIDDEN]), features[TOKEN_LOGITS], rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{spec}: its logits are not what its last layer makes of its last hidden states (scaled, or capped, as Gemma's are); "
            "give a model without that, or `transformers/` for its embeddings"
        )
