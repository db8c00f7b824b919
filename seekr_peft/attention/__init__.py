"""Attention capture: a model's attention calls, the rows of its selected heads, and the divergence of two models' rows.

``models`` finds the attention modules and ``tap`` records their calls as ``capture.AttentionCall``. A call's q and k
become ``rows`` (of the heads in ``pairs``, under ``masks``), these their KL in ``row_divergence``, which
``triton_launch`` computes with ``triton_kernels`` on a GPU; ``gradient_norms`` says how much the loss leans on them.
"""

from .capture import AttentionCall
from .models import attention_modules, head_shape
from .row_divergence import row_kl
from .rows import RowInputs, row_probabilities
from .tap import AttentionTap

__all__ = [
    "AttentionCall",
    "AttentionTap",
    "RowInputs",
    "attention_modules",
    "head_shape",
    "row_kl",
    "row_probabilities",
]
