"""How often do the intervals hold the truth? Coverage by simulation, over sizes, imbalance, ties and values near 1.

Samples are drawn where the truth is known, measured by `evalsuite.intervals`, and counted. Prints a line a case: how
many of the intervals held the truth, their mean width, and how many samples had none. Exits with 1 where one of a
case's coverages is under 93 % by more than chance explains (three standard errors), or over 97 %, or where of two
encoders between which nothing differs more than 7 % or fewer than 3 % are told apart. Too wide is allowed, marked
`few`, where fewer than 20 rows are to be expected that speak against the value, or for it: the rows that are wrong, the
lesser side's rows times the distance of an area from 0 or 1, the ID or OOD rows beyond an FPR's threshold, the samples
that one of two encoders gets right. There counts are too coarse, and unseen rows decide.

    OMP_NUM_THREADS=1 python benchmarks/intervals.py

`--samples` sets how many samples of each case are drawn: at 200 in under a minute, with more room for chance.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np
from _targets import judge

from evalsuite.intervals import (
    Estimate,
    aurc,
    calibration_error,
    cosine_mean,
    decisions,
    difference,
    kappa,
    macro_share,
    mean_of,
    nll,
    ranking,
    selective_accuracy,
    share,
    spearman,
)
from evalsuite.metrics import ood_metrics

LEAST, MOST = 0.93, 0.97
NORMAL = NormalDist()

FEW = 20
Case = tuple[str, dict[str, float], Callable[[np.random.Generator], dict[str, Estimate]], dict[str, float]]
"""A name, the truths by metric, what draws one sample and measures it, and by metric how many rows are to be expected
that speak against the value or for it, whichever are fewer."""


def accuracies() -> Iterator[Case]:
    for n in (1, 2, 3, 5, 10, 50, 200, 1000, 10_000):
        for p in (0.5, 0.9, 0.98, 0.999):
            yield (
                f"n {n:,}, p {p}",
                {"top1": p},
                lambda rng, n=n, p=p: {"top1": share(rng.random(n) < p)},
                {"top1": n * (1 - p)},
            )
    for n in (10, 50, 1000):  # shares of 10 neighbours, of rows that differ
        for a, b in ((8.0, 2.0), (0.5, 0.5), (30.0, 0.5)):
            yield (
                f"n {n:,}, tenths, beta({a:g}, {b:g})",
                {"mutual_knn": a / (a + b)},
                lambda rng, n=n, a=a, b=b: {"mutual_knn": share(rng.binomial(10, rng.beta(a, b, n)) / 10)},
                {"mutual_knn": n * b / (a + b)},
            )
    for n in (50, 100, 1000):
        for a, b in ((8.0, 2.0), (20.0, 0.8)):
            yield (
                f"n {n:,}, beta({a:g}, {b:g})",
                {"cosine_mapped": 2 * a / (a + b) - 1},
                lambda rng, n=n, a=a, b=b: {"cosine_mapped": cosine_mean(2 * rng.beta(a, b, n) - 1)},
                {"cosine_mapped": n},
            )
    for n in (10, 50, 500):
        for agree in (0.2, 0.9, 0.98):

            def votes(rng: np.random.Generator, n: int = n, agree: float = agree) -> dict[str, Estimate]:
                while True:
                    a = rng.choice(3, n, p=(0.6, 0.3, 0.1))
                    b = np.where(rng.random(n) < agree, a, rng.choice(3, n, p=(0.6, 0.3, 0.1)))
                    if len(np.unique([a, b])) > 1:  # else kappa is left out
                        return {"kappa": kappa(a, b, 3)}

            yield f"n {n:,}, agreement {agree}", {"kappa": agree}, votes, {"kappa": n * min(agree, 1 - agree)}


def macros() -> Iterator[Case]:
    sizes = {
        f"{classes:,} × {rows}": np.full(classes, rows) for classes in (2, 10, 100, 1000) for rows in (1, 2, 3, 10, 100)
    }
    sizes |= {f"{classes:,}, 2 to 200 rows": np.geomspace(2, 200, classes).astype(int) for classes in (10, 100, 1000)}
    sizes |= {f"{classes:,}, one of 2, others 200": np.append(2, np.full(classes - 1, 200)) for classes in (10, 1000)}
    sizes |= {f"{classes:,}, one of 1000, others 10": np.append(1000, np.full(classes - 1, 10)) for classes in (3, 100)}
    for name, rows in sizes.items():
        labels = np.repeat(np.arange(len(rows)), rows)
        for p in (0.5, 0.9, 0.98, 0.999):
            for spread, of in ((0.0, "alike"), (0.1, "apart")):
                each = np.full(len(rows), p)
                if spread:  # classes of other accuracies, their variance a tenth of p (1 − p)
                    each = np.random.default_rng(0).beta(p * (1 / spread - 1), (1 - p) * (1 / spread - 1), len(rows))
                yield (
                    f"{name}, p {p} {of}",
                    {"macro_top1": float(each.mean())},
                    lambda rng, each=each, labels=labels: {
                        "macro_top1": macro_share(rng.random(len(labels)) < each[labels], labels)
                    },
                    {"macro_top1": len(rows) ** 2 / (1 / rows).sum() * (1 - float(each.mean()))},
                )


def answers(rng: np.random.Generator, chance: np.ndarray, temperature: float) -> dict[str, Estimate]:
    """What is measured of answers that are right with these chances, the confidence being their log odds over the temperature;
    the NLL as of two classes."""
    right = rng.random(len(chance)) < chance
    odds = np.log(chance / (1 - chance)) / temperature
    confidence = np.clip(1 / (1 + np.exp(-odds)), 1e-6, 1 - 1e-6)
    return {
        "nll": nll(-np.where(right, np.log(confidence), np.log1p(-confidence))),
        "ece": calibration_error(confidence, right, 15),
        "aurc": aurc(confidence, right),
        "selective": selective_accuracy(confidence, right, 0.8),
    }


def probabilities(sizes: tuple[int, ...] = (60, 200, 1000, 10_000), enough: int = 2_000_000) -> Iterator[Case]:
    """Calibrated, overconfident and underconfident classifiers, right in 50, 80 and 98 of 100 cases; and two of them on the same
    rows. The ECE may be too wide: its lower end allows for noise. A few errors decide the NLL and the others."""
    for a, b in ((2.0, 2.0), (8.0, 2.0), (30.0, 0.7)):
        many = np.random.default_rng(1).beta(a, b, enough)
        truths = {t: answers(np.random.default_rng(2), many, t) for t in (1.0, 0.67, 1.67)}
        for n in sizes:
            wrong = n * b / (a + b)
            if wrong < 3:  # no more than one sample in fifty has enough errors for an interval of the NLL
                continue
            speaking = {"nll": wrong / 4, "ece": 0.0, "aurc": wrong / 2, "selective": wrong / 4}
            for t, truth in truths.items():
                yield (
                    f"n {n:,}, beta({a:g}, {b:g}), T {t:g}",
                    {name: each.value for name, each in truth.items()},
                    lambda rng, n=n, a=a, b=b, t=t: answers(rng, rng.beta(a, b, n), t),
                    speaking,
                )

            def two(rng: np.random.Generator, n: int = n, a: float = a, b: float = b) -> dict[str, Estimate]:
                chance = rng.beta(a, b, n)
                one, other = answers(rng, chance, 1.0), answers(rng, chance, 0.67)
                return {f"B − A, {name}": difference(one[name], other[name]) for name in one if name != "ece"}

            apart = {f"B − A, {name}": truths[0.67][name].value - of.value for name, of in truths[1.0].items()}
            del apart["B − A, ece"]
            yield (
                f"n {n:,}, beta({a:g}, {b:g}), T 1 and 0.67",
                apart,
                two,
                {f"B − A, {name}": of for name, of in speaking.items()},
            )


def scores(kind: str, auroc: float) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    """What draws n ID and n OOD scores of this AUROC: normals of equal spread, the same rounded (ties), normals of which
    one is three times as wide, or a share of OOD below all ID."""
    apart = NORMAL.inv_cdf(auroc) * math.sqrt(10 if kind in ("wide OOD", "wide ID") else 2)
    draw = {
        "normal": (lambda rng, n: rng.normal(size=n), lambda rng, n: rng.normal(apart, 1, n)),
        "ties": (lambda rng, n: rng.normal(size=n).round(), lambda rng, n: rng.normal(apart, 1, n).round()),
        "wide OOD": (lambda rng, n: rng.normal(size=n), lambda rng, n: rng.normal(apart, 3, n)),
        "wide ID": (lambda rng, n: rng.normal(0, 3, n), lambda rng, n: rng.normal(apart, 1, n)),
        "missed": (
            lambda rng, n: rng.normal(size=n),
            lambda rng, n: np.where(rng.random(n) < auroc, 20, -20) + rng.normal(size=n),
        ),
    }
    return draw[kind]


SIZES = ((1, 1), (50, 1), (5, 5), (10, 10), (500, 10), (50, 50), (50, 1000), (1000, 50), (100, 100), (500, 500))


def rankings(sizes: tuple[tuple[int, int], ...] = SIZES, enough: int = 400_000) -> Iterator[Case]:
    for n, m in sizes:
        for kind in ("normal", "ties", "wide OOD", "wide ID", "missed"):
            for auroc in (0.5, 0.8, 0.95, 0.993):
                of_id, of_ood = scores(kind, auroc)
                many, rng = enough // (n + m), np.random.default_rng(1)
                truth = ood_metrics(of_id(rng, n * many).astype(float), of_ood(rng, m * many).astype(float))
                yield (
                    f"{n} ID, {m} OOD, {kind}, AUROC {auroc}",
                    truth,
                    lambda rng, n=n, m=m, of_id=of_id, of_ood=of_ood: ranking(
                        of_id(rng, n).astype(float), of_ood(rng, m).astype(float)
                    ),
                    telling(truth, n, m),
                )
    shifts = (0.5, 1.5, 3.0)
    for n, m in ((50, 50), (200, 200)):  # the mean over three sets, beside the same ID rows
        rng, many = np.random.default_rng(1), enough // (n + m)
        known = rng.normal(size=n * many)
        truths = [ood_metrics(known, rng.normal(shift, 1, m * many)) for shift in shifts]

        def over_sets(rng: np.random.Generator, n: int = n, m: int = m) -> dict[str, Estimate]:
            known = rng.normal(size=n)
            of = [ranking(known, rng.normal(shift, 1, m), ood_source=str(shift)) for shift in shifts]
            return {metric: mean_of([each[metric] for each in of]) for metric in of[0]}

        truth = {metric: float(np.mean([each[metric] for each in truths])) for metric in truths[0]}
        yield f"{n} ID, 3 × {m} OOD, mean", truth, over_sets, telling(truth, n, m)


Pair = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def pairs() -> dict[str, Pair]:
    """What draws scores of n rows in two spaces: normals, as they are and rounded, with heavy tails; half of the rows ID,
    half OOD; the same scores but for some rows, whose are unrelated; and closer, the lower the score."""

    def normal(alike: float, apart: float = 0.0, digits: int = 9) -> Pair:
        def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
            a, other = rng.normal(size=(2, n))
            b = alike * a + math.sqrt(1 - alike**2) * other
            ood = apart * (np.arange(n) < n // 2)
            return (a + ood).round(digits), (b + ood).round(digits)

        return draw

    def tails(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        a, b = normal(0.8)(rng, n)
        spread = np.sqrt(rng.chisquare(3, n) / 3)
        return a / spread, b / spread

    def unrelated(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        a, other = rng.normal(size=(2, n))
        return a, np.where(rng.random(n) < 0.3, other, a)

    def closer(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        a, other = rng.normal(size=(2, n))
        return a, a + other * np.exp(a)

    of = {f"normal {alike}": normal(alike) for alike in (0.0, 0.3, 0.8, 0.95)}
    of |= {f"ID and OOD, {alike}": normal(alike, 3.0) for alike in (0.0, 0.8)}
    return of | {"ties": normal(0.8, digits=0), "t(3)": tails, "30 % unrelated": unrelated, "closer": closer}


def alikes() -> Iterator[Case]:
    """Two spaces' scores of the same rows, and their decisions at thresholds set by ID rows."""
    for name, draw in pairs().items():
        rng = np.random.default_rng(1)
        truth = float(np.mean([spearman(*draw(rng, 20_000)).value for _ in range(20)]))
        for n in (10, 30, 100, 1000):
            yield (
                f"{n} rows, {name}",
                {"spearman": truth},
                lambda rng, n=n, draw=draw: {"spearman": spearman(*draw(rng, n))},
                {"spearman": n * (1 - abs(truth)) / 2},
            )
    for alike in (0.0, 0.5, 0.9, 0.98):
        for shifts in ((1.0, 1.0), (2.0, 0.5), (3.0, 3.0)):
            for n, m in ((80, 80), (400, 400), (400, 1500), (1500, 400)):

                def scores(rng: np.random.Generator, n: int, shifts: tuple = (0.0, 0.0), alike: float = alike) -> tuple:
                    a, other = rng.normal(size=(2, n))
                    return a + shifts[0], alike * a + math.sqrt(1 - alike**2) * other + shifts[1]

                rng, k = np.random.default_rng(1), 500_000 // (n + m)
                many = scores(rng, n * k), scores(rng, m * k, shifts)
                truth = {
                    f"{of}/{what}": each.value
                    for of, given in (("id", ()), ("ood", (many[1],)), ("all", (many[1], True)))
                    for what, each in decisions(many[0], *given)[0].items()
                }

                def two(rng: np.random.Generator, n=n, m=m, shifts=shifts, scores=scores) -> dict[str, Estimate]:
                    known, others = scores(rng, n), scores(rng, m, shifts)
                    found = {"id": decisions(known), "ood": decisions(known, others)}
                    found["all"] = decisions(known, others, together=True)
                    return {f"{of}/{what}": each for of, (both, _) in found.items() for what, each in both.items()}

                yield (
                    f"{n} ID, {m} OOD at {shifts[0]}, {shifts[1]}, alike {alike}",
                    truth,
                    two,
                    dict.fromkeys(truth, 0.0),  # thresholds have their own part: wide is allowed
                )


