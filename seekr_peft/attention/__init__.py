"""Attention capture: a model's attention calls, the rows of its selected heads, and the divergence of two models' rows.

``models`` finds the attention modules, ``tap`` records their calls as ``capture.AttentionCall``, ``row_math`` turns a
call into rows and their KL, and ``triton_launch`` does the same with ``triton_kernels`` on a GPU.
"""

from .capture import AttentionCall
from .models import attention_modules, head_shape
from .row_math import RowInputs, TeacherRows, row_kl, row_probabilities
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
