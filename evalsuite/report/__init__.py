"""Results as one HTML page that needs nothing else.

Python says what is drawn, in the records of `evalsuite.charts`; `page/` draws them and knows no evaluator and no metric.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalsuite.result import Result
    from featcache.corpora import Corpus
else:  # NumPy: too slow for an annotation
    Corpus = Result = Any


def report(
    results: Sequence[Result | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    names: Mapping[str, str] | None = None,
    title: str = "Evaluation report",
    images: str | Sequence[str | Corpus] = (),
    stores: bool = True,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Path:
    """Write one HTML page about `results` (in memory, or files that evaluators wrote) and return its path.

    The page loads nothing from anywhere and holds the numbers it draws: a summary with a row an encoder, score
    histograms and ROC curves of each OOD detector, accuracy against fidelity, accuracy under corruption, a map of
    the embeddings, and every metric, input and parameter. Parts without data are left out: histograms, curves and
    maps need the samples that evaluators write beside their JSON; classes on maps, the direction from ID to OOD, tables of
    classes, confused classes and neighbours the stores that results name, where they still are (in local folders, at the
    paths in the results; `stores=False` leaves them alone).

    `images` are corpora, open or by their specs, whose images are shown small: the OOD taken for ID, the ID taken for OOD, confused
    classes, neighbours in both spaces, and the points of maps. Images that stores keep need not be given. They are found by the
    samples' ids, and shown only where their hashes are those of the images that were measured (none of stores that keep no
    hashes); what is not shown is said, and warned of where `images` are given. A page has at most 1,000 pictures, as many as fit. `progress` hears how many are done, of
    how many.

    Results of one encoder (one fingerprint) share a row. `names` gives encoders the names they are shown under, by
    fingerprint, by encoder name or by a result's path as given in `results`; results of one encoder under two
    names are two rows. Teachers are the encoders that fidelity results name as such and the one shown as
    "teacher". Where two results of one row have different values for one metric, the later one counts, the page
    says so and shows both, and a `RuntimeWarning` tells; so it does of a result without metrics.

    The summary marks a student as best where its 95 % interval leaves out every other student's. Histograms have equal
    bins over the bulk of the scores (`evalsuite.charts.Histogram`) and say how many lie beyond. Curves keep at most 161
    of their corners and maps at most 2,000 places a set, evenly spread over its rows; fewer each where there are many,
    to keep the page under 3 MB. A larger one warns.

    Raises `ValueError` when there is no result, a file is not one, one name is given to two encoders, or no page can
    be written to `out`: it is a folder, or one of `results`.
    """
    from evalsuite.report.write import write

    return write(results, out, names or {}, title, images, stores, progress)
