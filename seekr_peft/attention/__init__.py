"""Attention capture: the tap, the rows, and which models are supported. May import ``heads`` and ``errors``."""

from .call import AttentionCall
from .rows import RowInputs, TeacherRows, row_kl, row_probabilities
from .support import attention_modules, head_shape
from .tap import AttentionTap

__all__ = [
    "AttentionCall",
    "AttentionTap",
    "RowInputs",
    "TeacherRows",
    "attention_modules",
    "head_shape",
    "row_kl",
    "row_probabilities",
]
