"""The text of a sample there and back: its own tokens, the question asked, what is written down and how it scores."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parrot import Parrot, parrot, plain
from support.small_run import small_recipe
from support.tiny_models import tiny_llama
from support.tokenizer_zoo import EXACT, LOSSY, MODELS, UNIGRAM, ZOO, byte_level, characters, unigram, word_piece
from tokenizers import AddedToken

from seekr_peft import Task, run_recipe
from seekr_peft.errors import DataError
from seekr_peft.evaluation import evaluate_task, generate_answers
from seekr_peft.evaluation.general import multiple_choice
from seekr_peft.evaluation.generation import find_unreachable
from seekr_peft.tasks import encode, encode_prompt
from seekr_peft.tasks.text import TextCodec
from seekr_peft.tasks.tokenize import SampleTokens

CALL = '<tool_call>{"a": 1}</tool_call>'
PROMPTS = [
    "Q: which color?",
    "Answer: ",
    "def f(x):\n",
    "红色的苹果。答案：",
    "A\n\n",
    "x  ",
    "if x:\n    ",
    "\tone\t",
    " two",
    "😀",
]
ANSWERS = [
    "red",
    "    return x",
    "Question red",
    CALL,
    "\nred",
    "\tred\n\tgreen",
    "红",
    "😀 red",
    "Question",
    "a <tool_call> 1",
    "<tool_call>\nred",
]
PAIRS = [(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]


@lru_cache
def tokenizer_of(name: str) -> Any:
    """With special tokens of a user's own, and one that is not special."""
    tokenizer = ZOO[name]()
    tokenizer.add_tokens(["Question", "<tool_call>"], special_tokens=True)
    tokenizer.add_tokens(["</tool_call>"])
    return tokenizer


def text_of(prompt: str, answer: str) -> str:
    """The obvious rule: a space only where neither brings whitespace."""
    separator = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
    return prompt + separator + answer.rstrip()


def task_of(pairs: Sequence[tuple[Any, str]], **settings: Any) -> Task:
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
    return Task.from_records("t", rows, rows, **settings)


# ------------------------------------------------------------------ round trip


@pytest.mark.parametrize("name", EXACT)
def test_every_answer_comes_back_as_it_was_given(name: str) -> None:
    tokenizer = tokenizer_of(name)
    tokens = SampleTokens(tokenizer, *map(list, zip(*PAIRS, strict=True)))
    for (prompt, answer), question, ids, own in zip(
        PAIRS, tokens.questions, tokens.prompts, tokens.answers, strict=True
    ):
        assert tokens.codec.written(question, ids, own.ids) == answer, (prompt, answer)
        assert own.ids[-1] == tokenizer.eos_token_id
        whole = tokens.codec.front + plain(tokenizer, text_of(prompt, answer))
        assert own.own == (ids + own.ids[:-1] == whole), (prompt, answer)


NO_OTHER_TOKENS = ["gpt2", "gpt2 with a beginning", "llama2 without a space", "characters", "byt5"]


@pytest.mark.parametrize("name", NO_OTHER_TOKENS)
def test_most_tokenizers_keep_the_tokens_of_every_text(name: str) -> None:
    tokens = SampleTokens(tokenizer_of(name), *map(list, zip(*PAIRS, strict=True)))
    assert [pair for pair, own in zip(PAIRS, tokens.answers, strict=True) if not own.own] == []


@pytest.mark.parametrize(
    ("name", "count"), [("llama3", 1), ("prefix space", 20), ("llama2", 40), ("unigram first", 1), ("unigram never", 1)]
)
def test_where_a_tokenizer_does_not_allow_it_that_is_counted(name: str, count: int) -> None:
    """Breaks that are one token; a space that a tokenizer puts behind each special token."""
    tokens = SampleTokens(tokenizer_of(name), *map(list, zip(*PAIRS, strict=True)))
    assert sum(not own.own for own in tokens.answers) == count


@pytest.mark.parametrize("name", ["unigram always", "unigram first", "unigram never"])
def test_sentencepiece_gives_back_all_that_it_knows(name: str) -> None:
    known = [(prompt, answer) for prompt, answer in PAIRS if "😀" not in answer]
    tokens = SampleTokens(tokenizer_of(name), *map(list, zip(*known, strict=True)))
    rows = zip(tokens.questions, tokens.prompts, tokens.answers, strict=True)
    assert [tokens.codec.written(question, ids, own.ids) for question, ids, own in rows] == [pair[1] for pair in known]


