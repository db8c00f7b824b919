"""Is it worth it? A comparison's answer in words. Imports ``results`` for its types only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .results import VariantFigures

SURE = 0.05
"""A p above it is called chance's doing, as is usual."""


def answer(subject: VariantFigures, baseline: VariantFigures) -> str:
    """Whether ``subject`` is worth it against ``baseline``, what it costs, and what to do when it is not shown.

    Empty until both have finished runs of one order and seed.
    """
    difference = subject.against_baseline
    if difference is None:
        return ""
    shown = difference.p is not None and difference.p <= SURE
    verdict = ("Yes" if difference.mean > 0 else "No") if shown else "Not shown"
    side = "above" if difference.mean >= 0 else "below"
    pairs = "the one pair" if difference.n == 1 else f"{difference.wins} of {difference.n} pairs"
    p = "" if difference.p is None else f" (p = {difference.p:.3f})" if difference.p >= 0.001 else " (p < 0.001)"
    lead = f"is ahead in {pairs} of runs" if difference.n > 1 else f"in {pairs} of runs that there is"
    parts = [
        f"Is {subject.label} worth it? {verdict}: it ends {100 * abs(difference.mean):.1f} OP {side} {baseline.label}"
        f"{' and ' if difference.n > 1 else ' '}{lead}{p}."
    ]
    if not shown:
        parts.append(_what_would_show_it(difference.n))
    if subject.gap_closed is not None and difference.mean > 0:
        parts.append(f"It closes {100 * subject.gap_closed:.0f} % of the gap to training all tasks at once.")
    if subject.cost and baseline.cost and baseline.cost["step_seconds"]:
        times = subject.cost["step_seconds"] / baseline.cost["step_seconds"]
        kilobytes = (subject.cost["kept_bytes"] - baseline.cost["kept_bytes"]) / 1e3
        more = "more" if kilobytes >= 0 else "less"
        parts.append(
            f"A step took {times:.2f} times as long (other work on the machine counts), and "
            f"{abs(kilobytes):.0f} kB {more} are kept."
        )
    return " ".join(parts)


def _what_would_show_it(n_pairs: int) -> str:
    smallest = 2 / 2**n_pairs
    if n_pairs == 1:
        return "One pair cannot show it; give more seeds or orders."
    if smallest > SURE:
        return f"{n_pairs} pairs cannot show it, whatever they are; give more seeds or orders."
    return "That may be chance; more seeds or orders would tell."
