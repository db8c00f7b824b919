"""Answers of a model to prompts by greedy decoding, and the score of a task."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DataError, shown
from ..tasks.conversation import Conversation, Prompt
from ..tasks.task import Task, instructions_of, prompts_of
from ..tasks.text import TextCodec
from ..tasks.tokenize import SMALLEST_MAX_LENGTH, AnswerCollator, SampleTokens, prepare_tokenizer, shortened
from ..types import Model, Tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Score of a task, from 0 to 1, and each test sample's prompt, answer, prediction and score."""

    score: float
    predictions: list[dict[str, Any]]


def evaluate_task(
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    max_length: int = 512,
    check_answers: bool = True,
) -> Evaluation:
    """Answer the test prompts of ``task`` and score them with its metric; see ``generate_answers``.

    A model is asked the very tokens that stand before the answers in training, cut as there: to what the task's longest
    answer leaves of ``max_length``.

    Args:
        check_answers: warn of answers that can never be scored right; see ``find_unreachable``.

    Raises:
        DataError: the task has no test samples; and as ``generate_answers``.
    """
    test = task.test_set()
    prompts, answers = prompts_of(test), list(test["answer"])
    codec = TextCodec(prepare_tokenizer(tokenizer))
    if check_answers:
        warn_of_unreachable(task, tokenizer, max_new_tokens)
    generated = generate_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_length=task.prompt_room(tokenizer, max_length),
        instructions=instructions_of(test),
    )
    pairs = zip(codec.questions(prompts), answers, strict=True)
    mean, scores = task.score(generated, [codec.reference(*pair) for pair in pairs])
    columns = zip(test["prompt"], answers, generated, scores, strict=True)
    names = ("prompt", "answer", "prediction", "score")
    return Evaluation(mean, [dict(zip(names, row, strict=True)) for row in columns])


