"""Fields of several stores side by side in one: several teachers, or features of one and logits of another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64, Num

from featcache.derivations import Derivation
from featcache.geometry import unit
from featcache.rows import Rows
from featcache.store.layout import INTEGERS


@dataclass(kw_only=True)
class Join(Derivation):
    """Fields of several stores in one store: a field that several give is one, their values one after the other.

    `take` says which of each store, several joined by +: `embedding,logits` takes the embedding of the first and the
    logits of the second; one alone is taken of every store.
    """

    take: tuple[str, ...] = field(
        default=("embedding",), metadata={"help": "Which fields: one a store (several joined by +), or one for all."}
    )
    unit: bool = field(default=False, metadata={"help": "Scale every store's embedding to length 1 first."})

    def open(self, inputs: Sequence[Rows]) -> None:
        super().open(inputs)
        if len(self.take) not in (1, len(inputs)):
            raise ValueError(f"take names fields of {len(self.take)} stores, {len(inputs)} are given; name one a store")
        of_stores = self.take if len(self.take) == len(inputs) else self.take * len(inputs)
        self._parts: dict[str, list[Rows]] = {}
        for rows, names in zip(inputs, of_stores, strict=True):
            for name in names.split("+"):
                rows.require_field(name)
                self._parts.setdefault(name, []).append(rows)
        if "embedding" not in self._parts:
            raise ValueError("take names no embedding, and a store needs one; name it of one store")
        for name, (first, *others) in self._parts.items():
            for other in others:
                if not first.shape_of(name) or name in self._whole(first) or name in self._whole(other):
                    raise ValueError(
                        f"{name} is one number a sample, or whole numbers: take it of one of {first.name}, {other.name}"
                    )
                if other.shape_of(name)[:-1] != first.shape_of(name)[:-1]:
                    raise ValueError(
                        f"{other.name} has {name} of shape {tuple(other.shape_of(name))}, {first.name} of "
                        f"{tuple(first.shape_of(name))}: only the last side may differ; take it of one of them"
                    )

    @property
    def fields(self) -> Mapping[str, Sequence[int]]:
        shapes = {name: [rows.shape_of(name) for rows in parts] for name, parts in self._parts.items()}
        return {
            name: [*first[:-1], sum(each[-1] for each in (first, *others))] if others else list(first)
            for name, (first, *others) in shapes.items()
        }

    @property
    def dtypes(self) -> Mapping[str, str]:
        return {name: self._whole(rows)[name] for name, (rows, *_) in self._parts.items() if name in self._whole(rows)}

    @staticmethod
    def _whole(rows: Rows) -> Mapping[str, str]:
        """Fields of whole numbers, which are kept as they are."""
        return {name: dtype for name, dtype in rows.stores[0].manifest.dtypes.items() if dtype in INTEGERS}

    @property
    def classes(self) -> Sequence[str] | None:
        one = self._parts.get("logits", [])
        return one[0].logit_classes if len(one) == 1 else None

    def rows(self, index: Int64[np.ndarray, " b"], view: int) -> dict[str, Num[np.ndarray, "b ..."]]:
        found = {name: [self._values(rows, name, index, view) for rows in parts] for name, parts in self._parts.items()}
        return {name: np.concatenate(parts, axis=-1) if parts[1:] else parts[0] for name, parts in found.items()}

    def _values(self, rows: Rows, name: str, index: Int64[np.ndarray, " b"], view: int) -> Num[np.ndarray, "b ..."]:
        values = rows.gather(index, name, view)
        values = values if name in self._whole(rows) else values.astype(np.float32)
        return unit(values) if self.unit and name == "embedding" else values
