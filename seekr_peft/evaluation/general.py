"""General ability: what a model can do besides the tasks, by multiple choice and by the loss on held-out text."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, cut, shown
from ..tasks import AnswerCollator, prepare_tokenizer
from ..tasks.samples import check_text
from ..tasks.table_files import TABLE_SUFFIXES, named, read_rows, read_text
from ..tasks.text import TextCodec, plain_ids
from ..tasks.tokenize import IGNORED_LABEL, shortened
from ..types import Model, Tokenizer

UNITS = {"choice": "fraction right", "text": "nats per token"}
"""What the value of each kind of test is."""

_CHARACTERS_PER_TOKEN = 16
_TOKENS_PER_FORWARD = 1024


@dataclass(frozen=True)
class GeneralTest:
    """One test by name and file: multiple choice from a file of rows, the loss on text from a .txt file."""

    name: str
    path: Path

    @property
    def kind(self) -> Literal["choice", "text"]:
        """Which of the two measurements it is."""
        return "text" if self.path.suffix == ".txt" else "choice"

    def to_dict(self) -> dict[str, str]:
        """Name, kind, unit and file, ready for JSON."""
        return {"name": self.name, "kind": self.kind, "unit": UNITS[self.kind], "file": str(self.path)}

    def describe(self, value: float | None) -> str:
        """A value with its name and unit; None stands for one that is not finite."""
        if value is None:
            return f"{self.name} not finite"
        return f"{self.name} {100 * value:.1f} % right" if self.kind == "choice" else f"{self.name} {value:.3f} nats"

    def measure(
        self, model: Model, tokenizer: Tokenizer, *, n_questions: int, max_tokens: int, batch_size: int, max_length: int
    ) -> float:
        """The test's value, in the unit of its kind; see ``multiple_choice`` and ``text_loss``.

        Of a longer file ``n_questions`` are drawn, by the test's name alone: the same in every run and after every
        task.
        """
        if self.kind == "text":
            # All the logits of a window come back at once; a short window leaves room for several.
            batch_size = max(1, min(batch_size, _TOKENS_PER_FORWARD // max_length))
            return text_loss(model, tokenizer, read_text(self.path), max_tokens, max_length, batch_size)
        questions = read_questions(self.path)
        # Random hashes a string seed with SHA-512, hence the same draw in every process.
        drawn = random.Random(self.name).sample(questions, min(n_questions, len(questions)))
        return multiple_choice(model, tokenizer, drawn, batch_size, max_length)


def find_general_tests(
    names: Sequence[str], general_path: str | Path | None, tasks_path: str | Path | None
) -> tuple[list[GeneralTest], list[str]]:
    """The tests of these names, and what is wrong with them, one sentence each; reads file names only.

    The test NAME is FOLDER/NAME/test.jsonl (multiple choice; or .csv, .tsv, .parquet) or FOLDER/text/NAME.txt
    (plain text). FOLDER is ``general_path``, or without it ``tasks_path`` or the folder around that, where benchmarks
    are often kept together.
    """
    if general_path:
        folders = [Path(general_path)]
    else:
        # abspath: the folder around "." is not "." itself.
        folders = [Path(tasks_path), Path(os.path.abspath(tasks_path)).parent] if tasks_path else []
    tests, problems = [], []
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            problems.append(f"{shown(name)} is named more than once; name it once.")
        found = next(filter(None, (_files_of(name, folder) for folder in folders)), [])
        if len(found) == 1:
            tests.append(GeneralTest(name, found[0]))
        else:
            problems.append(_not_one(name, found, folders))
    return tests, problems


def _files_of(name: str, folder: Path) -> list[Path]:
    """The files that are a test of this name in a folder; of rows before text, if both are there."""
    tables = [folder / name / f"test{suffix}" for suffix in TABLE_SUFFIXES]
    return [file for file in tables if os.path.isfile(file)] or [
        file for file in [folder / "text" / f"{name}.txt"] if os.path.isfile(file)
    ]


def _not_one(name: str, found: list[Path], folders: list[Path]) -> str:
    if found:
        return f"the test {shown(name, 60)} is there twice, {named(found[0])} and {named(found[1])}; keep one of them."
    places = [place for folder in folders for place in (folder / name / "test.jsonl", folder / f"text/{name}.txt")]
    looked = (
        f"none of {', '.join(cut(named(place), 130) for place in places)} is there"
        if places
        else "there is no folder to look in"
    )
    short = cut(named(name), 60)
    return (
        f"the test {shown(name, 60)} was not found, {looked}; set evaluation.general_path to the folder that holds "
        f"{short}/test.jsonl (multiple choice) or text/{short}.txt (plain text)."
    )


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The questions of a file of rows as {'question': text, 'choices': texts, 'answer': index of the right one}.

    A row may also give its choices as 'choice0', 'choice1', ... and its answer as digits; other keys are ignored.

    Raises:
        DataError: no question, or a row that is none; names file and line.
    """
    questions = [_checked_question(row, place) for place, row in read_rows(path).rows]
    if not questions:
        raise DataError(f"{named(path)} holds no questions; a multiple-choice test needs at least one.")
    return questions


def _checked_question(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"{place} is a {type(row).__name__}, not an object with question, choices and answer.")
    numbered = [row[key] for key in (f"choice{index}" for index in range(len(row))) if key in row]
    question, choices, answer = row.get("question"), row.get("choices", numbered), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{place}: 'question' is {shown(question)}; it must be a text that is not empty.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{place}: the choices are {shown(choices)}; give two texts or more, none of them empty.")
    for name, text in (("'question'", question), *(("a choice", choice) for choice in choices)):
        check_text(text, name, place)
    index = int(answer) if isinstance(answer, str) and answer.isdecimal() else answer
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
        raise DataError(f"{place}: 'answer' is {shown(answer)}; it must be the index of one of {len(choices)} choices.")
    return {"question": question, "choices": choices, "answer": index}


