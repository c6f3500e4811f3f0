"""The mean of a number that a store holds of each row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from evalsuite.evaluators import Estimate, Evaluator, Headline, Named, Result, Samples, Store, function, option, store

if TYPE_CHECKING:
    import numpy as np

    from featcache.rows import Rows
else:
    Rows = Any


@dataclass(frozen=True)
class Mean(Evaluator):
    """The mean of a scalar field over `test`'s rows, each with the weight that another field says.

    `mean/FIELD` is Σ wᵢ xᵢ / Σ wᵢ, with a 95 % interval (`evalsuite.intervals.mean`) over rows, which are drawn whole: of a language
    model's `nll`, nats a token, and `predicted`, of how many tokens it is, this is nats a token of all the text, and of a tokeniser
    of bytes nats a byte. `mean/WEIGHT` is the mean weight of a row. Rows of weight 0 count for nothing. Of view 0; failed rows are
    left out, counted and remarked on.

    Tokens of two tokenisers are not of one length: nats a token of such models do not compare, and a comparison warns where a sample
    has another weight on the other side. Of `nll` lower is better; of any other field a comparison calls the higher mean the better.

    `field` is the field; `weight` the field of weights, or "none" for the same weight in each row. By default `predicted` where the store has it.

    Raises `ValueError` when the store lacks a field, one is no single number a row, a value is not finite, or a weight is negative.
    """

    order = 27
    summary = "The mean of a number of each row: nats a byte of a language model, say."
    examples = (
        "evalsuite mean --test dev.zarr --json dev.json",
        "evalsuite mean --test dev.zarr --field nll --weight predicted",
    )
    outcomes = ("weight",)

    test: Store = store("Rows whose numbers are averaged.")
    _: KW_ONLY
    field: str = option("nll", "A field of one number a row.")
    weight: str | None = option(
        None, "The field of each row's weight; none: all alike.", shown="predicted, where there is one"
    )

    def __post_init__(self) -> None:
        if self.weight == self.field:
            raise ValueError(f"weight is {self.weight}, the very field that is averaged; give another, or none")

    def run(self) -> Result:
        import numpy as np

        from evalsuite.intervals import mean
        from evalsuite.result import Result, content_of, versions
        from featcache.rows import Rows, left_out_remarks

        rows = Rows.of(self.test)
        known = all("predicted" in each.manifest.fields for each in rows.stores) and self.field != "predicted"
        named = self.weight or ("predicted" if known else "none")
        values, weight = _numbers(rows, self.field), None if named == "none" else _numbers(rows, named)
        if weight is not None and (weight < 0).any():
            at = rows.sample_ids[int((weight < 0).argmax())]
            raise ValueError(f"{rows.name}: its {named} is negative ({at}); give --weight a field of weights, or none")
        try:
            metrics = {f"mean/{self.field}": mean(values, weight).metric()}
        except ValueError as error:
            raise ValueError(f"{rows.name}: by its {named}, {error}; give another --weight") from None
        samples = {f"mean/{self.field}": values}
        if weight is not None:
            metrics[f"mean/{named}"] = mean(weight).metric()
            samples[f"mean/{named}"] = weight
        return Result(
            "mean",
            {"test": rows.record()},
            {"field": self.field, "weight": named},
            metrics,
            versions(),
            {"sample_id": rows.sample_ids.astype(np.str_), "content": content_of(rows)} | samples,
            remarks=left_out_remarks("test", rows),
        )

    @classmethod
    def compared(cls, a: Samples, b: Samples) -> dict[str, tuple[Estimate, Estimate]]:
        from evalsuite.intervals import mean

        name, *weighted = (name for name in a if name.startswith("mean/"))
        if name not in b or any(each not in b for each in weighted):
            return {}
        if others := sum(int((a[each] != b[each]).sum()) for each in weighted):
            warnings.warn(
                f"{others:,} samples have another {weighted[0].removeprefix('mean/')} on the other side: the means are not of "
                "the same units, as those of two tokenisers",
                RuntimeWarning,
                stacklevel=3,
            )
        of_a, of_b = (each[weighted[0]] if weighted else None for each in (a, b))
        return {name: (mean(a[name], of_a), mean(b[name], of_b))}

    @classmethod
    def headlines(cls, results: Sequence[Named]) -> list[Headline]:
        from evalsuite.charts import Axis, Headline, rows_of

        fields = dict.fromkeys(each.result.parameters["field"] for each in results)
        rows = rows_of(results, "test", "rows")
        return [Headline(metric=f"mean/{name}", axis=Axis.of(f"mean/{name}", name), rows=rows) for name in fields]


def _numbers(rows: Rows, field: str) -> np.ndarray:
    """(n,) float64. Raises `ValueError` where the field is none of single numbers."""
    import numpy as np

    rows.require_field(field)
    if list(rows.shape_of(field)) not in ([], [1]):
        shape = " × ".join(map(str, rows.shape_of(field)))
        raise ValueError(f"{rows.name}: {field} is {shape} numbers a row, and the mean is of one; name another field")
    found: np.ndarray = rows.take(np.arange(len(rows)), field).reshape(len(rows)).astype(np.float64)
    return found


mean = function(Mean)
