"""Answers of a model to prompts by greedy decoding, and the score of a task.

Imports `seekr_peft.errors`, `tasks` and `evaluation.metrics`; torch and transformers inside
functions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seekr_peft.errors import DataError
from seekr_peft.evaluation.metrics import score_predictions
from seekr_peft.tasks.task import Task
from seekr_peft.tasks.tokenize import (
    SMALLEST_MAX_LENGTH,
    AnswerCollator,
    encode_prompt,
    prepare_tokenizer,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Score of a task, from 0 to 1, and each test sample's prompt, answer, prediction and score."""

    score: float
    predictions: list[dict[str, Any]]


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    max_length: int = 512,
) -> Evaluation:
    """Answer the test prompts of `task` and score them with its metric; see `generate_answers`.

    Prompts are cut as in training: to what the task's longest answer leaves of `max_length`.
    """
    prepare_tokenizer(tokenizer)
    prompts, answers = list(task.test["prompt"]), list(task.test["answer"])
    given = "instruction" in task.test.column_names
    generated = generate_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_length=task.prompt_room(tokenizer, max_length),
        instructions=list(task.test["instruction"]) if given else None,
    )
    mean, scores = score_predictions(task.metric, generated, answers)
    columns = zip(prompts, answers, generated, scores, strict=True)
    names = ("prompt", "answer", "prediction", "score")
    return Evaluation(mean, [dict(zip(names, row, strict=True)) for row in columns])


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    max_length: int = 512,
    instructions: Sequence[str | None] | None = None,
) -> list[str]:
    """The greedy answer to each prompt, stripped, up to the end-of-sequence token.

    The model, plain or a PeftModel, is in eval mode meanwhile; every module's mode and the config's
    `use_cache` are as before afterwards. Prompts are batched by length, which changes the speed
    only: the answers come in the order of the prompts. A batch that does not fit into the GPU's
    memory is halved until it does.

    Args:
        max_new_tokens: tokens of an answer at most.
        max_length: tokens of a prompt at most, and at most what the model's positions leave beside
            the answer; longer ones lose the middle of their input.
        instructions: per prompt its leading part that is kept then.

    Raises:
        DataError: a number below 1, another number of instructions than prompts, a tokenizer
            without end-of-sequence, or a model whose positions leave no room for a prompt.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise DataError(f"{name} is {value!r}; it must be a whole number, 1 or more.")
    if instructions is None:
        instructions = [None] * len(prompts)
    if len(instructions) != len(prompts):
        raise DataError(f"There are {len(instructions)} instructions for {len(prompts)} prompts.")
    prepare_tokenizer(tokenizer)
    room = prompt_room(model, max_length, max_new_tokens)
    pairs = zip(prompts, instructions, strict=True)
    ids = [encode_prompt(tokenizer, prompt, room, instruction) for prompt, instruction in pairs]
    longest_first = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    answers = [""] * len(ids)
    with _answering(model):
        config = _greedy(tokenizer, max_new_tokens)
        while longest_first:
            batch = longest_first[:batch_size]
            texts = _fitting_batch(model, tokenizer, [ids[index] for index in batch], config)
            # Shorter prompts follow, so what fitted once goes on fitting.
            batch_size = len(texts)
            for index, text in zip(batch, texts, strict=False):
                answers[index] = text
            longest_first = longest_first[batch_size:]
    return answers


def _fitting_batch(model: Any, tokenizer: Any, ids: list[list[int]], config: GenerationConfig) -> list[str]:
    """Answers to as many of the first prompts as fit into memory: all of them, or a half, a quarter ... of them."""
    import torch

    while True:
        try:
            return _generate_batch(model, tokenizer, ids, config)
        except torch.cuda.OutOfMemoryError:
            if len(ids) == 1:
                raise
            logger.warning(
                "evaluation: %d prompts of %d tokens do not fit into memory, going on with %d; set "
                "evaluation.batch_size to that to save the attempt.",
                len(ids),
                len(ids[0]),
                len(ids) // 2,
            )
        # Outside of the handler, which would keep the failed batch alive.
        ids = ids[: len(ids) // 2]
        torch.cuda.empty_cache()


def _generate_batch(model: Any, tokenizer: Any, ids: list[list[int]], config: GenerationConfig) -> list[str]:
    """Answers to a batch of prompts; padded on the left, so that all answers begin together."""
    import torch

    collate = AnswerCollator(tokenizer.pad_token_id, padding_side="left")
    batch = collate([{"input_ids": row} for row in ids])
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=config)
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_decoded(tokenizer, row) for row in answers]


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    end = tokenizer.eos_token_id
    if end in ids:
        ids = ids[: ids.index(end)]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def _greedy(tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def prompt_room(model: Any, max_length: int, max_new_tokens: int) -> int:
    """Tokens a prompt may have: `max_length`, or what the model's positions leave."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return max_length
    room = positions - max_new_tokens
    if room < SMALLEST_MAX_LENGTH:
        raise DataError(
            f"max_new_tokens is {max_new_tokens}, but the model has {positions} positions for the "
            "prompt and the answer together; ask for fewer tokens."
        )
    return min(max_length, room)


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """Eval mode with a plain generation config; restores modes, config and use_cache."""
    from transformers import GenerationConfig

    modes = [(module, module.training) for module in model.modules()]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    generation_config = inner.generation_config
    use_cache = getattr(model.config, "use_cache", None)
    try:
        # generate() would merge the model's own settings (temperature, ...) into ours and warn.
        inner.generation_config = GenerationConfig()
        model.eval()
        yield
    finally:
        inner.generation_config = generation_config
        if use_cache is not None:
            model.config.use_cache = use_cache
        for module, training in modes:
            module.training = training
