"""Evaluation: metrics, greedy answers, and the accuracy matrix of a task sequence.

Importing it loads neither torch nor transformers nor rouge_score.
"""

from seekr_peft.evaluation.generation import Evaluation, evaluate_task, generate_answers
from seekr_peft.evaluation.matrix import FORMULAS, AccuracyMatrix
from seekr_peft.evaluation.metrics import (
    METRICS,
    exact_match,
    option_letter,
    rouge_l,
    score_predictions,
)

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
