"""Evaluation: metrics, greedy answers, and the accuracy matrix of a task sequence.

A task's test split goes through ``generation`` into answers, through ``metrics`` into one score, and stands in
``matrix``; ``general`` measures what no task trains.

Importing it loads neither torch nor transformers nor rouge_score.
"""

from .generation import Evaluation, evaluate_task, generate_answers
from .matrix import FORMULAS, AccuracyMatrix
from .metrics import METRICS, exact_match, option_letter, rouge_l, score_predictions

__all__ = [
    "FORMULAS",
    "METRICS",
    "AccuracyMatrix",
    "Evaluation",
    "evaluate_task",
    "exact_match",
    "generate_answers",
    "option_letter",
    "rouge_l",
    "score_predictions",
]
