"""Means, spreads and the paired test, on plain numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TEST_NAME = "exact paired sign-flip test"
TEST_ASSUMPTION = (
    "two-sided; assumes that, were the two methods alike, each paired difference of one order and seed would be as "
    "likely to have the other sign, and that the pairs are independent (runs that share an order are only roughly so)"
)
GRID = 200_000
"""Steps to which the differences are rounded for the test, from 0 to the sum of their sizes."""


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (n - 1; None for n = 1), smallest and largest."""

    mean: float
    sd: float | None
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one number."""
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), sd, min(values), max(values))


@dataclass(frozen=True)
class PairedDifference:
    """A variant minus the baseline over their common (order, seed) pairs: ``wins`` are those above 0, ``ties`` those
    of 0; ``p`` is None for a single pair, where no test is possible."""

    n: int
    mean: float
    sd: float | None
    wins: int
    ties: int
    p: float | None

    @classmethod
    def of(cls, differences: Sequence[float]) -> PairedDifference:
        """Of at least one difference."""
        # Means of the same right answers may differ in their last bits.
        differences = [round(difference, 12) for difference in differences]
        spread = Spread.of(differences)
        p = sign_flip_p(differences) if len(differences) > 1 else None
        wins, ties = sum(d > 0 for d in differences), sum(d == 0 for d in differences)
        return cls(len(differences), spread.mean, spread.sd, wins, ties, p)


def p_words(p: float) -> str:
    """To three decimals."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def sign_flip_p(differences: Sequence[float]) -> float:
    """Share of all 2^n sign patterns whose absolute mean is at least the one observed (two-sided, exact).

    Fisher's randomisation test for paired data (The Design of Experiments, 1935, section 21). With n pairs it cannot
    fall below 2 / 2^n: 0.25 for three, 0.03 for six. The patterns are not gone through one by one: the probability of
    each sum is built up pair by pair, on a grid of ``GRID`` steps of the largest sum.
    """
    sizes = np.abs(np.asarray(differences, dtype=np.float64))
    # A pair without a difference has none of either sign; it says nothing.
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return 1.0
    step = sizes.sum() / GRID
    probability = np.ones(1)  # of the sums -reach, ..., reach, in steps
    for size in np.rint(sizes / step).astype(int):
        wider = np.zeros(len(probability) + 2 * size)
        wider[: len(probability)] += probability / 2
        wider[2 * size :] += probability / 2
        probability = wider
    reach = len(probability) // 2
    # Sums that differ only by the grid's rounding, half a step a pair on either side, count as equal.
    observed = math.floor(abs(math.fsum(differences)) / step - len(sizes))
    if observed <= 0:
        return 1.0
    return float(min(1.0, 2 * probability[reach + observed :].sum()))