def telling(truth: dict[str, float], n: int, m: int) -> dict[str, float]:
    found = {metric: min(n, m) * min(value, 1 - value) for metric, value in truth.items()}
    return found | {f"fpr95_{side}": min(rows * 0.05, found[f"fpr95_{side}"]) for side, rows in (("id", n), ("ood", m))}


def others(
    sizes: tuple[tuple[int, int], ...] = ((60, 60), (80, 400), (300, 300)), enough: int = 400_000
) -> Iterator[Case]:
    """What the intervals were not tuned on: scores of other distributions, one digit of which is kept or all, and
    classes of which half are always right."""
    draws: dict[str, Callable[[np.random.Generator, int, float], np.ndarray]] = {
        "t(3)": lambda rng, n, shift: rng.standard_t(3, n) + shift,
        "exponential": lambda rng, n, shift: rng.exponential(1 + 2 * shift, n),
        "beta": lambda rng, n, shift: rng.beta(1 + 2 * shift, 2, n),
        "spread": lambda rng, n, shift: rng.normal(shift, np.exp(rng.normal(0, 0.7, n))),
        "a digit": lambda rng, n, shift: rng.normal(shift, 1, n).round(1),
    }
    for n, m in sizes:
        for kind, of in draws.items():
            for shift in (0.3, 1.0, 2.0):
                many, rng = enough // (n + m), np.random.default_rng(7)
                truth = ood_metrics(of(rng, n * many, 0.0), of(rng, m * many, shift))
                yield (
                    f"{n} ID, {m} OOD, {kind}, shift {shift}",
                    truth,
                    lambda rng, n=n, m=m, of=of, shift=shift: ranking(of(rng, n, 0.0), of(rng, m, shift)),
                    telling(truth, n, m),
                )
    for classes, rows in ((5, 40), (40, 7), (300, 4)):
        labels = np.repeat(np.arange(classes), rows)
        for p in (0.3, 0.7, 0.95):
            each = np.where(np.arange(classes) % 2, p, 1.0)
            yield (
                f"{classes:,} × {rows}, half right, half {p}",
                {"macro_top1": float(each.mean())},
                lambda rng, each=each, labels=labels: {
                    "macro_top1": macro_share(rng.random(len(labels)) < each[labels], labels)
                },
                {"macro_top1": len(labels) * (1 - float(each.mean()))},
            )


