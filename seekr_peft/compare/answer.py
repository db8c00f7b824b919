"""Is it worth it? A comparison's answer in words."""

from __future__ import annotations

from .statistics import PairedDifference, p_words

SIGNIFICANT_P = 0.05
"""The usual bound: a difference with a larger p may be chance."""
SMALLEST_DIFFERENCE = 0.0005
"""The smallest difference of OP that counts as one; a smaller one would be printed as 0.0 points."""
PAIRS_NEEDED = 6
"""The fewest pairs whose p can fall to ``SIGNIFICANT_P``: 2 / 2^6 = 0.031, where 2 / 2^5 = 0.063."""


def answer(
    label: str,
    baseline: str,
    difference: PairedDifference,
    gap_closed: float | None = None,
    step_ratio: float | None = None,
    more_bytes: float | None = None,
) -> str:
    """Whether the variant ``label`` is worth it against ``baseline``, what it costs, and what would show it.

    Args:
        gap_closed: Share of the gap to training all tasks at once.
        step_ratio: Seconds of an optimiser step over those of the baseline's.
        more_bytes: Kept on disk beyond what the baseline keeps.
    """
    verdict = _verdict(difference)
    parts = [f"Is {label} worth it? {verdict}: it ends {_position(difference, baseline)}{_pairs(difference)}."]
    if verdict == "Not shown":
        parts.append(_what_would_show_it(difference))
    elif verdict == "Yes" and gap_closed is not None and gap_closed > 0:
        parts.append(f"It closes {100 * gap_closed:.0f} % of the gap to training all tasks at once.")
    if step_ratio is not None:
        parts.append(f"A step took {step_ratio:.1f} times as long as one of {baseline}.")
    if more_bytes is not None:
        parts.append(_kept(more_bytes, baseline))
    return " ".join(parts)


def _verdict(difference: PairedDifference) -> str:
    if difference.p is None or difference.p > SIGNIFICANT_P or abs(difference.mean) < SMALLEST_DIFFERENCE:
        return "Not shown"
    return "Yes" if difference.mean > 0 else "No"


def _position(difference: PairedDifference, baseline: str) -> str:
    if abs(difference.mean) < SMALLEST_DIFFERENCE:
        return f"level with {baseline}"
    return f"{100 * abs(difference.mean):.1f} OP {'above' if difference.mean > 0 else 'below'} {baseline}"


def _pairs(difference: PairedDifference) -> str:
    if difference.n == 1:
        return " in the one pair of runs that there is"
    alike = f", {difference.ties} alike" if difference.ties else ""
    p = "" if difference.p is None else f" (p = {p_words(difference.p)}{alike})".replace("= <", "< ")
    return f" and is ahead in {difference.wins} of {difference.n} pairs of runs{p}"


def _what_would_show_it(difference: PairedDifference) -> str:
    # A pair without a difference says nothing, unless none of them has one.
    telling = difference.n - difference.ties or difference.n
    if telling < PAIRS_NEEDED:
        pairs = "One pair" if telling == 1 else f"{telling} pairs"
        return f"{pairs} cannot show it, it takes {PAIRS_NEEDED}: give more --seeds, or --orders 2."
    return "That may be chance; more seeds or orders may tell."


def _kept(more_bytes: float, baseline: str) -> str:
    kilobytes = abs(more_bytes) / 1e3
    if kilobytes < 0.5:
        return f"As much is kept on disk as by {baseline}."
    amount = f"{kilobytes:.0f} kB" if kilobytes < 1e3 else f"{kilobytes / 1e3:.1f} MB"
    return f"{amount} {'more' if more_bytes > 0 else 'less'} are kept on disk than by {baseline}."
