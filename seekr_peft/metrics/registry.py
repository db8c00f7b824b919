"""The metrics by name: the package's own, those that a program registers, and those of other installed packages."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from ..errors import DataError, shown, suggestion
from .matching import exact_match, numeric_match, option_letter
from .overlap import edit_similarity, rouge_l, token_f1
from .simplification import sari

Metric = Callable[..., float]
"""``metric(prediction, answer)``, both texts, gives a number from 0 to 1. One with a parameter called ``source`` is
also given the prompt without its instruction, by that name."""

ENTRY_POINT_GROUP = "seekr_peft.metrics"
"""Other packages register a metric here: ``[project.entry-points."seekr_peft.metrics"] name = "module:function"``."""

METRICS: dict[str, Metric] = {
    "accuracy": exact_match,
    "option_letter": option_letter,
    "rougeL": rouge_l,
    "f1": token_f1,
    "numeric_match": numeric_match,
    "sari": sari,
    "edit_similarity": edit_similarity,
}
"""The metrics by the name that a task gives; ``register_metric`` adds one."""


def register_metric(name: str) -> Callable[[Metric], Metric]:
    """Decorator: the function is from now on the metric of that name, in this process.

    Raises:
        DataError: the name is no text, or another metric has it.
    """
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"The name of a metric is {shown(name)}; it must be a text that is not empty.")

    def register(metric: Metric) -> Metric:
        if name in metric_names() and METRICS.get(name) is not metric:
            raise DataError(f"The metric {shown(name)} is already there; register yours under another name.")
        METRICS[name] = _callable(metric, name)
        return metric

    return register


def metric_names() -> list[str]:
    """The registered names, then those of other installed packages."""
    return [*METRICS, *sorted(_entry_points().keys() - METRICS.keys())]


def find_metric(metric: str | Metric, place: str = "") -> Metric:
    """The function of a metric that is given by its name, or as the function itself.

    Args:
        place: begins the message.

    Raises:
        DataError: an unknown name, a function whose own name is another metric's, or an entry point that cannot be
            loaded.
    """
    beginning = f"{place}: the" if place else "The"
    if callable(metric):
        return _checked_name(metric, beginning)
    if isinstance(metric, str) and metric in METRICS:
        return METRICS[metric]
    point = _entry_points().get(metric) if isinstance(metric, str) else None
    if point is None:
        known = metric_names()
        raise DataError(
            f"{beginning} metric {shown(metric)} is unknown; choose one of {', '.join(known)}"
            f"{suggestion(metric, known)}, or pass a function of prediction and answer."
        )
    try:
        return _callable(point.load(), metric)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{beginning} metric {shown(metric)} of the entry point {shown(point.value)} cannot be loaded ({error}); "
            f"mend or remove the package that registers it."
        ) from error


def metric_name(metric: str | Metric) -> str:
    """What stands on disk and in messages for a metric: the name it is registered under, else the function's own."""
    if isinstance(metric, str):
        return metric
    registered = next((name for name, known in METRICS.items() if known is metric), None)
    return registered or str(getattr(metric, "__name__", type(metric).__name__))


def _entry_points() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _callable(metric: Any, name: str) -> Metric:
    if not callable(metric):
        raise DataError(
            f"The metric {shown(name)} is {shown(metric)}, not a function of prediction and answer; register one."
        )
    return metric  # type: ignore[no-any-return]


def _checked_name(metric: Metric, beginning: str) -> Metric:
    name = metric_name(metric)
    if METRICS.get(name, metric) is not metric:
        raise DataError(
            f"{beginning} metric is a function called {shown(name)}, which is the name of another metric; rename the "
            f"function, so that a stored score says which of the two gave it."
        )
    return metric
