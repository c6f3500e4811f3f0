"""95 % intervals of everything that is measured; where none would be honest, a word why. Without resampling, but of ratios of
sums over images.

What an interval covers is the sampling of the rows that were measured (queries, test images, ID and OOD rows): were
other rows drawn from the same source, in as many classes and sets, 95 of 100 such intervals would hold the value of
infinitely many. Banks, fitted detectors and heads, few-shot draws and the choice of sets are taken as they are.

An estimate is a value and, for every *source* of rows that were drawn by themselves, how far the value may lie below
and above the truth for their sake, with each row's influence on it. Sources are independent of each other, so
distances are squared and added over them; within one source two estimates correlate as their influences do. That is
the method of variance estimates recovery (Newcombe 1998, Statistics in Medicine 17, 857–872 and 2635–2650; Zou and
Donner 2008, Statistics in Medicine 27, 1693–1702): it gives means over sets and paired differences with the coverage
of the single intervals.

Single intervals of shares and areas are Wilson's score interval, n being replaced by the effective number of rows
p (1 − p) / V, with Student's quantile (Kish 1965, "Survey Sampling"; Korn and Graubard 1998, Survey Methodology 24,
193–201). V is the estimated variance, blended with one row's worth of what it may be where no row speaks against the
value (a unit of information: Kass and Wasserman 1995, JASA 90, 928–934), so that no interval has width 0. For counts
under 5 the score interval is modified as Brown, Cai and DasGupta (2001, Statistical Science 16, 101–133) do.
Rank correlations have Fisher's z, means of cross-entropies and of other numbers Hall's correction for skewness. `benchmarks/intervals.py` measures the coverage.
"""

from evalsuite.intervals.alike import decisions, spearman
from evalsuite.intervals.combined import difference, mean_of
from evalsuite.intervals.confidence import aurc, calibration_error, nll, risk_coverage, selective_accuracy, surest
from evalsuite.intervals.estimate import LEAST_ROWS, Estimate, Part
from evalsuite.intervals.means import mean
from evalsuite.intervals.ranks import LEAST_FOR_THRESHOLD, ranking
from evalsuite.intervals.shares import LEAST_FOR_MEAN, by_influence, cosine_mean, kappa, macro_share, share
from evalsuite.intervals.sums import ratio_of_sums

__all__ = [
    "LEAST_FOR_MEAN",
    "LEAST_FOR_THRESHOLD",
    "LEAST_ROWS",
    "Estimate",
    "Part",
    "aurc",
    "by_influence",
    "calibration_error",
    "cosine_mean",
    "decisions",
    "difference",
    "kappa",
    "macro_share",
    "mean",
    "mean_of",
    "nll",
    "ranking",
    "ratio_of_sums",
    "risk_coverage",
    "selective_accuracy",
    "share",
    "spearman",
    "surest",
]
