"""The next token: what a language model is asked at every position of a text, and where there is an answer."""

from dataclasses import replace
from typing import NamedTuple

from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from distill.methods import Batch


class Asked(NamedTuple):
    """Of every position but the last of each text, in one row after the other.

    Attributes:
        token: the token that follows; −1 where none does, and such positions count for nothing.
        weight: that of the text, 0 where no token follows.
    """

    token: Int64[Tensor, " n"]
    weight: Float[Tensor, " n"]

    @property
    def known(self) -> Bool[Tensor, " n"]:
        return self.token >= 0

    def answers(self, values: Float[Tensor, "b t d"]) -> Float[Tensor, "n d"]:
        """What a model gives at these positions; zeros, without a gradient, where no token follows, whatever stands there."""
        return values[:, :-1].flatten(0, 1).masked_fill(~self.known[:, None], 0.0)


def shared(batch: Batch, hidden: Float[Tensor, "b t d"]) -> tuple[Batch, Float[Tensor, "b u d"]]:
    """Texts and hidden states as far as both go: either may be cut where no text of the batch is longer, or where its length ends."""
    width = min(batch.inputs.shape[1], hidden.shape[1])
    return replace(batch, inputs=batch.inputs[:, :width]), hidden[:, :width]


def asked(batch: Batch, length: Int[Tensor, " b"] | None = None) -> Asked:
    """Of a batch of texts as the student takes them: token ids (B, T), −1 behind the end.

    Args:
        length: positions that the teacher saw, where they may be fewer.
    """
    token = batch.inputs[:, 1:]
    if length is not None:
        token = token.masked_fill(_positions(token) >= length[:, None], -1)
    token = token.flatten()
    weight = batch.weight.repeat_interleave(batch.inputs.shape[1] - 1)
    return Asked(token, weight * (token >= 0))


def _positions(token: Int64[Tensor, "b u"]) -> Int64[Tensor, "b u"]:
    """Of each token in its text, from 1."""
    return token.new_ones(token.shape).cumsum(dim=1)
