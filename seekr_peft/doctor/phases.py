"""The phases of a run, each once on the meta device while the sizes of its tensors are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother

from ..attention import AttentionCall, AttentionTap, attention_modules, head_shape
from ..attention.models import base_transformer
from ..attention.pairs import HeadPairs
from ..config import SeekrConfig, budget_count
from ..errors import ConfigError, SeekrError
from ..heads import HeadSelection
from ..memory import ReplaySample
from ..model.answers import differentiable_input, evaluation_mode
from ..model.peak_memory import PeakMemory
from ..recipe import Recipe
from ..sparse import BROADEST, SparseDistribution
from .meta_model import EARLIER, GroupedProducts

_CACHES = ("past_key_values", "cache_params", "state")
"""What a model's output calls that which it keeps for the next token."""


def _peak(model: nn.Module, step: Callable[[], object]) -> int:
    model.zero_grad()
    with _counted(model) as memory:
        step()
    model.zero_grad()
    return memory.peak


@contextmanager
def _counted(model: nn.Module) -> Iterator[PeakMemory]:
    """The sizes of what is allocated inside, by the model's own code above all.

    Raises:
        ConfigError: That code does what no tensor without values can.
    """
    try:
        with PeakMemory() as memory, GroupedProducts():
            yield memory
    except (SeekrError, MemoryError):
        raise
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"model.name_or_path: the memory that {type(base_transformer(model)).__name__} needs cannot be predicted, "
            f"since its forward needs the values of its tensors and not only their sizes ({detail}); measure it by a "
            f"run with training.max_steps: 1."
        ) from error


def _tokens(batch: int, length: int) -> dict[str, Tensor]:
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return {"input_ids": tokens, "attention_mask": tokens}


def training_peak(recipe: Recipe, model: Any, length: int) -> int:
    """Forward and backward on a batch of the new task."""
    batch = _tokens(int(recipe.training.get("per_device_train_batch_size", 8)), length)
    smoothing = recipe.training.get("label_smoothing_factor")
    model.train()

    def step() -> None:
        if smoothing:
            # As the Trainer does.
            output = model(**batch, use_cache=False)
            LabelSmoother(smoothing)(output, batch["input_ids"], shift_labels=True).backward()
        else:
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()

    return _peak(model, step)


def replay_peak(
    recipe: Recipe, model: Any, sample: ReplaySample, answers: int, n_heads: int, logit_top_k: int, stored: int
) -> int:
    """Forward and backward on a replay batch, while the new task's gradient lies there."""
    method, length = recipe.method_config_as(SeekrConfig), len(sample.input_ids)
    batch_size = min(method.replay_batch_size, stored)
    if batch_size == 0:
        return 0
    batch = _tokens(batch_size, length)
    heads = _spread(method, model, n_heads)
    model.train()

    def step() -> None:
        teacher = _teacher(method, heads, batch_size, sample)

        def distance(layer: int, call: AttentionCall) -> Tensor:
            return call.pair_kl(*teacher[layer])

        with AttentionTap(model, heads, sample.queries, observe=distance) as tap:
            loss = _answer_loss(model, batch, answers)
            for value in tap.values.values():
                loss = loss + value
            loss.backward()

    # Entries in a batch are padded to the broadest row: a float32 probability each, and an index.
    entries = min(BROADEST * logit_top_k, int(model.config.get_text_config().vocab_size))
    return _peak(model, step) + batch_size * answers * 12 * entries


def _spread(method: SeekrConfig, model: nn.Module, n_heads: int) -> HeadSelection:
    """``n_heads`` over as many layers as a selection may take."""
    if not n_heads:
        return HeadSelection({})
    layers = list(attention_modules(model))
    if method.head_choice != "all":
        layers = layers[-budget_count(method.layer_budget, len(layers)) :]
    share, left = divmod(n_heads, len(layers))
    counts = {layer: share + (i < left) for i, layer in enumerate(layers)}
    return HeadSelection({layer: range(count) for layer, count in counts.items() if count})