PIECES = st.lists(
    st.sampled_from([*"ab \t\n红😀é{", "red", "  ", "Question", "<tool_call>", "</tool_call>"]), max_size=9
)


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=60, deadline=None)
@given(PIECES.map("".join).filter(str.strip), PIECES.map("".join).filter(str.strip))
def test_any_text_comes_back(name: str, prompt: str, answer: str) -> None:
    tokenizer = tokenizer_of(name)
    tokens = SampleTokens(tokenizer, [prompt], [answer])
    (question,), (ids,), (own,) = tokens.questions, tokens.prompts, tokens.answers
    whole = tokens.codec.front + plain(tokenizer, text_of(prompt, answer))
    assert (ids + own.ids[:-1] == whole) or not own.own
    assert ids == encode_prompt(tokenizer, prompt, 512) == encode(tokenizer, prompt, answer, 512).input_ids[: len(ids)]
    assert tokenizer.decode(ids + own.ids[:-1]) == tokenizer.decode(ids) + text_of(prompt, answer)[len(question.head) :]
    expected = answer.rstrip()
    if not prompt[-1].isspace() and expected[0] == " " and not expected[1].isspace():
        # One space is what stands between them anyway.
        expected = expected[1:]
    assert tokens.codec.written(question, ids, own.ids) == tokens.codec.reference(question, answer) == expected


@pytest.mark.parametrize("name", ["gpt2", "nano-llama-3m", "llama2", "byt5", "characters"])
def test_the_text_does_not_depend_on_the_batch(name: str) -> None:
    tokenizer = tokenizer_of(name) if name in ZOO else pytest.skip(f"{MODELS / name} is not there (SEEKR_SHARED)")
    tokens = SampleTokens(tokenizer, *map(list, zip(*PAIRS, strict=True)))
    alone = [encode(tokenizer, *pair, 512).input_ids for pair in PAIRS]
    assert alone == [ids + own.ids for ids, own in zip(tokens.prompts, tokens.answers, strict=True)]


def test_no_space_token_comes_before_an_answer() -> None:
    folder = MODELS / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (SEEKR_SHARED)")
    tokenizer = ZOO["stories260k"]()
    encoded = encode(tokenizer, "The color is", "red", 64)
    answer = [label for label in encoded.labels if label != -100]
    assert tokenizer.convert_ids_to_tokens(answer) == ["▁r", "ed", "</s>"]
    assert encoded.input_ids[:-1] == tokenizer("The color is red")["input_ids"]
    assert encode(tokenizer, "The color is ", "red", 64) == encoded


def test_a_space_at_the_end_of_a_prompt_goes_with_the_answer() -> None:
    tokenizer = byte_level()
    assert encode_prompt(tokenizer, "Answer: ", 64) == plain(tokenizer, "Answer:")
    assert encode(tokenizer, "Answer: ", "red", 64) == encode(tokenizer, "Answer:", "red", 64)


def test_a_break_goes_with_the_answer_where_it_is_one_token_with_the_indentation() -> None:
    """GPT-2 writes a break and all but one of the following spaces as one token, Llama 3 a colon and its break."""
    gpt2, llama3 = byte_level(), ZOO["llama3"]()
    assert gpt2.convert_ids_to_tokens(plain(gpt2, "x:\n    return"))[-2:] == ["ĊĠĠĠ", "Ġreturn"]
    assert encode_prompt(gpt2, "x:\n", 64) == plain(gpt2, "x:")
    assert encode_prompt(llama3, "x:\n", 64) == llama3("x:\n")["input_ids"]


def test_special_tokens_around_a_text_go_where_they_belong() -> None:
    bert, t5 = word_piece(), unigram("first")
    for tokenizer in (bert, t5):
        whole = tokenizer("the color red")["input_ids"]
        assert encode_prompt(tokenizer, "the color red", 64) == whole[:-1]
        assert encode(tokenizer, "the color", "red", 64).input_ids == whole


def test_a_separator_that_is_no_end_is_dropped_behind_a_prompt() -> None:
    tokenizer = word_piece()
    tokenizer.eos_token = "<unk>"
    assert encode_prompt(tokenizer, "the color", 64) == tokenizer("the color")["input_ids"][:-1]


def test_tokens_that_take_whitespace_with_them_do_not_lose_it() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tag>", lstrip=True, rstrip=True, special=True)])
    task = task_of([("Q:", "red <tag> green"), ("Q: 1", "<tag>\n  red")])
    assert evaluate_task(parrot(tokenizer, task), tokenizer, task).predictions[0]["prediction"] == "red <tag> green"
    assert find_unreachable(task, tokenizer) == []


