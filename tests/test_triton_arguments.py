"""What the triton kernels are given, field by field, against their own parameters; needs no triton."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import seekr_peft.attention
from seekr_peft.attention.triton_arguments import (
    KeysArguments,
    RowsArguments,
    SpreadArguments,
    shared_strides,
    strides,
)

KERNELS = Path(seekr_peft.attention.__file__).parent / "triton_kernels.py"


def kernel_parameters(kernel: str) -> list[str]:
    """Those of a kernel that are no block sizes, in their order."""
    tree = ast.parse(KERNELS.read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == kernel)
    return [argument.arg for argument in function.args.args if not argument.arg.isupper()]


@pytest.mark.parametrize(
    ("kernel", "given"),
    [("rows_kernel", RowsArguments), ("keys_kernel", KeysArguments), ("spread_kernel", SpreadArguments)],
)
def test_a_kernel_is_given_what_it_names_in_its_order(kernel: str, given: type) -> None:
    assert kernel_parameters(kernel) == list(given._fields)


def test_the_keys_kernel_is_given_what_the_rows_kernel_was() -> None:
    rows = RowsArguments(**{name: name for name in RowsArguments._fields})
    keys = KeysArguments.after(rows, torch.ones(1))
    assert keys.key_gradient.item() == 1
    assert all(getattr(keys, name) == name for name in KeysArguments._fields if name != "key_gradient")


def test_strides_are_named_by_tensor_and_axis_and_an_axis_of_one_entry_serves_for_all() -> None:
    tensor = torch.zeros(2, 1, 5)
    assert strides("bhk", addend=tensor) == {"addend_b": 5, "addend_h": 5, "addend_k": 1}
    assert shared_strides("bhk", addend=tensor) == {"addend_b": 5, "addend_h": 0, "addend_k": 1}
