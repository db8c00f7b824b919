"""Means, spreads and the paired test, on plain numbers. Imports nothing of the package."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

TEST_NAME = "exact paired sign-flip test"
TEST_ASSUMPTION = (
    "two-sided; assumes that, were the two methods alike, each paired difference of one order and seed would be as "
    "likely to have the other sign, and that the pairs are independent (runs that share an order are only roughly so)"
)
MOST_EXACT_PAIRS = 16
"""Up to 2^16 sign patterns are counted out; beyond that their normal limit is close."""


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
    fall below 2 / 2^n: 0.25 for three, 0.03 for six.
    """
    # A pair without a difference has none of either sign; it says nothing.
    differences = [d for d in differences if d != 0]
    if len(differences) > MOST_EXACT_PAIRS:
        return _normal_p(differences)
    observed = abs(math.fsum(differences))
    # Sums that differ only by rounding count as equal.
    tolerance = 1e-9 * math.fsum(abs(d) for d in differences)
    signs = itertools.product((1, -1), repeat=len(differences))
    hits = sum(
        abs(math.fsum(s * d for s, d in zip(sign, differences, strict=True))) >= observed - tolerance for sign in signs
    )
    return hits / 2 ** len(differences)


def _normal_p(differences: Sequence[float]) -> float:
    """The same by its normal limit: under random signs the sum has variance sum of d^2."""
    scale = math.sqrt(math.fsum(d * d for d in differences))
    return math.erfc(abs(math.fsum(differences)) / scale / math.sqrt(2))
