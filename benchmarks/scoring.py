"""Scoring one replay sample against what it cannot do without: two forwards and one backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.replay_step import build_model, make_sample
from benchmarks.timing import device_work, median_seconds, peak_bytes
from seekr_peft.losses import label_loss
from seekr_peft.memory import ReplaySample
from seekr_peft.methods.head_scores import score_heads
from seekr_peft.model.adapter_stack import AdapterStack
from seekr_peft.model.answers import answer_logits, evaluation_mode
from seekr_peft.model.facts import ModelFacts


def two_forwards_and_a_backward(stack: AdapterStack, sample: ReplaySample) -> None:
    """What scoring a sample cannot do without: its forward before and after the task, and the gradient down to the
    first layer."""
    model, facts = stack.model, ModelFacts.of(stack.model)
    embeddings = facts.input_embeddings
    ids = sample.input_ids[None].to(facts.device)
    labels = sample.labels[None].to(ids.device)
    with evaluation_mode(model, checkpointing=True):
        with torch.no_grad():
            label_loss(*answer_logits(model, ids, torch.ones_like(ids), labels))
        embedded = embeddings(ids).detach().requires_grad_()
        handle = embeddings.register_forward_hook(lambda module, args, output: embedded)
        with stack.frozen():
            loss = label_loss(*answer_logits(model, ids, torch.ones_like(ids), labels))
            torch.autograd.grad(loss, embedded)
        handle.remove()


def measure(length: int, repeats: int, device: str) -> dict[str, float]:
    """Median seconds, peak bytes and ratios to what cannot be done without: of scoring with the sensitivity over all
    queries, and over the drawn ones alone; of a GPU's own seconds too."""
    stack = AdapterStack(build_model(length, "sdpa", device))
    stack.begin()
    sample = make_sample(length)
    steps: dict[str, Callable[[], object]] = {
        "bare": lambda: two_forwards_and_a_backward(stack, sample),
        "scoring": lambda: score_heads(stack, [sample], every_query=True),
        "drawn": lambda: score_heads(stack, [sample], every_query=False),
    }
    peaks, medians = peak_bytes(steps, device), median_seconds(steps, repeats, device)
    work = device_work(steps, device)
    own = {"device_ratio": work["scoring"].seconds / work["bare"].seconds} if work else {}
    bare = {"bare_seconds": medians["bare"], "bare_peak": peaks["bare"], **own}
    for name in ("scoring", "drawn"):
        bare |= {f"{name}_ratio": medians[name] / medians["bare"], f"{name}_peak_ratio": peaks[name] / peaks["bare"]}
    return bare
