"""Scoring one replay sample against what it cannot do without: two forwards and one backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.replay_step import build_model, make_sample
from benchmarks.timing import median_seconds, peak_bytes
from seekr_peft.adapters import AdapterStack
from seekr_peft.forward import answer_logits, evaluation_mode, model_device
from seekr_peft.losses import label_loss
from seekr_peft.scoring import score_heads


def measure(length: int, repeats: int, device: str) -> dict[str, float]:
    """Median seconds of both, their ratio, and the peak bytes of both."""
    stack = AdapterStack(build_model(length, "sdpa", device))
    stack.begin()
    model, sample = stack.model, make_sample(length)
    ids = sample.input_ids[None].to(model_device(model))
    labels = sample.labels[None].to(ids.device)

    def bare() -> None:
        with evaluation_mode(model):
            with torch.no_grad():
                label_loss(*answer_logits(model, ids, torch.ones_like(ids), labels))
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded)
            with stack.frozen():
                loss = label_loss(*answer_logits(model, ids, torch.ones_like(ids), labels))
                torch.autograd.grad(loss, embedded)
            handle.remove()

    steps: dict[str, Callable[[], object]] = {"bare": bare, "scoring": lambda: score_heads(stack, [sample])}
    peaks, medians = peak_bytes(steps, device), median_seconds(steps, repeats, device)
    return {
        "bare_seconds": medians["bare"],
        "scoring_seconds": medians["scoring"],
        "ratio": medians["scoring"] / medians["bare"],
        "bare_peak": peaks["bare"],
        "scoring_peak": peaks["scoring"],
    }
