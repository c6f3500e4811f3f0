"""SSKD (Xu et al. 2020, arXiv 2006.07114): what the teacher makes of rotated images, as a task of its own."""

from collections.abc import Callable
from typing import Unpack

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from distill.methods import Batch, Features, Method, Preparing, fitted_tensors
from distill.methods._options import refuse_negative, refuse_not_positive
from distill.objectives import ce, cosines, gathered, kl
from featcache.rows import Rows
from featcache.store.layout import EMBEDDING, LOGITS

TURNS = 4
"""Views of an image in a batch: one upright, three turned."""


class SSKD(Method):
    """KD on four rotations of every image, and which image a turned one is of, as the teacher tells it (arXiv 2006.07114).

    Of images that stand in the batch upright and turned by 90°, 180° and 270°, and with a_ij the cosine of turned image i
    with upright image j behind a projection head (t: the teacher's, s: the student's),

        L = w_ce CE(y, s) + w_kd T² KL(t ‖ s)                      upright images
          + w_turned T² KL(t ‖ s)                                  turned images
          + w_relation τ² KL(softmax(a_t / τ) ‖ softmax(a_s / τ))  turned images

    A turned image whose right answer (its class; its own upright image) the teacher ranks first counts in the last two; of
    the others the given share does, those that rank it best, over the batch of all processes. Terms: "ce", "kl",
    "kl_turned", "relation_kl". Without a label there is no right class: such an image has no "ce", and counts in the rest.

    Heads: Linear, ReLU, Linear of each side's own width. The teacher's is fitted before training, from the store alone:
    cross-entropy of the cosines a_t, without a temperature, with each turned image's own upright one; SGD with momentum
    0.9 and weight decay 0.0005, a tenth of the learning rate after half and after three quarters of the epochs. The
    student's trains with it and is left behind.

    The store holds four rotations, or several such groups, of which an epoch takes one (`--views 4 --augment rotate4_crop`).
    In the paper all crops are drawn anew every epoch, and an image and its turned ones are mirrored together: here they
    are so in all groups but the first, whose upright view is the plain one.

    Options, with the authors' values:
        ce, kd, turned, relation: weights of the four terms; 0 leaves one out. With `relation` 0 no head is fitted: that is kd on
            the same views.
        kd_temperature, turned_temperature: T of the second and of the third term.
        relation_temperature: τ.
        turned_keep, relation_keep: share of the wrongly ranked images that count in the third and in the fourth term.
        head_epochs, head_lr, head_batch_size: of the teacher's head.
    """

    fields = student_fields = (EMBEDDING, LOGITS)
    pairing = "group"
    group = TURNS
    classifier = True

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        ce: float = 0.1,
        kd: float = 0.9,
        turned: float = 2.7,
        relation: float = 10.0,
        kd_temperature: float = 4.0,
        turned_temperature: float = 4.0,
        relation_temperature: float = 0.5,
        turned_keep: float = 1.0,
        relation_keep: float = 0.75,
        head_epochs: int = 60,
        head_lr: float = 0.05,
        head_batch_size: int = 64,
    ):
        super().__init__()
        self._weights = {"ce": ce, "kl": kd, "kl_turned": turned, "relation_kl": relation}
        self._temperatures = {"kd": kd_temperature, "turned": turned_temperature, "relation": relation_temperature}
        self._keep = {"turned": turned_keep, "relation": relation_keep}
        self._epochs, self._lr, self._batch_size = head_epochs, head_lr, head_batch_size
        refuse_negative(ce=ce, kd=kd, turned=turned, relation=relation)
        for name, value in self._keep.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}_keep must be a share from 0 to 1, got {value}")
        positive = {f"{name}_temperature": value for name, value in self._temperatures.items()}
        positive |= {"head_epochs": head_epochs, "head_lr": head_lr, "head_batch_size": head_batch_size}
        refuse_not_positive(**positive)
        if not kd + turned + relation > 0:
            raise ValueError("kd, turned and relation are 0: nothing is left of the teacher; that is method ce")
        self.labelled = ce > 0 or turned_keep < 1
        self.student_head = projection(student_dim) if relation else None
        self.teacher_head = frozen(projection(teacher_dim)) if relation else None

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Fit the teacher's projection head, or take the one that is fitted already.

        Returns:
            "matched": of the last epoch, share of the turned images whose nearest upright one is their own; "contrast": the
            loss, in nats.

        Raises:
            ValueError: the stores do not hold four rotations, or their features are not such that the head can be fitted.
        """
        _refuse_other_views(rows)
        if self.teacher_head is None:
            return {}
        if fitted := given.get("fitted"):
            mine = {name: value.shape for name, value in fitted_tensors(self).items()}
            if mine == {name: value.shape for name, value in fitted[0].items()}:
                self.load_state_dict(fitted[0], strict=False)
                return fitted[1]
        head, report = fit_projection(
            rows, self._epochs, self._lr, self._batch_size, given["seed"], given.get("progress")
        )
        self.teacher_head = frozen(head)
        return report

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        taught, told = split(gathered(batch[LOGITS])), split(gathered(student[LOGITS]))
        label, weight = split(gathered(batch.label)), split(gathered(batch.weight))
        terms = {"ce": ce(told[0], label[0], weight[0])}
        t = self._temperatures["kd"]
        terms["kl"] = t**2 * kl(taught[0], told[0], temperature=t, weight=weight[0])
        t = self._temperatures["turned"]
        rank = torch.where(label[1] < 0, 0, rank_of(taught[1], label[1].clamp(min=0)))
        counted = weight[1] * kept(rank, self._keep["turned"])
        terms["kl_turned"] = t**2 * kl(taught[1], told[1], temperature=t, weight=counted)
        if self.teacher_head is not None and self.student_head is not None:
            t = self._temperatures["relation"]
            taught_a, told_a = (
                similarities(gathered(head(of[EMBEDDING])))
                for head, of in ((self.teacher_head, batch), (self.student_head, student))
            )
            counted = weight[1] * kept(rank_of(taught_a, own(taught_a)), self._keep["relation"])
            terms["relation_kl"] = t**2 * kl(taught_a, told_a, temperature=t, weight=counted)
        return {name: self._weights[name] * term for name, term in terms.items() if self._weights[name]}


def projection(dim: int) -> nn.Sequential:
    """The paper's head, of the width of what goes in."""
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))


