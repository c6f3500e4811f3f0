"""EGA (Ma et al. 2022, arXiv 2211.13264): the student's graph of a batch laid on the teacher's."""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.methods import Batch, Features, Method, Preparing
from distill.methods._options import refuse_negative
from distill.objectives import ce, cosines, gathered, relation_fro
from featcache.rows import Rows
from featcache.store.layout import EMBEDDING, LOGITS


class EGA(Method):
    """Embedding graph alignment: correlations within and across two embedded batches (EGA, arXiv 2211.13264).

    With X_t and X_s the batch as both heads embed it, and r Pearson's correlation over the features of two samples,

        L = CE(y, s) + β (w_n L_node + w_e L_edge)
        L_node = ‖r(X_t, X_s) − I‖_F        L_edge = ‖r(X_t, X_t) − r(X_s, X_s)‖_F

    Norms are of the whole batch, neither squared nor divided by its size: β suits one batch size. Teacher and student see
    views that are drawn apart, so a store needs two or more.

    A row's weight counts in every term: the cross-entropies are weighted means; in both norms a pair counts w_i w_j, weights
    relative to their mean in the batch (`relation_fro`), so that β means the same whatever they are.

    Heads: Linear on the teacher's side, fed by "teacher_ce" alone, the cross-entropy of a classifier of its own; no
    gradient of node or edge reaches it. Linear on the student's side, fed by node and edge. Both are left behind. In the
    authors' code the student's classifier reads that head; here it reads the embedding, which is what stays.
    Theirs trains the teacher's head at a learning rate of its own (0.01, the student's is 0.05); here all have one.

    Terms: "ce", "teacher_ce", "node", "edge".

    Options:
        beta: β. The paper's is 1, with batches of 64 and 240 epochs; in short runs that drowns the cross-entropy (trials on
            CIFAR-10: accuracy 0.48 where ce alone has 0.55 and β = 0.02 too). Choose it on held-out rows.
        node, edge: w_n and w_e; 0 leaves a term out. The authors' command line; their script has w_e = 0.3.
        dim: of both heads' output, the student's own width when 0.
    """

    student_fields = (EMBEDDING, LOGITS)
    pairing = "independent"
    classifier = True
    labelled = True

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        beta: float = 0.02,
        node: float = 0.8,
        edge: float = 0.24,
        dim: int = 0,
    ):
        super().__init__()
        refuse_negative(node=node, edge=edge, dim=dim)
        if not (beta > 0 and node + edge > 0):
            raise ValueError(
                f"beta {beta}, node {node}, edge {edge}: nothing is left of the teacher; that is method ce"
            )
        self._node, self._edge = beta * node, beta * edge
        self.teacher_head = nn.Linear(teacher_dim, dim or student_dim)
        self.student_head = nn.Linear(student_dim, dim or student_dim)
        self.teacher_classifier: nn.Linear | None = None

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Make the classifier of the teacher's head, as wide as there are classes."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(given["seed"])
            self.teacher_classifier = nn.Linear(self.teacher_head.out_features, len(rows.classes))
        return {}

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        assert self.teacher_classifier is not None, "prepare comes before loss"
        of_teacher = self.teacher_head(batch[EMBEDDING])
        terms = {
            "ce": ce(student[LOGITS], batch.label, batch.weight),
            "teacher_ce": ce(self.teacher_classifier(of_teacher), batch.label, batch.weight),
        }
        teacher, output = gathered(of_teacher.detach()), gathered(self.student_head(student[EMBEDDING]))
        weight = gathered(batch.weight)
        if self._node:
            between = correlations(teacher, output)
            terms["node"] = self._node * relation_fro(torch.eye(len(between), device=between.device), between, weight)
        if self._edge:
            within = correlations(teacher, teacher), correlations(output, output)
            terms["edge"] = self._edge * relation_fro(*within, weight)
        return terms


def correlations(rows: Float[Tensor, "n d"], columns: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Pearson's, of every row with every column over their features, −1…1."""
    return cosines(rows - rows.mean(dim=1, keepdim=True), columns - columns.mean(dim=1, keepdim=True))
