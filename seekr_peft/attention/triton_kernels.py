"""Triton kernels of the row KL. Imported by ``triton_launch`` alone, and only where triton is.

A launch costs some 20 us of the host's time and the plain computation makes ninety of them a layer, which on a large
GPU take longer than their work. Here it is three: rows and their KL, the keys' gradient, and in the backward both
gradients in the shape of all heads. Everything is computed in float32.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from sample to sample and from layer to layer: a kernel compiled for each would cost seconds.
_COUNTS = ["n_queries", "n_keys", "n_kept", "n_positions", "group"]
_STRIDES = [f"{name}_{axis}" for name in ("positions", "addend", "sees", "weights") for axis in "bhqk"]
_CUT_OUT = [
    *("samples", "heads", "slots", "starts", "positions", "addend", "sees", "weights"),
    *("indices", "kept", "remaining", "losses", "outer"),
]


def _compiled(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        do_not_specialize=[name for name in names if name in _COUNTS + _STRIDES],
        do_not_specialize_on_alignment=[name for name in names if name in _CUT_OUT],
    )(function)


@_compiled
def rows_kernel(
    query,
    key,
    samples,
    heads,
    slots,
    positions,
    addend,
    sees,
    weights,
    indices,
    kept,
    remaining,
    rows,
    entries,
    losses,
    query_gradient,
    query_b,
    query_h,
    query_t,
    query_d,
    key_b,
    key_h,
    key_t,
    key_d,
    positions_b,
    positions_q,
    addend_b,
    addend_h,
    addend_q,
    addend_k,
    sees_b,
    sees_h,
    sees_q,
    weights_h,
    weights_q,
    n_queries,
    n_keys,
    n_kept,
    head_dim,
    group,
    scaling,
    DIFFERENTIABLE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Loss of ``BLOCK_Q`` rows of one pair (a head of a sample), and with ``DIFFERENTIABLE`` the gradients of their
    logits (left in ``rows``) and of their queries.

    ``rows`` (n_pairs, n_queries, n_keys) holds the masked logits, then minus infinity where an entry is stored,
    so that the other keys are summed directly and not as a difference from 1, then the gradient. ``entries``
    (n_pairs, n_queries, n_kept) holds the student's log-probabilities of the stored entries.
    """
    pair = tl.program_id(0)
    sample, slot = tl.load(samples + pair), tl.load(slots + pair)
    place = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    valid = place < n_queries
    row = pair * n_queries + place
    d = tl.arange(0, BLOCK_D)

    weight = tl.load(weights + pair * weights_h + place * weights_q, mask=valid, other=0.0)
    sighted = tl.load(sees + sample * sees_b + slot * sees_h + place * sees_q, mask=valid, other=0) != 0
    counts = valid & (weight > 0) & sighted
    weight = tl.where(counts, weight, 0.0)
    head = tl.load(heads + pair)
    position = tl.load(positions + sample * positions_b + place * positions_q, mask=counts, other=0)
    q = tl.load(
        query + sample * query_b + head * query_h + position[:, None] * query_t + d[None, :] * query_d,
        mask=counts[:, None] & (d[None, :] < head_dim),
        other=0.0,
    ).to(tl.float32)
    keys_of_head = key + sample * key_b + (head // group) * key_h
    addend_of_rows = addend + sample * addend_b + slot * addend_h + place[:, None] * addend_q

    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, n_keys, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < n_keys
        k = tl.load(
            keys_of_head + t[:, None] * key_t + d[None, :] * key_d,
            mask=inside[:, None] & (d[None, :] < head_dim),
            other=0.0,
        )
        logits = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision="ieee") * scaling
        logits += tl.load(addend_of_rows + t[None, :] * addend_k, mask=counts[:, None] & inside[None, :], other=0.0)
        # What a row that does not count holds, even NaN, reaches nobody.
        logits = tl.where(counts[:, None], logits, 0.0)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        tl.store(rows + row[:, None] * n_keys + t[None, :], logits, mask=valid[:, None] & inside[None, :])
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        # A block of keys that no row may see would subtract infinity from itself.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        highest = new_highest
    log_sum = highest + tl.log(total)
    tl.debug_barrier()

    rest = tl.load(remaining + row, mask=counts, other=0.0)
    mass = rest
    loss = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, n_kept, BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        at = row[:, None] * n_kept + entry[None, :]
        p = tl.load(kept + at, mask=counts[:, None] & (entry[None, :] < n_kept), other=0.0)
        # An entry of probability 0 is absent, so its key is one of the others.
        index = tl.load(indices + at, mask=p > 0, other=0)
        present = (p > 0) & (index >= 0) & (index < n_keys)
        # Never outside of the row, whatever is stored; a place that does not exist makes the loss NaN.
        loss += tl.sum(tl.where((p > 0) != present, float("nan"), 0.0), axis=1)
        cell = rows + row[:, None] * n_keys + index
        student = tl.load(cell, mask=present, other=0.0) - log_sum[:, None]
        loss += tl.sum(tl.where(present, p * (tl.log(tl.where(present, p, 1.0)) - student), 0.0), axis=1)
        mass += tl.sum(p, axis=1)
        tl.store(entries + at, student, mask=present)
        tl.debug_barrier()
        tl.store(cell, float("-inf"), mask=present)
    tl.debug_barrier()

    others = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, n_keys, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        logits = tl.load(
            rows + row[:, None] * n_keys + t[None, :],
            mask=valid[:, None] & (t[None, :] < n_keys),
            other=float("-inf"),
        )
        others += tl.sum(tl.exp(logits - log_sum[:, None]), axis=1)
    others = tl.maximum(others, 1.1754944e-38)
    loss += tl.where(rest > 0, rest * (tl.log(tl.where(rest > 0, rest, 1.0)) - tl.log(others)), 0.0)
    tl.store(losses + row, tl.where(counts, loss * weight, 0.0), mask=valid)

    if DIFFERENTIABLE:
        tl.debug_barrier()
        factor = (mass - rest / others) * weight
        for start in range(0, n_keys, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            cell = rows + row[:, None] * n_keys + t[None, :]
            inside = valid[:, None] & (t[None, :] < n_keys)
            student = tl.exp(tl.load(cell, mask=inside, other=float("-inf")) - log_sum[:, None])
            tl.store(cell, tl.where(counts[:, None], student * factor[:, None], 0.0), mask=inside)
        tl.debug_barrier()
        for start in range(0, n_kept, BLOCK_K):
            entry = start + tl.arange(0, BLOCK_K)
            at = row[:, None] * n_kept + entry[None, :]
            p = tl.load(kept + at, mask=counts[:, None] & (entry[None, :] < n_kept), other=0.0)
            index = tl.load(indices + at, mask=p > 0, other=0)
            present = (p > 0) & (index >= 0) & (index < n_keys)
            student = tl.exp(tl.load(entries + at, mask=present, other=0.0))
            gradient = (student * mass[:, None] - p) * weight[:, None]
            tl.store(rows + row[:, None] * n_keys + index, gradient, mask=present)
        tl.debug_barrier()
        for_queries = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for start in range(0, n_keys, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            inside = t < n_keys
            gradient = tl.load(
                rows + row[:, None] * n_keys + t[None, :], mask=valid[:, None] & inside[None, :], other=0.0
            )
            k = tl.load(
                keys_of_head + t[:, None] * key_t + d[None, :] * key_d,
                mask=inside[:, None] & (d[None, :] < head_dim),
                other=0.0,
            )
            for_queries += tl.dot(gradient, k.to(tl.float32), input_precision="ieee")
        tl.store(
            query_gradient + row[:, None] * head_dim + d[None, :],
            (for_queries * scaling).to(query_gradient.dtype.element_ty),
            mask=valid[:, None] & (d[None, :] < head_dim),
        )


@_compiled
def keys_kernel(
    query,
    samples,
    heads,
    slots,
    positions,
    sees,
    weights,
    rows,
    key_gradient,
    query_b,
    query_h,
    query_t,
    query_d,
    positions_b,
    positions_q,
    sees_b,
    sees_h,
    sees_q,
    weights_h,
    weights_q,
    n_queries,
    n_keys,
    head_dim,
    scaling,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of ``BLOCK_T`` keys of one pair, from the logits' gradient in ``rows``."""
    pair = tl.program_id(0)
    sample, slot = tl.load(samples + pair), tl.load(slots + pair)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    inside = t < n_keys
    of_head = query + sample * query_b + tl.load(heads + pair) * query_h
    for_keys = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, n_queries, BLOCK_Q):
        place = start + tl.arange(0, BLOCK_Q)
        row = pair * n_queries + place
        valid = place < n_queries
        weight = tl.load(weights + pair * weights_h + place * weights_q, mask=valid, other=0.0)
        sighted = tl.load(sees + sample * sees_b + slot * sees_h + place * sees_q, mask=valid, other=0) != 0
        counts = valid & (weight > 0) & sighted
        position = tl.load(positions + sample * positions_b + place * positions_q, mask=counts, other=0)
        q = tl.load(
            of_head + position[:, None] * query_t + d[None, :] * query_d,
            mask=counts[:, None] & (d[None, :] < head_dim),
            other=0.0,
        )
        gradient = tl.load(rows + row[:, None] * n_keys + t[None, :], mask=counts[:, None] & inside[None, :], other=0.0)
        for_keys += tl.dot(tl.trans(gradient), q.to(tl.float32), input_precision="ieee")
    tl.store(
        key_gradient + (pair * n_keys + t[:, None]) * head_dim + d[None, :],
        (for_keys * scaling).to(key_gradient.dtype.element_ty),
        mask=inside[:, None] & (d[None, :] < head_dim),
    )


@_compiled
def spread_kernel(
    outer,
    starts,
    heads,
    positions,
    query_gradient,
    key_gradient,
    all_queries,
    all_keys,
    positions_b,
    positions_q,
    all_queries_b,
    all_queries_h,
    all_queries_t,
    all_queries_d,
    all_keys_b,
    all_keys_h,
    all_keys_t,
    all_keys_d,
    n_query_heads,
    n_key_heads,
    n_queries,
    n_positions,
    n_keys,
    head_dim,
    group,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``outer`` times the gradients, where all heads' queries and keys lie, and 0 elsewhere. A sum over the sample's
    pairs and queries that share a place, so the order is always the same."""
    width = n_query_heads + n_key_heads
    sample, which = tl.program_id(0) // width, tl.program_id(0) % width
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    factor = tl.load(outer).to(tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    first, end = tl.load(starts + sample), tl.load(starts + sample + 1)
    if which < n_query_heads:
        for pair in range(first, end):
            if tl.load(heads + pair) == which:
                for start in range(0, n_queries, BLOCK_Q):
                    place = start + tl.arange(0, BLOCK_Q)
                    valid = place < n_queries
                    position = tl.load(positions + sample * positions_b + place * positions_q, mask=valid, other=-1)
                    row = pair * n_queries + place
                    own = tl.load(
                        query_gradient + row[:, None] * head_dim + d[None, :],
                        mask=valid[:, None] & (d[None, :] < head_dim),
                        other=0.0,
                    )
                    here = tl.where(position[None, :] == t[:, None], 1.0, 0.0)
                    total += tl.dot(here, own.to(tl.float32), input_precision="ieee")
        tl.store(
            all_queries
            + sample * all_queries_b
            + which * all_queries_h
            + t[:, None] * all_queries_t
            + d[None, :] * all_queries_d,
            (total * factor).to(all_queries.dtype.element_ty),
            mask=(t[:, None] < n_positions) & (d[None, :] < head_dim),
        )
    else:
        which -= n_query_heads
        inside = (t[:, None] < n_keys) & (d[None, :] < head_dim)
        for pair in range(first, end):
            if tl.load(heads + pair) // group == which:
                row = pair * n_keys + t
                total += tl.load(key_gradient + row[:, None] * head_dim + d[None, :], mask=inside, other=0.0).to(
                    tl.float32
                )
        tl.store(
            all_keys + sample * all_keys_b + which * all_keys_h + t[:, None] * all_keys_t + d[None, :] * all_keys_d,
            (total * factor).to(all_keys.dtype.element_ty),
            mask=inside,
        )