def _teacher(
    method: SeekrConfig, heads: HeadSelection, batch_size: int, sample: ReplaySample
) -> dict[int, tuple[HeadPairs, SparseDistribution, Tensor]]:
    """The stored rows of a replay batch, padded to the broadest, and their weights. Which heads a sample has does not
    matter, only how many."""
    k = min(BROADEST * method.row_top_k, len(sample.input_ids))
    found = {}
    for layer, chosen in heads.items():
        pairs = HeadPairs.of_all(torch.zeros(len(chosen), dtype=torch.long, device="meta"), batch_size)
        shape = 1, batch_size * len(chosen), len(sample.queries)
        indices = torch.zeros(*shape, k, dtype=torch.int32, device="meta")
        rows, remaining, weights = (torch.zeros(*size, device="meta") for size in ((*shape, k), shape, shape))
        found[layer] = pairs, SparseDistribution(indices, rows, remaining), weights
    return found


def scoring_peak(recipe: Recipe, model: Any, sample: ReplaySample, answers: int) -> int:
    """One sample, as ``score_heads`` does it: every head's rows before the task, those after it and the backward."""
    heads = HeadSelection({layer: range(head_shape(model)[1]) for layer in attention_modules(model)})
    method, batch = recipe.method_config_as(SeekrConfig), _tokens(1, len(sample.input_ids))
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def score() -> None:
        queries = sample.queries[None]
        with torch.no_grad(), _only_earlier(model), AttentionTap(model, heads, queries) as tap:
            _answer_loss(model, batch, answers, distils=False)
            before = {layer: found[0] for layer, found in tap.values.items()}
        del tap

        def change(layer: int, call: AttentionCall) -> Tensor:
            if layer not in before:
                return torch.zeros(())
            with torch.no_grad():
                return (call.rows()[0] - before.pop(layer)).square().sum(dim=(-1, -2))

        squares: Literal["every", "selected"] = "every" if method.sensitivity_queries == "all" else "selected"
        with AttentionTap(model, heads, queries, observe=change, squares=squares) as tap:
            tap.gradient_squares(_answer_loss(model, batch, answers, distils=False))

    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with evaluation_mode(model, checkpointing=True), differentiable_input(model):
            return _peak(model, score)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextmanager
def _only_earlier(model: Any) -> Iterator[None]:
    """The model as it was before the task."""
    shown = list(model.base_model.active_adapters)
    if EARLIER not in shown:
        # Its own adapter, with the values from before the task.
        yield
        return
    model.base_model.set_adapter([EARLIER], inference_mode=True)
    try:
        yield
    finally:
        model.base_model.set_adapter(shown, inference_mode=True)


def evaluation_peak(recipe: Recipe, model: Any, length: int) -> int:
    """The prompts of one batch, or their answers' last token: then the cache is full."""
    model.eval()
    batch_size, new = recipe.evaluation.batch_size, recipe.evaluation.max_new_tokens
    # A task that has ended is part of the frozen sum.
    with torch.no_grad(), _only_earlier(model), _counted(model) as memory:
        output = model(**_tokens(batch_size, length), use_cache=True, logits_to_keep=1)
    cache = next((output[name] for name in _CACHES if output.get(name) is not None), None)
    if cache is None:
        # Such a model (OpenAI's GPT) reads everything again for each token.
        with torch.no_grad(), _only_earlier(model), _counted(model) as memory:
            model(**_tokens(batch_size, length + new))
        return memory.peak
    # Layers of a state-space model keep a state that does not grow.
    parts = [part.nbytes for layer in getattr(cache, "layers", []) for part in _keys_and_values(layer)]
    # A token is joined to a layer's keys, and then to its values, by a copy of them.
    full_and_copy = (sum(parts) + max(parts, default=0)) * (length + new) // length
    return max(memory.peak, full_and_copy)


def _keys_and_values(layer: Any) -> list[Tensor]:
    found = (getattr(layer, name, None) for name in ("keys", "values"))
    return [part for part in found if isinstance(part, Tensor)]


def _answer_loss(model: Any, batch: dict[str, Tensor], answers: int, distils: bool = True) -> Tensor:
    """Cross-entropy at the answer positions only, as every replay step computes it."""
    logits = model(**batch, use_cache=False, logits_to_keep=answers).logits.flatten(0, 1)
    targets = torch.zeros(logits.shape[0], dtype=torch.long, device="meta")
    loss = F.cross_entropy(logits.float(), targets)
    # The labels' and the teacher's term each need the distribution.
    return loss + logits.float().log_softmax(dim=-1).mean() if distils else loss
