"""What the triton kernels are given, by name: one tuple for each kernel, its fields in the order of its parameters.

A kernel takes plain numbers and places in memory, so each tensor comes with the strides of its axes: b sample, h head
(or slot), t position, q query, k key, d number of a head. A test holds each tuple and its kernel's parameters together.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowsArguments(NamedTuple):
    """Of ``rows_kernel``: which rows, the teacher's, where the student's and their losses go, and all sizes."""

    query: Tensor
    key: Tensor
    samples: Tensor
    heads: Tensor
    slots: Tensor
    positions: Tensor
    addend: Tensor
    sees: Tensor
    weights: Tensor
    indices: Tensor
    kept: Tensor
    remaining: Tensor
    rows: Tensor
    entries: Tensor
    losses: Tensor
    query_gradient: Tensor
    query_b: int
    query_h: int
    query_t: int
    query_d: int
    key_b: int
    key_h: int
    key_t: int
    key_d: int
    positions_b: int
    positions_q: int
    addend_b: int
    addend_h: int
    addend_q: int
    addend_k: int
    sees_b: int
    sees_h: int
    sees_q: int
    weights_h: int
    weights_q: int
    n_queries: int
    n_keys: int
    n_kept: int
    head_dim: int
    group: int
    scaling: float


class KeysArguments(NamedTuple):
    """Of ``keys_kernel``: the same rows, whose logits' gradient lies in ``rows``, and where the keys' gradient goes."""

    query: Tensor
    samples: Tensor
    heads: Tensor
    slots: Tensor
    positions: Tensor
    sees: Tensor
    weights: Tensor
    rows: Tensor
    key_gradient: Tensor
    query_b: int
    query_h: int
    query_t: int
    query_d: int
    positions_b: int
    positions_q: int
    sees_b: int
    sees_h: int
    sees_q: int
    weights_h: int
    weights_q: int
    n_queries: int
    n_keys: int
    head_dim: int
    scaling: float

    @classmethod
    def after(cls, rows: RowsArguments, key_gradient: Tensor) -> KeysArguments:
        """For the rows that ``rows_kernel`` was given."""
        shared = rows._asdict()
        return cls(key_gradient=key_gradient, **{name: shared[name] for name in cls._fields if name != "key_gradient"})


class SpreadArguments(NamedTuple):
    """Of ``spread_kernel``: the gradients of the pairs' queries and keys, and where all heads' gradients go."""

    outer: Tensor
    starts: Tensor
    heads: Tensor
    positions: Tensor
    query_gradient: Tensor
    key_gradient: Tensor
    all_queries: Tensor
    all_keys: Tensor
    positions_b: int
    positions_q: int
    all_queries_b: int
    all_queries_h: int
    all_queries_t: int
    all_queries_d: int
    all_keys_b: int
    all_keys_h: int
    all_keys_t: int
    all_keys_d: int
    n_query_heads: int
    n_key_heads: int
    n_queries: int
    n_positions: int
    n_keys: int
    head_dim: int
    group: int


def strides(axes: str, **tensors: Tensor) -> dict[str, int]:
    """Elements from one entry to the next along each of ``axes`` (a letter each), as ``query_b``, ``query_h`` ..."""
    return {
        f"{name}_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip(axes, tensor.stride(), strict=True)
    }


def shared_strides(axes: str, **tensors: Tensor) -> dict[str, int]:
    """The same, 0 along an axis of one entry, which so serves for all."""
    return {
        f"{name}_{axis}": 0 if size == 1 else stride
        for name, tensor in tensors.items()
        for axis, size, stride in zip(axes, tensor.shape, tensor.stride(), strict=True)
    }