# ------------------------------------------------------------ what is scored


@pytest.mark.parametrize("name", [name for name in [*EXACT, *UNIGRAM] if name != "byt5"])
@pytest.mark.parametrize("metric", ["accuracy", "rougeL"])
def test_what_was_learnt_by_heart_scores_full(name: str, metric: str) -> None:
    tokenizer = tokenizer_of(name)
    pairs = [(f"{place}{prompt}", ANSWERS[place % 7]) for place, prompt in enumerate(PROMPTS)]
    result = evaluate_task(parrot(tokenizer, task_of(pairs)), tokenizer, task_of(pairs, metric=metric))
    assert result.score == pytest.approx(1.0)
    assert [row["prediction"] for row in result.predictions] == [answer for _, answer in pairs]


def test_a_special_token_within_an_answer_is_written_down() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["Question"]})
    task = task_of([("Q:", "Question red")])
    assert evaluate_task(parrot(tokenizer, task), tokenizer, task).predictions == [
        {"prompt": "Q:", "answer": "Question red", "prediction": "Question red", "score": 1.0}
    ]


def test_an_option_letter_is_found_among_special_tokens() -> None:
    tokenizer = tokenizer_of("gpt2")
    task = task_of([("Which?", "<tool_call>(B)</tool_call>")], metric="option_letter")
    assert evaluate_task(parrot(tokenizer, task), tokenizer, task).score == 1.0


def test_code_without_its_indentation_is_wrong() -> None:
    tokenizer = byte_level()
    given, trained = task_of([("def f(x):\n", "    return x")]), task_of([("def f(x):\n", "return x")])
    assert evaluate_task(parrot(tokenizer, given), tokenizer, given).score == 1.0
    assert evaluate_task(parrot(tokenizer, trained), tokenizer, given).score == 0.0


def test_only_what_comes_before_the_end_counts() -> None:
    tokenizer = byte_level()
    end, red = tokenizer.eos_token_id, plain(tokenizer, " red")
    model = Parrot({tuple(plain(tokenizer, "Q:")): [*red, end, *red]}, red[0])
    assert generate_answers(model, tokenizer, ["Q:"], max_new_tokens=9) == ["red"]
    nothing = Parrot({tuple(plain(tokenizer, "Q:")): [end]}, red[0])
    assert generate_answers(nothing, tokenizer, ["Q:"], max_new_tokens=9) == [""]


def test_a_pad_token_that_a_model_writes_is_not_hidden() -> None:
    tokenizer = byte_level()
    tokenizer.pad_token = "<unk>"
    reply = [*plain(tokenizer, " red"), tokenizer.pad_token_id, tokenizer.eos_token_id]
    model = Parrot({tuple(plain(tokenizer, "Q:")): reply}, 0)
    assert generate_answers(model, tokenizer, ["Q:"], max_new_tokens=9) == ["red<unk>"]


def test_samples_with_other_tokens_than_their_text_are_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_of("llama3")
    task = task_of([("A\n\n", "\nred"), ("B\n\n", "\nred"), ("A:", "red")])
    with caplog.at_level(logging.WARNING):
        task.tokenized(tokenizer)
    (record,) = caplog.records
    assert (
        "Task 't': for 2 of 3 training samples the tokenizer's tokens of the whole text do not" in record.getMessage()
    )


def test_answers_that_a_tokenizer_cannot_write_are_told_once_with_an_example(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_piece()
    task = task_of([("q", "red"), ("w", "RED"), ("e", "red [1]"), ("r", "    return x")])
    assert find_unreachable(task, tokenizer) == [("red [1]", "red <unk> 1 <unk>"), ("    return x", "return x")]
    with caplog.at_level(logging.WARNING):
        evaluate_task(parrot(tokenizer, task), tokenizer, task)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "Task 't': 2 of 4 test answers can never be scored right by accuracy: 'red [1]' is read back from its own "
        "tokens as 'red <unk> 1 <unk>'; use a tokenizer that keeps these characters, or write the answers with others."
    ]


