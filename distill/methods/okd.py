"""OKD (Rao et al. 2024, arXiv 2409.12512): a language model from another's cached hidden states, with a module that learns too."""

from typing import Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from distill.methods import Batch, Features, Method, Preparing
from distill.methods._next_token import asked, shared
from distill.methods._options import refuse_negative, refuse_not_positive
from distill.objectives import ce, kl
from featcache.rows import Rows
from featcache.store.layout import EMBEDDING, HIDDEN, LENGTH, TOKEN_LOGITS


class OKD(Method):
    """Next tokens from a teacher's hidden states, through an online module that learns of the student (OKD, arXiv 2409.12512).

    The paper's idea: small modules in the teacher train together with the student, so that the teacher comes to meet it, and
    nothing is sampled from the student. Its formulas, and where the modules stand, are not public; this is a working form whose
    teacher is a cache. With h the hidden states that the teacher's head reads, φ(h) = W₂ gelu(W₁ h) and q the student,

        p = head(h + φ(h))
        student:  (1 − λ) CE(y, q) + λ KL(sg[p] ‖ q)            φ:  CE(y, p) + μ KL(sg[q] ‖ p)

    y being the next token, sg no gradient. Modules inside the teacher's blocks would need it alive at every step. All terms are in
    nats a token, means over all tokens of the batch that follow another, each counted as its text's weight says; what stands behind a text's
    end is not read. Terms: "ce", "kl"; "module_ce", "module_kl".

    Needs stores with `hidden` and `length` of a causal language model, its head (`--set head=FILE`, which `featcache extract`
    writes beside such a store), and a student of the same tokeniser. The head is frozen; φ is left behind. Of stores that keep the
    largest logits alone, p is those, and what is left is spread evenly (`source`).

    Options:
        online: with φ. Without, the teacher is the frozen cache: KD of sequences, forward or reverse.
        direction: of the student's term, "forward" KL(p ‖ q), or "reverse" KL(q ‖ p), as in MiniLLM (arXiv 2306.08543).
        lam: λ, the teacher's share. The paper's is not known; 1 leaves the tokens themselves out.
        mu: μ, of the student's feedback to φ; 0: φ hears of the tokens alone.
        bottleneck: width of φ in its middle; the paper's is not known.
        start: standard deviation of W₂ at the beginning. With 0 φ begins as nothing at all.
        source: of p: "hidden", or "token_logits" where a store has those and no hidden states; then without φ and without a head.
        temperature: of both sides of the student's term, which is multiplied by its square.
    """

    fields = (EMBEDDING, HIDDEN, LENGTH)
    student_fields = (EMBEDDING, TOKEN_LOGITS)
    kinds = ("text",)
    same_tokens = True

    head_weight: Float[Tensor, "tokens d"]
    head_bias: Float[Tensor, " tokens"]

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        online: bool = True,
        direction: str = "forward",
        lam: float = 0.5,
        mu: float = 1.0,
        bottleneck: int = 64,
        start: float = 0.0,
        source: str = HIDDEN,
        temperature: float = 1.0,
    ):
        super().__init__()
        if direction not in ("forward", "reverse"):
            raise ValueError(f"direction must be forward or reverse, got {direction!r}")
        if not 0 < lam <= 1:
            raise ValueError(f"lam must be above 0 (that is method next_token) and at most 1, got {lam}")
        if source not in (HIDDEN, TOKEN_LOGITS):
            raise ValueError(f"source must be {HIDDEN} or {TOKEN_LOGITS}, got {source!r}")
        if online and source == TOKEN_LOGITS:
            raise ValueError(f"source={TOKEN_LOGITS}: the online module needs hidden states; set online=false")
        refuse_negative(mu=mu, start=start)
        refuse_not_positive(temperature=temperature, bottleneck=bottleneck)
        self._direction, self._lam, self._mu, self._temperature = direction, lam, mu, temperature
        self.fields, self._source = (EMBEDDING, source, LENGTH), source
        self.module = OnlineModule(teacher_dim, bottleneck, start) if online else None

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Take the head.

        Raises:
            ValueError: the rows have none, or one that does not read their hidden states.
        """
        if self._source == TOKEN_LOGITS:
            return {}
        if rows.head is None:
            raise ValueError(
                f"{rows.name}: method okd needs the head that reads its hidden states; give --set head=FILE, which `featcache "
                "extract … --fields hidden,length` of a causal language model writes beside the store"
            )
        rows.require_field(HIDDEN)
        width = rows.shape_of(HIDDEN)[-1]
        if rows.head.weight.shape[1] != width:
            raise ValueError(f"{rows.head.name}: reads {rows.head.weight.shape[1]} dimensions, {HIDDEN} has {width}")
        # Not of the state: it is the teacher's, and large.
        for name, values in (("head_weight", rows.head.weight), ("head_bias", rows.head.bias)):
            self.register_buffer(name, torch.from_numpy(values.astype(np.float32)), persistent=False)
        return {}

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        texts, seen = shared(batch, batch[self._source])
        next_token = asked(texts, batch[LENGTH])
        token, weight = next_token.token, next_token.weight
        q, p = next_token.answers(student[TOKEN_LOGITS][:, : seen.shape[1]]), self._teacher(next_token.answers(seen))
        _refuse_other_vocabulary(q, p)
        terms = {"kl": self._lam * self._to_student(p.detach(), q, weight)}
        if self._lam < 1:
            terms["ce"] = (1 - self._lam) * ce(q, token, weight)
        if self.module is not None:
            terms["module_ce"] = ce(p, token, weight)
            if self._mu:
                terms["module_kl"] = self._mu * kl(q.detach(), p, weight=weight)
        return terms

    def _to_student(self, p: Tensor, q: Tensor, weight: Tensor) -> Tensor:
        t = self._temperature
        return t**2 * kl(p, q, temperature=t, direction=self._direction, weight=weight)

    def _teacher(self, seen: Float[Tensor, "n d"]) -> Float[Tensor, "n tokens"]:
        """p, of hidden states through φ and the head, or of logits as they are."""
        if self._source == TOKEN_LOGITS:
            return seen
        return F.linear(seen if self.module is None else self.module(seen), self.head_weight, self.head_bias)


def _refuse_other_vocabulary(student: Tensor, teacher: Tensor) -> None:
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"the student tells {student.shape[-1]} tokens apart, the teacher {teacher.shape[-1]}; give a student of the teacher's tokeniser"
        )


class OnlineModule(nn.Module):
    """h + φ(h), φ a bottleneck: W₂ gelu(W₁ h + b₁) + b₂; W₂ is drawn with the standard deviation `start`, b₂ is 0."""

    def __init__(self, dim: int, bottleneck: int, start: float):
        super().__init__()
        self.down, self.up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim)
        nn.init.normal_(self.up.weight, std=start)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        residual: Tensor = self.up(F.gelu(self.down(hidden)))
        return hidden + residual
