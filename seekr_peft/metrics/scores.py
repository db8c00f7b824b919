"""Predictions to scores: calls a metric for each, and looks at what comes back."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

from ..errors import DataError, cut, shown
from .registry import Metric, find_metric, metric_name

# What the rounding of a mean of floats may add to 1 or take from 0.
_ROUNDING = 1e-9


def score_predictions(
    metric: str | Metric,
    predictions: Sequence[str],
    answers: Sequence[str],
    sources: Sequence[str] | None = None,
    place: str = "Sample",
) -> tuple[float, list[float]]:
    """Mean score and the score of each prediction, all from 0 to 1.

    Args:
        metric: a registered name, or the function itself.
        sources: what the answers were asked about, for a metric that looks at it.
        place: begins the message about a sample; its index follows.

    Raises:
        DataError: an unknown metric, no predictions, not as many as answers, no sources for a metric that needs them,
            or a metric that raises or gives something else than a number from 0 to 1.
    """
    function, name = find_metric(metric), metric_name(metric)
    if not predictions or len(predictions) != len(answers):
        raise DataError(
            f"There are {len(predictions)} predictions for {len(answers)} answers; a score needs "
            "one prediction an answer, and at least one."
        )
    keywords: list[dict[str, str]] = [{}] * len(answers)
    if _takes_source(function):
        if sources is None or len(sources) != len(answers):
            raise DataError(f"The metric {name} looks at the source of each answer; pass as many sources as answers.")
        keywords = [{"source": source} for source in sources]
    scores = []
    for index, (prediction, answer, keyword) in enumerate(zip(predictions, answers, keywords, strict=True)):
        where = f"{place} {index}: the metric {name}"
        try:
            value = function(prediction, answer, **keyword)
        except Exception as error:
            # A function of the user's own may raise anything.
            said = cut(f"{type(error).__name__}: {error}".removesuffix(": "), 100)
            raise DataError(f"{where} failed ({said}) for {_pair(prediction, answer)}; mend the function.") from error
        scores.append(_checked(value, where, prediction, answer))
    return sum(scores) / len(scores), scores


def _takes_source(metric: Metric) -> bool:
    try:
        return "source" in inspect.signature(metric).parameters
    except (TypeError, ValueError):
        # Some functions written in C do not tell.
        return False


def _checked(value: Any, where: str, prediction: str, answer: str) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    # NaN is in no interval.
    if not -_ROUNDING <= number <= 1 + _ROUNDING:
        percent = ", as percentages divided by 100 are" if 1 < number <= 100 else ""
        raise DataError(
            f"{where} gives {shown(value, 60)} for {_pair(prediction, answer)}; let the function return a number from "
            f"0 to 1{percent}."
        )
    return min(max(number, 0.0), 1.0)


def _pair(prediction: str, answer: str) -> str:
    return f"the prediction {shown(prediction, 60)} and the answer {shown(answer, 60)}"
