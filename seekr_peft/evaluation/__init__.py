"""Evaluation: greedy answers, their scores, and the accuracy matrix of a task sequence.

A task's test split goes through ``generation`` into answers, through the task's metric into one score, and stands in
``matrix``; ``general`` measures what no task trains.

Importing it loads neither torch nor transformers nor rouge_score.
"""

from .generation import Evaluation, evaluate_task, generate_answers
from .matrix import FORMULAS, AccuracyMatrix

__all__ = [
    "FORMULAS",
    "AccuracyMatrix",
    "Evaluation",
    "evaluate_task",
    "generate_answers",
]
