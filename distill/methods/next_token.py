"""Next tokens alone, without a teacher: how a language model is trained, and what okd is compared with."""

from torch import Tensor

from distill.methods import Batch, Features, Method
from distill.methods._next_token import asked
from distill.objectives import ce
from featcache.store.layout import EMBEDDING, TOKEN_LOGITS


class NextToken(Method):
    """Cross-entropy of a language model with the next token of its own input; the teacher is not asked.

    Term: "ce", in nats a token, mean over all tokens of the batch that follow another, each counted as its text's weight says; of
    a tokeniser of bytes, nats a byte. What stands behind a text's end counts for nothing. Of the store come the texts and which
    rows there are.
    """

    student_fields = (EMBEDDING, TOKEN_LOGITS)
    kinds = ("text",)

    def __init__(self, teacher_dim: int, student_dim: int):
        super().__init__()

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        next_token = asked(batch)
        return {"ce": ce(next_token.answers(student[TOKEN_LOGITS]), next_token.token, next_token.weight)}