def multiple_choice(
    model: Model, tokenizer: Tokenizer, questions: Sequence[Mapping[str, Any]], batch_size: int, max_length: int
) -> float:
    """The fraction of ``questions`` whose right choice has the highest score; of equal scores the first counts.

    The score of a choice is the mean log-probability per token (nats) of its own text after "Question: ...\\nAnswer:".
    This is the cloze form: the choices are not listed in the prompt and no letter is asked for, because small base
    models do not tie letters to choices. The mean instead of the sum keeps long choices from losing for their length
    (``acc_norm`` of the lm-evaluation-harness, there per byte). Chance level is 1 / number of choices.

    The model is in eval mode meanwhile; every module's mode is as before afterwards. Logits are computed only where
    some choice of the batch is predicted, and only those of the choices' own tokens go through a softmax.

    Args:
        questions: each with question (text), choices (texts) and answer (index of the right one).
        batch_size: choices a forward pass; each is a sequence of its own, padded on the right.
        max_length: tokens of prompt and choice at most. A longer prompt loses its middle, the same for all choices of
            a question; a choice loses what goes beyond half of ``max_length``.
    """
    import torch
    import torch.nn.functional as F

    from ..model.answers import answer_logits, evaluation_mode
    from ..model.facts import ModelFacts

    prepare_tokenizer(tokenizer)
    samples = [sample for question in questions for sample in _choice_samples(tokenizer, question, max_length)]
    collate = AnswerCollator(tokenizer.pad_token_id)
    device = ModelFacts.of(model).device
    scores = [0.0] * len(samples)
    # The longest first: what fits into memory once goes on fitting.
    longest_first = sorted(range(len(samples)), key=lambda index: -len(samples[index]["input_ids"]))
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(samples), batch_size):
            batch = longest_first[start : start + batch_size]
            inputs = {key: tensor.to(device) for key, tensor in collate([samples[index] for index in batch]).items()}
            logits, targets = answer_logits(model, **inputs)
            losses = F.cross_entropy(logits.float(), targets, reduction="none")
            parts = losses.split([samples[index]["n_answer"] for index in batch])
            for index, part in zip(batch, parts, strict=True):
                scores[index] = -float(part.mean())
    right, first = 0, 0
    for question in questions:
        own = scores[first : first + len(question["choices"])]
        right += own.index(max(own)) == question["answer"]
        first += len(own)
    return right / len(questions)


def _choice_samples(tokenizer: Tokenizer, question: Mapping[str, Any], max_length: int) -> list[dict[str, Any]]:
    """One sample a choice, without end-of-sequence: ``input_ids``, ``labels`` (-100 on the prompt) and ``n_answer``."""
    codec, texts = TextCodec(tokenizer), question["choices"]
    questions = codec.questions([f"Question: {question['question'].strip()}\nAnswer:"] * len(texts))
    whole = codec.prompt_ids(questions)
    choices = [answer.ids[:-1][: max_length // 2] for answer in codec.answers(questions, whole, texts, "choice")]
    if not all(choices):
        raise DataError(f"The choices {shown(question['choices'])} have one without tokens in the model's vocabulary.")
    prompt = shortened(codec, questions[0], whole[0], max_length - max(map(len, choices)))
    ignored = [IGNORED_LABEL] * len(prompt)
    return [{"input_ids": prompt + ids, "labels": ignored + ids, "n_answer": len(ids)} for ids in choices]


def text_loss(model: Model, tokenizer: Tokenizer, text: str, max_tokens: int, window: int, batch_size: int) -> float:
    """Mean cross-entropy of the first ``max_tokens`` tokens of ``text``, in nats per token; its exp is the perplexity.

    The tokens are cut into windows that do not overlap and do not see one another. Each window begins with the special
    tokens that the tokenizer puts in front of a text; without any, a window's first token is not predicted.

    The model is in eval mode meanwhile; every module's mode is as before afterwards. The softmax is taken in float32,
    one window at a time.

    Args:
        window: tokens of a window, special tokens included; at most the model's positions.
        batch_size: windows a forward pass, whose logits (batch_size, window, vocabulary) the model returns at once.

    Raises:
        DataError: the text has too few tokens to predict one.
    """
    import torch
    import torch.nn.functional as F

    from ..model.answers import evaluation_mode
    from ..model.facts import ModelFacts

    prepare_tokenizer(tokenizer)
    front = TextCodec(tokenizer).front
    # A tokenizer reads all it is given; hardly any text has so many characters a token.
    beginning = text[: _CHARACTERS_PER_TOKEN * max_tokens]
    ids = plain_ids(tokenizer, [beginning])[0][:max_tokens]
    room, given = window - len(front), max(len(front), 1)
    windows = [front + ids[start : start + room] for start in range(0, len(ids), room)]
    windows = [row for row in windows if len(row) > given]
    if not windows:
        raise DataError(f"The held-out text {shown(text, 60)} has too few tokens to measure a loss; give a longer one.")
    collate = AnswerCollator(tokenizer.pad_token_id)
    device = ModelFacts.of(model).device
    total = 0.0
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(windows), batch_size):
            rows = windows[start : start + batch_size]
            inputs = {name: tensor.to(device) for name, tensor in collate([{"input_ids": row} for row in rows]).items()}
            logits = model(**inputs, use_cache=False).logits
            for row, own in zip(rows, logits, strict=True):
                targets = torch.tensor(row[given:], device=own.device)
                total += float(F.cross_entropy(own[given - 1 : len(row) - 1].float(), targets, reduction="sum"))
    return total / sum(len(row) - given for row in windows)
