"""What the triton kernels are given, field by field, against their own parameters; needs no triton."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import seekr_peft.attention
from seekr_peft.attention import triton_launch
from seekr_peft.attention.masks import RowMask
from seekr_peft.attention.pairs import HeadPairs
from seekr_peft.attention.triton_arguments import (
    KeysArguments,
    RowsArguments,
    SpreadArguments,
    shared_strides,
    strides,
)
from seekr_peft.sparse import SparseDistribution

KERNELS = Path(seekr_peft.attention.__file__).parent / "triton_kernels.py"


def all_parameters(kernel: str) -> list[str]:
    tree = ast.parse(KERNELS.read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == kernel)
    return [argument.arg for argument in function.args.args]


def kernel_parameters(kernel: str) -> list[str]:
    """Those of a kernel that are no block sizes, in their order."""
    return [name for name in all_parameters(kernel) if not name.isupper()]


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


class Launches(ModuleType):
    """Stands in for ``triton_kernels`` and keeps what each of its kernels was given, by the kernel's own names."""

    def __init__(self) -> None:
        super().__init__("seekr_peft.attention.triton_kernels")
        self.given: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def __getattr__(self, kernel: str) -> Any:
        if not kernel.endswith("_kernel"):
            raise AttributeError(kernel)
        return _Kernel(kernel, self.given)


class _Kernel:
    def __init__(self, name: str, given: list[Any]) -> None:
        self.name, self.given = name, given

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.given.append((self.name, dict(zip(kernel_parameters(self.name), arguments, strict=True)), options))

        return launch


def test_each_launch_fills_every_parameter_and_the_strides_are_those_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches = Launches()
    monkeypatch.setitem(sys.modules, launches.__name__, launches)
    batch, n_queries, n_keys, dim = 2, 5, 12, 16
    # As models lay them out: position by position, head behind head.
    query = torch.randn(batch, 9, 4, dim).transpose(1, 2).requires_grad_()
    key = torch.randn(batch, n_keys, 2, dim).transpose(1, 2).requires_grad_()
    positions = torch.stack([torch.randperm(9)[:n_queries] for _ in range(batch)])
    mask = RowMask(torch.ones(batch, 1, n_queries, n_keys, dtype=torch.bool), torch.zeros(1, 2, n_queries, n_keys))
    pairs = HeadPairs.of_all(torch.tensor([0, 3]), batch)
    teacher = SparseDistribution.from_dense(torch.rand(1, 4, n_queries, n_keys).softmax(-1), 3)
    inputs = triton_launch.FusedInputs(query, key, pairs, positions, mask, 0.25)
    loss = triton_launch.row_kl(inputs, teacher, torch.ones(1, 1, n_queries))
    torch.autograd.grad(loss, (query, key))

    assert [name for name, *_ in launches.given] == ["rows_kernel", "keys_kernel", "spread_kernel"]
    for name, given, options in launches.given:
        blocks = [parameter for parameter in all_parameters(name) if parameter.isupper()]
        assert set(options) == {*blocks, "num_warps"}
        assert options["BLOCK_D"] == given["head_dim"] == dim
    (_, rows, _), (_, keys, _), (_, spread, _) = launches.given
    for name, axes in {"query": "bhtd", "key": "bhtd", "positions": "bq", "weights": "hq", "sees": "bhq"}.items():
        expected = [
            0 if (name, axis) == ("sees", "h") else stride
            for axis, stride in zip(axes, rows[name].stride(), strict=True)
        ]
        assert [rows[f"{name}_{axis}"] for axis in axes] == expected, name
    assert (rows["n_queries"], rows["n_keys"], rows["n_kept"], rows["group"], rows["scaling"]) == (5, 12, 3, 2, 0.25)
    # One weight and one view serve for all heads, which have biases of their own.
    assert (rows["weights_h"], rows["sees_h"], rows["addend_h"] > 0) == (0, 0, True)
    assert all(keys[name] is rows[name] for name in ("query", "positions", "sees", "rows"))
    assert all(keys[name] == rows[name] for name in keys if "_" in name and name != "key_gradient")
    for name in ("all_queries", "all_keys"):
        assert [spread[f"{name}_{axis}"] for axis in "bhtd"] == list(spread[name].stride())
    assert (spread["n_query_heads"], spread["n_key_heads"], spread["n_positions"], spread["n_keys"]) == (4, 2, 9, 12)
