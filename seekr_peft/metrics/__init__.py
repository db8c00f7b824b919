"""Metrics: how one prediction is scored against one answer, each from 0 to 1, by the name that a task gives.

A task's name or function goes through ``registry`` to its function, and ``scores`` calls that for each prediction and
looks at what comes back; ``matching``, ``overlap`` and ``simplification`` hold the package's own.

Importing it loads neither torch nor rouge_score nor rapidfuzz.
"""

from .matching import exact_match, numeric_match, option_letter
from .overlap import edit_similarity, rouge_l, token_f1
from .registry import ENTRY_POINT_GROUP, METRICS, Metric, find_metric, metric_name, metric_names, register_metric
from .scores import score_predictions
from .simplification import sari

__all__ = [
    "ENTRY_POINT_GROUP",
    "METRICS",
    "Metric",
    "edit_similarity",
    "exact_match",
    "find_metric",
    "metric_name",
    "metric_names",
    "numeric_match",
    "option_letter",
    "register_metric",
    "rouge_l",
    "sari",
    "score_predictions",
    "token_f1",
]