def frozen(head: nn.Sequential) -> nn.Sequential:
    """The head, its weights buffers from now on."""
    for layer in head:
        for name, weight in list(layer.named_parameters()):
            delattr(layer, name)
            layer.register_buffer(name, weight.detach())
    return head


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(4n, …) → the upright ones (n, …), and the turned ones (3n, …), image after image."""
    images = rows.unflatten(0, (-1, TURNS))
    return images[:, 0], images[:, 1:].flatten(0, 1)


def similarities(projected: Float[Tensor, "m d"]) -> Float[Tensor, "r n"]:
    """Cosine of every turned image with every upright one, of m = 4n images."""
    upright, turned = split(projected)
    return cosines(turned, upright)


def own(table: Float[Tensor, "r n"]) -> Int64[Tensor, " r"]:
    """Of each turned image, the column of its own upright one."""
    rows, columns = table.shape
    return torch.arange(columns, device=table.device).repeat_interleave(rows // columns)


def rank_of(table: Float[Tensor, "r n"], right: Int64[Tensor, " r"]) -> Int64[Tensor, " r"]:
    """How many columns are above the right one, in each row: 0 where it is the highest."""
    return (table > table.gather(1, right[:, None])).sum(dim=1)


def kept(rank: Int64[Tensor, " r"], share: float) -> Float[Tensor, " r"]:
    """1 for the rows of rank 0 and for so large a share of the others, rounded down, those of the lowest ranks; else 0.
    Of equal ranks the first come first."""
    place = rank.argsort(stable=True).argsort()
    wrong = (rank > 0).sum()
    return (place < len(rank) - wrong + (share * wrong.double()).floor()).float()


def fit_projection(
    rows: Rows, epochs: int, lr: float, batch_size: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> tuple[nn.Sequential, dict[str, float]]:
    """The teacher's head, fitted to tell whose rotation each turned image is, and what `SSKD.prepare` reports of it.

    Args:
        epochs: passes over the rows, each in one of its groups of four views; the last, short batch is left out.
        batch_size: images, each in four views.
        progress: called with (steps done, steps).

    Raises:
        ValueError: fewer than two rows, or the loss became infinite or NaN.
    """
    if len(rows) < 2:
        raise ValueError(f"{rows.name}: has one usable row, and the head of sskd tells images apart; give more images")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        head = projection(rows.embedding_dim)
    drawn, steps = np.random.default_rng(seed), max(1, len(rows) // batch_size)
    descent = torch.optim.SGD(head.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(descent, [steps * epochs // 2, steps * epochs * 3 // 4])
    for epoch in range(epochs):
        order, first = drawn.permutation(len(rows)), TURNS * drawn.integers(rows.view_counts // TURNS)
        found = torch.zeros(2, dtype=torch.float64)
        for step in range(steps):
            batch = order[step * batch_size : (step + 1) * batch_size]
            views = np.add.outer(first[batch], np.arange(TURNS)).ravel()
            features = torch.from_numpy(rows.gather(np.repeat(batch, TURNS), EMBEDDING, views)).float()
            table = similarities(head(features))
            loss = ce(table, own(table))
            descent.zero_grad()
            loss.backward()
            descent.step()
            schedule.step()
            found += torch.stack([(rank_of(table, own(table)) == 0).double().mean(), loss.detach().double()]) / steps
            if progress:
                progress(epoch * steps + step + 1, epochs * steps)
    if not found.isfinite().all():
        raise ValueError(f"{rows.name}: the head of sskd cannot be fitted to its features at head_lr={lr}; lower it")
    return head, {"matched": float(found[0]), "contrast": float(found[1])}


def _refuse_other_views(rows: Rows) -> None:
    for store in rows.stores:
        augment = store.manifest.views.augment
        if store.views % TURNS or augment not in (None, "rotate4", "rotate4_crop"):
            raise ValueError(
                f"{store.path}: sskd takes four rotations of each image, and this has {store.views} views ({augment}); "
                "extract with --views 4 --augment rotate4_crop"
            )