def differences() -> Iterator[Case]:
    """Of two encoders; the names of those between which nothing differs end in `(null)`."""
    for n in (10, 20, 50, 200, 2000):
        for both, only_a, only_b in (
            (0.25, 0.25, 0.25), (0.6, 0.1, 0.1), (0.85, 0.05, 0.05), (0.97, 0.01, 0.01), (0.98, 0.001, 0.001),
            (0.9, 0.0, 0.05), (0.79, 0.01, 0.1), (0.5, 0.0, 0.3), (0.97, 0.0, 0.01),
        ):  # fmt: skip

            def two(rng: np.random.Generator, n: int = n, p: tuple = (both, only_a, only_b)) -> dict[str, Estimate]:
                drawn = rng.choice(4, n, p=(*p, 1 - sum(p)))
                return {"B − A, top1": difference(share(drawn <= 1), share((drawn == 0) | (drawn == 2)))}

            null = " (null)" if only_a == only_b else ""
            yield (
                f"n {n:,}, {both}, {only_a}, {only_b}{null}",
                {"B − A, top1": only_b - only_a},
                two,
                {"B − A, top1": n * (only_a + only_b)},
            )
    for n, m in ((10, 10), (50, 50), (500, 20), (200, 200)):
        for auroc in (0.6, 0.9, 0.99):
            for alike in (0.0, 0.9):

                def of_scores(rng: np.random.Generator, sizes=(n, m), auroc=auroc, alike=alike) -> dict[str, Estimate]:
                    apart = NORMAL.inv_cdf(auroc) * math.sqrt(2)
                    common = [rng.normal(size=size) for size in sizes]
                    a, b = (
                        ranking(*(
                            math.sqrt(alike) * same + math.sqrt(1 - alike) * rng.normal(size=len(same)) + shift
                            for same, shift in zip(common, (0, apart), strict=True)
                        ))
                        for _ in range(2)
                    )  # fmt: skip
                    return {f"B − A, {metric}": difference(a[metric], b[metric]) for metric in a}

                metrics = ("auroc", "aupr_in", "aupr_out", "ap_in", "ap_out", "fpr95_id", "fpr95_ood")
                yield (
                    f"{n} ID, {m} OOD, AUROC {auroc}, alike {alike} (null)",
                    {f"B − A, {metric}": 0.0 for metric in metrics},
                    of_scores,
                    {f"B − A, {metric}": min(n, m) * (1 - auroc) for metric in metrics}
                    | {f"B − A, fpr95_{side}": 0.05 * rows for side, rows in (("id", n), ("ood", m))},
                )


