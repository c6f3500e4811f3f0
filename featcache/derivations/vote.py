"""Pseudo-labels: what several teachers, asked together, take a row for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

from featcache.classes import Classes, ordered
from featcache.derivations import Derivation
from featcache.geometry import softmax
from featcache.head import Head
from featcache.maps import resampled
from featcache.rows import Rows
from featcache.store.layout import DENSE

BY = ("majority", "probability")
OWN = "own"
"""Given for a head: the logits that the store holds."""
_BLOCK_FLOATS = 2**23  # logits voted on at once


@dataclass(kw_only=True)
class Vote(Derivation):
    """Labels for rows that have none, from the logits of several stores of the same samples, in view 0; or of every pixel of maps.

    by=majority: each store votes for its highest logit (of equal ones the first), and a class's share is that of the votes.
    by=probability: it is the mean over stores of softmax(logits / temperature). `logits` are the logarithms of the shares (of no
    votes: of the least float32), so that softmax(logits) are the shares again, one-hot where all vote alike.

    The class of the largest share (of equal ones the first) is the row's label where that share is at least `least`, else −1;
    `weight` is that share, in other views than the first the share of the same class there. Rows that have a label keep it, with
    a weight of 1, unless relabel=true; their `logits` are the vote's. Beside them stands the first store's embedding. Terms on
    labels then leave out what the teachers do not agree on, and count the rest by how far they do.

    Logits are the stores' own, or what `head` makes of their embeddings: classifiers as `evalsuite probe … --save FILE` fits them.
    The columns of heads that name their classes are put into one order, the first store's where it has names, else the first head's.

    Classes are named by the first store, else by the stores' logits, else as `names` says, else by number: name them, so that
    stores of labelled rows and of pseudo-labelled ones can train one student.

    of=dense votes on every cell of the stores' dense maps, in every view, others brought to the grid of the first's bilinearly: `dense`
    are the logarithms of the shares (by=probability there, unless said otherwise), so that the highest is a cell's pseudo-label and
    its share how sure that is; `weight` is the mean share of the winners, low where teachers disagree. Beside them stand the first
    store's embedding and tokens. Rows keep their labels. Pseudo-masks of two teachers, as in SSLKD: Ma, Karakus and Rosin 2024,
    arXiv 2402.05305.

    Share of agreement of an ensemble as confidence: Lakshminarayanan et al. 2017, arXiv 1612.01474 (probability); a threshold on it
    for pseudo-labels: Sohn et al. 2020, arXiv 2001.07685 (FixMatch, 0.95).
    """

    of: str = field(default="logits", metadata={"help": "logits, of rows; or dense, of every cell of maps."})
    by: str = field(
        default="", metadata={"help": "majority (one vote a store; of logits) or probability (their mean; of dense)."}
    )
    least: float = field(default=0.0, metadata={"help": "Share that the winning class needs, to be a row's label."})
    temperature: float = field(default=1.0, metadata={"help": "Of by=probability: softmax(logits / temperature)."})
    head: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Classifier files, one a store ('own': the logits that it holds), or one for all; else all their own."
        },
    )
    relabel: bool = field(default=False, metadata={"help": "Vote on rows that have a label, too."})
    names: tuple[str, ...] = field(
        default=(), metadata={"help": "Of the logits' classes, in their order, where no store names them."}
    )

    def __post_init__(self) -> None:
        if self.of not in ("logits", DENSE):
            raise ValueError(f"of is {self.of!r}; give logits or dense")
        self.by = self.by or ("probability" if self.of == DENSE else "majority")
        if self.of == DENSE and (self.least or self.head or self.relabel):
            raise ValueError(
                "least, head and relabel are of the labels of rows; leave them out (method sslkd has a least of pixels)"
            )
        if self.by not in BY:
            raise ValueError(f"by is {self.by!r}; give {' or '.join(BY)}")
        if not 0 <= self.least <= 1:
            raise ValueError(f"least is {self.least}; give a share, 0 to 1")
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature is {self.temperature}; give a number above 0")
        if self.temperature != 1 and self.by == "majority":
            raise ValueError("temperature says nothing of a majority; leave it out, or give by=probability")

    def open(self, inputs: Sequence[Rows]) -> None:
        super().open(inputs)
        self._take_heads()
        first, *others = inputs
        for each in inputs:
            each.require_field(self.of)
        known = {tuple(found) for each in inputs if (found := each.logit_classes)}
        widths = {int(each.shape_of(self.of)[0]) for each in inputs}
        if len(known) > 1 or len(widths) > 1:
            raise ValueError(
                f"{first.name} and {', '.join(each.name for each in others)} have {self.of} of other classes, or in another order; "
                f"give stores whose {self.of} are of the same classes"
            )
        (self._width,) = widths
        named = list(next(iter(known))) if known else None
        if self.of == DENSE:
            self._grid = [int(side) for side in first.shape_of(DENSE)[1:]]
        of_rows = first.class_names if self.of == "logits" else None
        self._names = of_rows or named or list(self.names) or None
        if named and of_rows and named != list(of_rows):
            raise ValueError(
                f"{first.name} has other classes, or in another order, than its logits; name the class folders as the teachers' were"
            )
        if self._names is not None and len(self._names) != self._width:
            raise ValueError(f"{len(self._names)} names for the {self._width} classes of the logits; give one a class")

    def _take_heads(self) -> None:
        given = self.head * len(self.inputs) if len(self.head) == 1 else self.head
        if len(given) not in (0, len(self.inputs)):
            raise ValueError(f"{len(given)} heads for {len(self.inputs)} stores; give one a store, or one for all")
        wanted = self.inputs[0].class_names
        for rows, path in zip(self.inputs, given, strict=False):
            if path == OWN:
                continue
            head = Head.read(path)
            rows.refuse_other_head(head)
            wanted = wanted or head.class_names
            if head.class_names and wanted:
                head = ordered(head, Classes(self.inputs[0].name, np.arange(len(wanted)), wanted))
            rows.head = head

    @property
    def record(self) -> dict[str, Any]:
        """With what is in the heads in place of where they lie; nothing of them where there are none, as before there were any."""
        record = super().record
        del record["head"]
        if self.of == "logits":
            del record["of"]
        heads = [rows.head.digest if rows.head else OWN for rows in self.inputs]
        return {**record, "head": heads} if self.head else record

    @property
    def classes(self) -> Sequence[str] | None:
        return self._names

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.inputs[0].class_names if self.of == DENSE else self._names

    @property
    def fields(self) -> Mapping[str, Sequence[int]]:
        if self.of == DENSE:
            kept = {name: self.inputs[0].shape_of(name) for name in self._kept}
            return {**kept, DENSE: [self._width, *self._grid], "weight": [1]}
        return {"embedding": self.inputs[0].shape_of("embedding"), "logits": [self._width], "weight": [1]}

    def labels(self, given: Int64[np.ndarray, " n"], ok: Bool[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The winners where nothing else is known; needs a pass over the logits of all stores."""
        if self.of == DENSE:
            return given
        asked = np.flatnonzero(ok if self.relabel else ok & (given < 0))
        found, size = given.copy(), max(1, _BLOCK_FLOATS // self._width)
        for start in range(0, len(asked), size):
            rows = asked[start : start + size]
            shares = self._shares(rows, 0)
            found[rows] = np.where(shares.max(axis=1) >= np.float32(self.least), shares.argmax(axis=1), -1)
        self._labelled, self._asked = int((found[asked] >= 0).sum()), len(asked)
        return found

    @property
    def said(self) -> list[str]:
        if self.of == DENSE:
            return []
        return [
            f"{self._labelled:,} of {self._asked:,} rows that were voted on have a label by a share of {self.least:g} or more"
        ]

    def _shares(self, index: Int64[np.ndarray, " b"], view: int) -> Float32[np.ndarray, "b c"]:
        """Of every class, summing to 1."""
        total = np.zeros((len(index), self._width), np.float32)
        for rows in self.inputs:
            logits = rows.gather(index, "logits", view).astype(np.float32)
            if self.by == "majority":
                total[np.arange(len(index)), logits.argmax(axis=1)] += 1
            else:
                total += softmax(logits / np.float32(self.temperature))
        return total / np.float32(len(self.inputs))

    def rows(self, index: Int64[np.ndarray, " b"], view: int) -> dict[str, Float[np.ndarray, "b ..."]]:
        if self.of == DENSE:
            return self._maps(index, view)
        shares, first = self._shares(index, view), self.inputs[0]
        won = (shares if view == 0 else self._shares(index, 0)).argmax(axis=1)
        kept = (first.labels[index] >= 0) & (not self.relabel)
        return {
            "embedding": first.gather(index, "embedding", view).astype(np.float32),
            "logits": np.log(np.maximum(shares, np.finfo(np.float32).tiny)),
            "weight": np.where(kept, np.float32(1), shares[np.arange(len(index)), won])[:, None],
        }

    @property
    def _kept(self) -> list[str]:
        """Features of the first store that stand beside its maps."""
        return ["embedding", *(["tokens"] if "tokens" in self.inputs[0].stores[0].manifest.fields else [])]

    def _maps(self, index: Int64[np.ndarray, " b"], view: int) -> dict[str, Float[np.ndarray, "b ..."]]:
        total = np.zeros((len(index), self._width, *self._grid), np.float32)
        classes = np.arange(self._width)[:, None, None]
        for rows in self.inputs:
            logits = resampled(rows.gather(index, DENSE, view), self._grid)
            if self.by == "majority":
                total += classes == logits.argmax(axis=1)[:, None]
            else:
                cells = np.moveaxis(logits, 1, -1)
                said = softmax(cells.reshape(-1, self._width) / np.float32(self.temperature))
                total += np.moveaxis(said.reshape(cells.shape), -1, 1)
        shares = total / np.float32(len(self.inputs))
        return {
            **{name: self.inputs[0].gather(index, name, view).astype(np.float32) for name in self._kept},
            DENSE: np.log(np.maximum(shares, np.finfo(np.float32).tiny)),
            "weight": shares.max(axis=1).mean(axis=(1, 2))[:, None],
        }
