"""What rows of measurements say together: means and their standard errors, means in bins, survival of chains."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """
    mean   of the values
    error  its standard error (None: all values are of one group)
    count  of values
    """

    mean: float
    error: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Bin:
    """Positions whose x is from `low` to `high`, the mean of their x, and the estimate of their y."""

    low: float
    high: float
    x: float
    y: Estimate


def estimate(values: Floats, groups: Whole) -> Estimate | None:
    """The mean of values [N], NaN left out, and its error where values of one group [N] are not independent.

    The error is the square root of G/(G-1) Σ_g (Σ_{i in g} (x_i - mean))² over N (Liang and Zeger 1986); where every
    value is a group of its own that is the usual standard error of a mean. None if no value is left.
    """
    known = ~np.isnan(values)
    values, groups = values[known], groups[known]
    if not len(values):
        return None
    mean = float(values.mean())
    found, index = np.unique(groups, return_inverse=True)
    if len(found) < 2:
        return Estimate(mean, None, len(values))
    sums = np.bincount(index, weights=values - mean)
    error = np.sqrt(len(found) / (len(found) - 1) * (sums**2).sum()) / len(values)
    return Estimate(mean, float(error), len(values))


def columns(values: Floats, groups: Whole) -> list[Estimate | None]:
    """The estimate of each column of [N, D]."""
    return [estimate(column, groups) for column in values.T]


def edges(values: Floats, bins: int) -> list[float]:
    """Where bins of about as many values each begin, and where the last ends; fewer bins where values are equal."""
    found = np.unique(np.quantile(values[~np.isnan(values)], np.linspace(0, 1, bins + 1)))
    return [float(e) for e in found] if len(found) > 1 else [float(found[0])] * 2


def binned(x: Floats, y: Floats, groups: Whole, borders: Sequence[float]) -> list[Bin]:
    """The estimate of y [N] in every bin of x [N] that has a value; a border belongs to the bin above it.

    What lies outside of the borders is in the first or the last bin.
    """
    index = np.searchsorted(np.asarray(borders[1:-1]), x, side="right")
    bins = list[Bin]()
    for i, (low, high) in enumerate(pairwise(borders)):
        inside = (index == i) & ~np.isnan(x) & ~np.isnan(y)
        found = estimate(y[inside], groups[inside])
        if found is not None:
            bins.append(Bin(low, high, float(x[inside].mean()), found))
    return bins


def chains(through: Floats, at: Floats) -> Floats:
    """[N, D]: in column i the product of `through` [N, D] before i, times `at` [N, D] there.

    With `through` the chance that guess i of a drawn path is accepted (given that path) and `at` the same summed over
    what could be drawn at i, the mean over rows is P(the first i guesses are accepted).
    """
    before = np.ones_like(through)
    before[:, 1:] = np.cumprod(through, axis=1)[:, :-1]
    return before * at


def within(rank: Floats, best: int) -> Floats:
    """1 where the rank is among the `best` first, 0 where it is not, NaN where there is none."""
    return np.where(np.isnan(rank), np.nan, rank < best)