def covered(case: Case, samples: int, seed: int = 0) -> Iterator[tuple[str, float, float, float, float]]:
    """By metric: coverage, mean width, share of samples without an interval, share of intervals that leave out 0."""
    _, truths, draw, _ = case
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[float, float]]] = {metric: [] for metric in truths}
    for _ in range(samples):
        for metric, estimate in draw(rng).items():
            if estimate.ci95 is not None:
                found[metric].append(estimate.ci95)
    for metric, intervals in found.items():
        if intervals:
            low, high = np.transpose(intervals)
            holds = (low <= truths[metric] + 1e-12) & (truths[metric] - 1e-12 <= high)
            yield (
                metric,
                float(holds.mean()),
                float((high - low).mean()),
                1 - len(intervals) / samples,
                float(((low > 0) | (high < 0)).mean()),
            )
        else:
            yield metric, math.nan, math.nan, 1.0, 0.0


def judged(what: str, coverage: float, rejected: float, held: float, few: bool) -> list[tuple[str, float, float, str]]:
    """The targets of one line, each given three standard errors; `few`: too wide is allowed."""
    chance = 3 * math.sqrt(LEAST * (1 - LEAST) / held)
    targets = [(f"coverage of {what}", coverage + chance, LEAST, "at least")]
    if not few:
        targets.append((f"coverage of {what}", coverage - chance, MOST, "at most"))
    if what.endswith("(null)"):
        targets.append((f"told apart by {what}", rejected - chance, 1 - LEAST, "at most"))
        if not few:
            targets.append((f"told apart by {what}", rejected + chance, 1 - MOST, "at least"))
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=600)
    options = parser.parse_args()
    targets = []
    print(f"{'case':44} {'metric':18} {'coverage':>8} {'width':>7} {'none':>6}")
    for part in (accuracies, macros, probabilities, alikes, rankings, differences, others):
        for case in part():
            name, _, _, speaking = case
            for metric, coverage, width, none, rejected in covered(case, options.samples):
                if none == 1:
                    print(f"{name:44} {metric:18} {'–':>8} {'–':>7} {none:6.0%}", flush=True)
                    continue
                few = " few" if speaking[metric] < FEW else ""
                print(f"{name:44} {metric:18} {coverage:8.1%} {width:7.3f} {none:6.0%}{few}", flush=True)
                targets += judged(f"{metric}, {name}", coverage, rejected, options.samples * (1 - none), bool(few))
    judge(targets)


if __name__ == "__main__":
    main()