def find_unreachable(task: Task, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The test answers that a model cannot score with though it writes their own tokens, each with what it then wrote.

    So it is where a tokenizer drops, changes or does not know some characters, and for an answer without anything that
    the metric looks at.

    Raises:
        DataError: an answer with an end in it, or a chat template that refuses or is not there.
    """
    test = task.test_set()
    answers = list(test["answer"])
    tokens = SampleTokens(tokenizer, prompts_of(test), answers, f"Task '{task.name}', test row")
    rows = zip(tokens.questions, tokens.prompts, tokens.answers, strict=True)
    written = [tokens.codec.written(question, prompt, own.ids) for question, prompt, own in rows]
    references = [tokens.codec.reference(*pair) for pair in zip(tokens.questions, answers, strict=True)]
    _, scores = task.score(written, references)
    if min(scores) == 1.0:
        return []
    # What the answer itself is worth: nothing where it has no option letter, a little less than 1 in SARI.
    _, most = task.score(references, references)
    scored = zip(answers, written, scores, most, strict=True)
    return [(answer, text) for answer, text, score, best in scored if score < best or best == 0]


def warn_of_unreachable(task: Task, tokenizer: Tokenizer, max_new_tokens: int | None = None) -> None:
    """One warning with the number of ``find_unreachable`` and an example, one of answers that a chat template changes,
    and one of answers that are longer than ``max_new_tokens``; nothing where there are none."""
    n_test = len(task.test_set())
    changed = [*_changed_by_template(task.test, tokenizer), *_changed_by_template(task.train, tokenizer)]
    if changed:
        logger.warning(
            f"Task '{task.name}': the chat template changes {len(changed)} answers, such as {shown(changed[0], 60)}, "
            f"so that another text is trained than is scored; write them as the template leaves them (it may strip "
            f"whitespace)."
        )
    found = [pair for pair in find_unreachable(task, tokenizer) if pair[0] not in changed]
    if found:
        answer, written = found[0]
        logger.warning(
            f"Task '{task.name}': {len(found)} of {n_test} test answers can never be scored right by "
            f"{task.metric_name}: {shown(answer, 60)} is read back from its own tokens as {shown(written, 60)}; use a "
            f"tokenizer that keeps these characters, or write the answers with others."
        )
    lengths = [] if max_new_tokens is None else _answer_lengths(task, tokenizer)
    too_long = [length for length in lengths if length > (max_new_tokens or 0)]
    if too_long:
        logger.warning(
            f"Task '{task.name}': {len(too_long)} of {n_test} test answers need up to {max(too_long)} tokens, "
            f"but max_new_tokens is {max_new_tokens}, so they will be cut off; raise it (evaluation.max_new_tokens)."
        )


_LOOKED_AT = 200
"""Samples of a split whose conversations are written out to see what a chat template does to their answers."""


def _changed_by_template(split: Any, tokenizer: Tokenizer) -> list[str]:
    """Answers, of the split's first ones, that are not in the text of their sample."""
    rows = split.select(range(min(_LOOKED_AT, len(split))))
    codec = TextCodec(prepare_tokenizer(tokenizer))
    questions, answers = codec.questions(prompts_of(rows)), list(rows["answer"])
    if all(question.conversation is None for question in questions):
        return []
    return [a for a, tail in zip(answers, codec.tails(questions, answers), strict=True) if a.rstrip() not in tail]


def _answer_lengths(task: Task, tokenizer: Tokenizer) -> list[int]:
    """Tokens that a model has to write for each test answer, what leads to it included and its end not."""
    test = task.test_set()
    tokens = SampleTokens(tokenizer, prompts_of(test), list(test["answer"]), f"Task '{task.name}', test row")
    return [tokens.codec.length(answer.ids) for answer in tokens.answers]


def generate_answers(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt | Sequence[Mapping[str, Any]]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    max_length: int = 512,
    instructions: Sequence[str | None] | None = None,
) -> list[str]:
    """The greedy answer to each prompt, up to its end: end-of-sequence, or the end of a turn in the chat template.

    An answer is the text that follows the prompt, without what separates the two (see ``tasks.text``) and without
    whitespace at its end. Its own indentation and special tokens stay.

    The model, plain or a PeftModel, is in eval mode meanwhile; every module's mode and the config's
    ``use_cache`` are as before afterwards. Prompts are batched by length, which changes the speed
    only: the answers come in the order of the prompts. A batch that does not fit into the GPU's
    memory is halved until it does.

    Args:
        prompts: each a text, or messages (role and content) for the tokenizer's chat template.
        max_new_tokens: tokens of an answer at most.
        max_length: tokens of a prompt at most, and at most what the model's positions leave beside
            the answer; longer ones lose the middle of their input.
        instructions: per prompt its leading part that is kept then.

    Raises:
        DataError: a number below 1, another number of instructions than prompts, a tokenizer
            without end-of-sequence, or a model whose positions leave no room for a prompt.
    """
    from ..model.answers import evaluation_mode

    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise DataError(f"{name} is {shown(value)}; it must be a whole number, 1 or more.")
    if instructions is None:
        instructions = [None] * len(prompts)
    if len(instructions) != len(prompts):
        raise DataError(f"There are {len(instructions)} instructions for {len(prompts)} prompts.")
    codec = TextCodec(prepare_tokenizer(tokenizer))
    room = prompt_room(model, max_length, max_new_tokens)
    questions = codec.questions([_prompt(prompt) for prompt in prompts])
    rows = zip(questions, codec.prompt_ids(questions), instructions, strict=True)
    ids = [shortened(codec, question, whole, room, instruction) for question, whole, instruction in rows]
    longest_first = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    answers = [""] * len(ids)
    with evaluation_mode(model), _plain_generation(model):
        config = _greedy(tokenizer, sorted(codec.ends), max_new_tokens)
        while longest_first:
            batch = longest_first[:batch_size]
            written = _fitting_batch(model, tokenizer, [ids[index] for index in batch], config)
            # Shorter prompts follow, so what fitted once goes on fitting.
            batch_size = len(written)
            for index, row in zip(batch, written, strict=False):
                answers[index] = codec.written(questions[index], ids[index], row)
            longest_first = longest_first[batch_size:]
    return answers


def _fitting_batch(
    model: Model, tokenizer: Tokenizer, ids: list[list[int]], config: GenerationConfig
) -> list[list[int]]:
    """Ids of the answers to as many of the first prompts as fit into memory: to all of them, a half, a quarter ..."""
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


def _generate_batch(
    model: Model, tokenizer: Tokenizer, ids: list[list[int]], config: GenerationConfig
) -> list[list[int]]:
    """Ids of the answers to a batch of prompts; padded on the left, so that all answers begin together."""
    import torch

    collate = AnswerCollator(tokenizer.pad_token_id, padding_side="left")
    batch = collate([{"input_ids": row} for row in ids])
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=config)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def _prompt(prompt: Prompt | Sequence[Mapping[str, Any]]) -> Prompt:
    return prompt if isinstance(prompt, str | Conversation) else Conversation(prompt)


def _greedy(tokenizer: Tokenizer, ends: list[int], max_new_tokens: int) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
    )


def prompt_room(model: Model, max_length: int, max_new_tokens: int) -> int:
    """Tokens a prompt may have: ``max_length``, or what the model's positions leave."""
    from ..model.facts import ModelFacts

    positions = ModelFacts.of(model).positions
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
def _plain_generation(model: Model) -> Iterator[None]:
    """Without the model's own settings (temperature, ...), which generate() would merge into ours, and warn; they and
    ``use_cache`` are restored."""
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    generation_config = inner.generation_config
    use_cache = getattr(model.config, "use_cache", None)
    try:
        inner.generation_config = GenerationConfig()
        yield
    finally:
        inner.generation_config = generation_config
        if use_cache is not None:
            model.config.use_cache = use_cache