@pytest.mark.parametrize("name", LOSSY)
def test_tokenizers_of_words_ask_and_score_ordinary_answers(name: str) -> None:
    tokenizer = LOSSY[name]()
    word = tokenizer.decode([max(tokenizer.get_vocab().values())]).strip("# ")
    pairs = [("first\n", word), ("second: ", word), ("third", word)]
    # Words that it does not know would all be asked alike.
    if name == "demo":
        pairs = [(f"{word} " * count + end, word) for count, end in ((1, "\n"), (2, " "), (3, ""))]
    result = evaluate_task(parrot(tokenizer, task_of(pairs)), tokenizer, task_of(pairs))
    assert [row["prediction"] for row in result.predictions] == [word] * 3 and result.score == 1.0


@pytest.mark.parametrize("answer", ["red</s>", "a </s> b", "</s>red"])
def test_an_answer_with_an_end_in_it_is_refused_with_its_place(answer: str) -> None:
    task = task_of([("Q:", "red"), ("Q:", answer)])
    for refuse in (task.tokenized, task.check_texts):
        with pytest.raises(DataError, match=r"Task 't', train row 1: the answer .* holds '</s>', the token at which"):
            refuse(byte_level())
    with pytest.raises(DataError, match=r"Task 't', test row 1: the answer"):
        find_unreachable(task, byte_level())


def test_an_unknown_word_that_is_the_end_is_refused() -> None:
    tokenizer = characters()
    tokenizer.eos_token = "<unk>"
    with pytest.raises(DataError, match="train row 0: the answer 'ä' holds '<unk>'"):
        task_of([("Q:", "ä")]).tokenized(tokenizer)


def test_a_run_refuses_the_answers_of_a_later_task_before_it_trains(tmp_path: Path) -> None:
    rows = {"a": {"prompt": "w1", "answer": "w2"}, "b": {"prompt": "w1", "answer": "w2 <eos>"}}
    for name, row in rows.items():
        for split in ("train", "test"):
            (tmp_path / f"{name}.{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    recipe = small_recipe(tmp_path / "run", tasks={"format": "jsonl", "path": str(tmp_path)})
    with pytest.raises(DataError, match=r"Task 'b', train row 0: the answer 'w2 <eos>' holds '<eos>'"):
        run_recipe(recipe, report=False)
    assert not (tmp_path / "run" / "tasks").exists()


def test_a_run_refuses_a_chat_template_that_is_not_there_before_it_trains(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", 1)
    recipe["tasks"]["chat_template"] = True
    with pytest.raises(DataError, match=r"demo/base' has no chat template, with which messages are written; use"):
        run_recipe(recipe, report=False)
    assert not (tmp_path / "run" / "tasks").exists()


# ------------------------------------------------------------------- choices


def test_choices_have_the_tokens_of_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seen = ZOO["llama2"](), []

    def logits(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        seen.extend(zip(input_ids.tolist(), labels.tolist(), strict=True))
        return torch.zeros(int((labels != -100).sum()), 500), labels[labels != -100]

    monkeypatch.setattr("seekr_peft.model.answers.answer_logits", logits)
    question = {"question": "Which color?", "choices": ["red", "    return x"], "answer": 0}
    multiple_choice(tiny_llama(), tokenizer, [question], 1, 64)
    prompt = "Question: Which color?\nAnswer:"
    texts = {text_of(prompt, choice): choice for choice in question["choices"]}
    assert sorted(ids for ids, _ in seen) == sorted(tokenizer(text)["input_ids"] for text in texts)
    front = len(tokenizer(prompt)["input_ids"])
    assert all(labels[:front] == [-100] * front and -100 not in labels[front:] for _, labels in seen)


def test_the_special_tokens_in_front_are_found() -> None:
    expected: dict[str, Callable[[Any], list[int]]] = {
        "gpt2": lambda tokenizer: [],
        "llama3": lambda tokenizer: [tokenizer.bos_token_id],
        "wordpiece": lambda tokenizer: [tokenizer.bos_token_id],
        "byt5": lambda tokenizer: [],
    }
    for name, front in expected.items():
        assert TextCodec(ZOO[name]()).front == front(ZOO[name]())


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "llama2 without a space"])
@pytest.mark.parametrize("answer", ["    return x", "red", "a\n    b"])
def test_indentation_after_a_token_that_takes_the_whitespace_behind_it_is_kept(kind: str, answer: str) -> None:
    """As the turns of Phi-3's chats, which take the line break behind them."""
    from tokenizers import AddedToken

    tokenizer = ZOO[kind]()
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)], special_tokens=True)
    tokens = SampleTokens(tokenizer, ["q<|assistant|>\n"], [answer])
    written = tokens.codec.written(tokens.questions[0], tokens.prompts[0], tokens.answers[0].ids)
    assert written == answer
