"""General ability: both measurements against plain loops, which files a test is, and a run that keeps its values."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from support.small_run import read_json, small_recipe
from support.tiny_models import VOCABULARY, LargestOutput, tiny_gpt2, tiny_llama, with_lora
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from seekr_peft import run_recipe
from seekr_peft.demo import BASE_PATH
from seekr_peft.errors import DataError
from seekr_peft.evaluation.general import GeneralTest, find_general_tests, multiple_choice, read_questions, text_loss
from seekr_peft.report import read_run
from seekr_peft.training.trainer import ContinualTrainer

WORDS = [f"w{number}" for number in range(50)]


def make_tokenizer(padding_side: str = "right", with_beginning: bool = False) -> PreTrainedTokenizerFast:
    """A token a word; "Question:" and "Answer:" are words like any other."""
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "?", "Question:", "Answer:", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if with_beginning:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="?", bos_token="<s>", padding_side=padding_side
    )


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[index] for index in torch.randint(len(WORDS), (count,), generator=generator).tolist())


def make_questions(lengths: list[tuple[int, list[int]]]) -> list[dict[str, Any]]:
    """Questions of so many words with choices of so many words, all different; the answer is the first."""
    return [
        {
            "question": words(n_question, 1000 * number),
            "choices": [words(count, 1000 * number + place) for place, count in enumerate(counts, start=1)],
            "answer": 0,
        }
        for number, (n_question, counts) in enumerate(lengths)
    ]


QUESTIONS = make_questions(
    [(3, [1, 4, 2]), (11, [2, 2, 5, 1]), (1, [3, 1]), (7, [6, 1, 1, 2]), (5, [1, 2]), (9, [7, 3])]
)


def token_losses(model: Any, ids: list[int]) -> list[float]:
    """Nats of every token but the first, in float64, of one sequence alone."""
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return [-float(logs[place - 1, ids[place]]) for place in range(1, len(ids))]


def scores(model: Any, tokenizer: Any, question: dict[str, Any], average: bool = True) -> list[float]:
    found = []
    for choice in question["choices"]:
        prompt = tokenizer(f"Question: {question['question']}\nAnswer:")["input_ids"]
        losses = token_losses(model, prompt + tokenizer(choice, add_special_tokens=False)["input_ids"])
        own = losses[len(prompt) - 1 :]
        found.append(-sum(own) / (len(own) if average else 1))
    return found


def best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def answered(questions: list[dict[str, Any]], answers: list[int]) -> list[dict[str, Any]]:
    return [{**question, "answer": answer} for question, answer in zip(questions, answers, strict=True)]


# Multiple choice --------------------------------------------------------------------------------------------------


# GPT-2 has learnt positions: with it, padding that moved a token would show.
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_choice_with_the_best_mean_counts_whatever_the_batch(
    build: Any, padding_side: str, batch_size: int
) -> None:
    model, tokenizer = build().double(), make_tokenizer(padding_side, with_beginning=True)
    picks = [best(scores(model, tokenizer, question)) for question in QUESTIONS]
    assert len(set(picks)) > 1, "picks that are all alike would show no mistake in their order"
    others = [(pick + 1) % len(question["choices"]) for pick, question in zip(picks, QUESTIONS, strict=True)]
    for answers, right in ((picks, 6), (others, 0), (picks[:2] + others[2:], 2), (others[:5] + picks[5:], 1)):
        found = multiple_choice(model, tokenizer, answered(QUESTIONS, answers), batch_size, 64)
        assert found == pytest.approx(right / 6, abs=1e-12)


def test_the_sum_of_a_choice_would_pick_others() -> None:
    """Guards the test above, which would otherwise pass without the division by the length."""
    model, tokenizer = tiny_llama().double(), make_tokenizer()
    means = [best(scores(model, tokenizer, question)) for question in QUESTIONS]
    assert means != [best(scores(model, tokenizer, question, average=False)) for question in QUESTIONS]


_LLAMA = tiny_llama().double()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 9), min_size=2, max_size=5)), min_size=1, max_size=4
    ),
    st.integers(1, 9),
)
def test_no_lengths_or_batches_change_a_pick(lengths: list[tuple[int, list[int]]], batch_size: int) -> None:
    questions, tokenizer = make_questions(lengths), make_tokenizer()
    picks = [best(scores(_LLAMA, tokenizer, question)) for question in questions]
    assert multiple_choice(_LLAMA, tokenizer, answered(questions, picks), batch_size, 64) == 1.0


def test_a_model_that_knows_nothing_picks_the_first_choice() -> None:
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    questions = answered(QUESTIONS, [0, 1, 0, 2, 0, 1])
    assert multiple_choice(model, make_tokenizer(), questions, 4, 64) == 0.5


def test_a_long_question_loses_its_middle_and_its_choices_see_the_same_rest() -> None:
    model, tokenizer, seen = tiny_llama(), make_tokenizer(), []
    model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"][0].tolist()), with_kwargs=True
    )
    question = {"question": words(40, 1), "choices": ["w1 w2 w3", "w4", " ".join(["w5"] * 30)], "answer": 0}
    multiple_choice(model, tokenizer, [question], 1, 16)
    long, three, one = seen
    assert (len(long), len(three), len(one)) == (16, 11, 9), "a choice has half the room at most"
    prompt = one[:-1]
    assert prompt == three[:-3] == long[:-8] and len(prompt) == 8
    ids = tokenizer(f"Question: {question['question']}\nAnswer:")["input_ids"]
    assert prompt == ids[:4] + ids[-4:]


def test_only_the_positions_of_choices_meet_the_vocabulary() -> None:
    model = tiny_llama(vocab_size=5003)
    questions = make_questions([(60, [2, 1, 2, 2])])
    with LargestOutput() as largest:
        multiple_choice(model, make_tokenizer(), questions, 4, 128)
    # The output layer's own weights are the largest: 48 * 5003.
    assert largest.numel <= 48 * 5003 < 4 * 60 * 5003 / 4


def test_a_choice_without_tokens_is_refused() -> None:
    # A vocabulary without an unknown token drops what it does not have.
    inner = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    question = {"question": "a", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(DataError, match=r"The choices \['a', 'b'\] have one without tokens"):
        multiple_choice(tiny_llama(), tokenizer, [question], 4, 64)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"question": "cut \ud83d", "choices": ["a", "b"], "answer": 0}, "'question'"),
        ({"question": "q", "choices": ["a", "cut \ud83d"], "answer": 0}, "a choice"),
        ({"question": "q", "choice0": "cut \ud83d", "choice1": "b", "answer": "0"}, "a choice"),
    ],
)
def test_half_a_character_is_refused_with_file_and_line(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text("\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"test\.jsonl, line 2: {name} has at character 4 '\\ud83d', half of a"):
        read_questions(file)


# The loss on text -------------------------------------------------------------------------------------------------


def test_the_loss_on_one_window_is_the_cross_entropy() -> None:
    model, tokenizer = with_lora(tiny_llama()).eval(), make_tokenizer()
    ids = tokenizer(words(20, 3), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
    assert text_loss(model, tokenizer, words(20, 3), 100, 32, 4) == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) > 1.2 * math.log(VOCABULARY), "a model that guesses evenly would hide a shift by one"


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("with_beginning", [True, False])
@pytest.mark.parametrize("n_words", [29, 33, 34, 100])
def test_the_loss_is_the_mean_over_windows_that_stand_alone(
    build: Any, padding_side: str, with_beginning: bool, n_words: int
) -> None:
    model, tokenizer = build().double(), make_tokenizer(padding_side, with_beginning)
    front = [0] if with_beginning else []
    ids = tokenizer(words(n_words, 5), add_special_tokens=False)["input_ids"][:70]
    room = 11 - len(front)
    losses = [token_losses(model, front + ids[start : start + room]) for start in range(0, len(ids), room)]
    flat = [loss for own in losses for loss in own]
    found = text_loss(model, tokenizer, words(n_words, 5), 70, 11, 3)
    assert found == pytest.approx(sum(flat) / len(flat), rel=1e-6)


def test_a_model_that_knows_nothing_has_the_loss_of_an_even_guess() -> None:
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    assert text_loss(model, make_tokenizer(), words(50, 1), 40, 16, 2) == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_a_text_without_a_token_to_predict_is_refused() -> None:
    for text in ("", "w1"):
        with pytest.raises(DataError, match=f"text '{text}' has too few tokens"):
            text_loss(tiny_llama(), make_tokenizer(), text, 40, 16, 2)


# What is left alone -----------------------------------------------------------------------------------------------


def test_dropout_is_off_meanwhile_and_every_mode_is_restored() -> None:
    model, tokenizer = tiny_gpt2(resid_pdrop=0.5), make_tokenizer()
    model.train()
    model.transformer.h[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert text_loss(model, tokenizer, words(30, 1), 40, 16, 2) == text_loss(model, tokenizer, words(30, 1), 40, 16, 2)
    state = torch.random.get_rng_state()
    multiple_choice(model, tokenizer, QUESTIONS, 5, 64)
    assert torch.equal(state, torch.random.get_rng_state())
    assert {name: module.training for name, module in model.named_modules()} == before


# Which files a test is --------------------------------------------------------------------------------------------


def write_questions(path: Path, questions: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")


def write_data(folder: Path) -> None:
    write_questions(folder / "mmlu" / "test.jsonl", QUESTIONS)
    (folder / "text").mkdir()
    (folder / "text" / "story.txt").write_text(words(120, 9), encoding="utf-8")


def test_the_tests_are_found_in_their_folder_beside_the_tasks_or_around_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    choice, text = tmp_path / "mmlu" / "test.jsonl", tmp_path / "text" / "story.txt"
    (tmp_path / "tasks").mkdir()
    for places in ((tmp_path, None), (None, tmp_path), (None, tmp_path / "tasks"), (str(tmp_path), "elsewhere")):
        tests, problems = find_general_tests(["mmlu", "story"], *places)
        assert problems == []
        assert [(test.name, test.kind, test.path) for test in tests] == [
            ("mmlu", "choice", choice),
            ("story", "text", text),
        ]
    monkeypatch.chdir(tmp_path / "tasks")
    (test,), _ = find_general_tests(["mmlu"], None, ".")
    assert test.path.samefile(choice)


def test_the_drawn_questions_are_always_the_same_and_not_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_questions(tmp_path / "test.jsonl", make_questions([(2, [1, 1])] * 50))
    drawn: list[list[str]] = []
    monkeypatch.setattr(
        "seekr_peft.evaluation.general.multiple_choice",
        lambda model, tokenizer, questions, *rest: drawn.append([q["question"] for q in questions]) or 0.5,
    )
    test = GeneralTest("mmlu", tmp_path / "test.jsonl")
    for seed in (1, 2):
        torch.manual_seed(seed)
        test.measure(None, None, n_questions=20, max_tokens=9, batch_size=4, max_length=64)
    test.measure(None, None, n_questions=99, max_tokens=9, batch_size=4, max_length=64)
    every = [question["question"] for question in read_questions(tmp_path / "test.jsonl")]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 20 and drawn[0] != every[:20]
    assert sorted(drawn[2]) == sorted(every)


def test_choices_may_be_numbered_keys_and_the_answer_digits(tmp_path: Path) -> None:
    row = {"subject": "s", "question": "q", "choice0": "a", "choice1": "b", "choice2": "c", "answer": "2"}
    write_questions(tmp_path / "test.jsonl", [row])
    assert read_questions(tmp_path / "test.jsonl") == [{"question": "q", "choices": ["a", "b", "c"], "answer": 2}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], r"line 2 is a list, not an object"),
        ({"choices": ["a", "b"], "answer": 0}, r"line 2: 'question' is None; it must be a text"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, r"line 2: 'question' is ' '; it must be a text"),
        ({"question": "q", "choices": ["a"], "answer": 0}, r"line 2: the choices are \['a'\]; give two"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, r"line 2: the choices are \['a', ''\]; give two"),
        ({"question": "q", "answer": 0}, r"line 2: the choices are \[\]; give two"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, r"line 2: 'answer' is 2; it must be the index of one"),
        ({"question": "q", "choices": ["a", "b"], "answer": "B"}, r"'answer' is 'B'; .* index of one of 2 choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, r"'answer' is True; it must be the index"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, row: Any, message: str) -> None:
    write_questions(tmp_path / "test.jsonl", [QUESTIONS[0], row])
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "test.jsonl")


def test_a_file_without_questions_is_named(tmp_path: Path) -> None:
    write_questions(tmp_path / "test.jsonl", [])
    with pytest.raises(DataError, match=r"test\.jsonl holds no questions"):
        read_questions(tmp_path / "test.jsonl")


def test_mmlu_and_wikitext_are_read_and_measured(shared: Path) -> None:
    data, folder = shared / "data", shared / "models" / "nano-llama-3m"
    if not (data / "mmlu").is_dir() or not folder.is_dir():
        pytest.skip(f"needs data/mmlu and models/nano-llama-3m in {shared}; set SEEKR_SHARED to where they are")
    (mmlu, wikitext), problems = find_general_tests(["mmlu", "wikitext-2_test"], None, data / "trace")
    assert problems == []
    questions = read_questions(mmlu.path)
    assert len(questions) > 1000 and {len(question["choices"]) for question in questions} == {4}
    assert {question["answer"] for question in questions} == {0, 1, 2, 3}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    size = {"n_questions": 12, "max_tokens": 1000, "batch_size": 8, "max_length": 256}
    assert 0 <= mmlu.measure(model, tokenizer, **size) <= 1
    assert 4 < wikitext.measure(model, tokenizer, **size) < math.log(4096)


# A run ------------------------------------------------------------------------------------------------------------


def general_recipe(output_dir: Path, data: Path) -> dict[str, Any]:
    section = {"general": ["mmlu", "story"], "general_path": str(data), "general_samples": 4, "general_tokens": 64}
    return small_recipe(
        output_dir,
        n_tasks=2,
        evaluation={"max_new_tokens": 3, "batch_size": 8, **section},
        method={"name": "sequential"},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, str]:
    """A run that was never stopped and what it printed; tests only read it."""
    said = io.StringIO()
    directory = tmp_path_factory.mktemp("run") / "run"
    run_recipe(general_recipe(directory, data), console=Console(file=said, width=300))
    return directory, said.getvalue()


def test_a_run_measures_the_base_and_after_every_task(finished: tuple[Path, str], data: Path) -> None:
    directory, printed = finished
    found = read_json(directory / "general.json")
    assert found["tests"] == [
        {"name": "mmlu", "kind": "choice", "unit": "fraction right", "file": str(data / "mmlu" / "test.jsonl")},
        {"name": "story", "kind": "text", "unit": "nats per token", "file": str(data / "text" / "story.txt")},
    ]
    assert found["after"] == ["", "first", "last"]
    assert [len(values) for values in found["values"].values()] == [3, 3]
    base = AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE_PATH)
    for name, test in zip(("mmlu", "story"), find_general_tests(["mmlu", "story"], data, None)[0], strict=True):
        value = test.measure(base, tokenizer, n_questions=4, max_tokens=64, batch_size=8, max_length=128)
        assert found["values"][name][0] == pytest.approx(value, rel=1e-5), "the base model itself"
    assert len(set(found["values"]["story"])) == 3, "training changes what is measured"
    assert (
        "  general ability before the first task: mmlu " in printed and "  general ability after last: mmlu " in printed
    )
    for curve in read_run(directory).general:
        assert f"general ability: {curve.words()}" in printed
    assert (directory / "figures" / "general.png").is_file()


def test_measuring_does_not_change_what_is_trained(finished: tuple[Path, str], tmp_path: Path, data: Path) -> None:
    recipe = general_recipe(tmp_path / "run", data)
    recipe["evaluation"] = {"max_new_tokens": 3, "batch_size": 8}
    plain = run_recipe(recipe, console=Console(file=io.StringIO())).directory
    assert not (plain / "general.json").exists() and not (plain / "figures" / "general.png").exists()
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (finished[0], plain))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def stop_after(patched: pytest.MonkeyPatch, target: Any, name: str, count: int) -> list[Any]:
    """Let a method run ``count`` times, then kill; returns the calls' owners."""
    original, calls = getattr(target, name), []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(calls) == count:
            raise Killed
        calls.append(self)
        return original(self, *args, **kwargs)

    patched.setattr(target, name, counted)
    return calls


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_stopped_run_neither_loses_nor_repeats_a_measurement(
    count: int, finished: tuple[Path, str], tmp_path: Path, data: Path
) -> None:
    """Killed between the tests of the base, between those after task 1, and in those after task 2."""
    recipe = general_recipe(tmp_path / "run", data)
    for expected, limit, resume in ((count, count, False), (6 - count, 99, True)):
        with pytest.MonkeyPatch.context() as patched:
            calls = stop_after(patched, GeneralTest, "measure", limit)
            try:
                run_recipe(recipe, console=Console(file=io.StringIO()), resume=resume)
            except Killed:
                assert not resume
            assert len(calls) == expected
    assert read_json(tmp_path / "run" / "general.json") == read_json(finished[0] / "general.json")


def test_a_run_begun_again_measures_its_own_base(finished: tuple[Path, str], tmp_path: Path, data: Path) -> None:
    recipe = general_recipe(tmp_path / "run", data)
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, ContinualTrainer, "training_step", 1)
        with pytest.raises(Killed):
            run_recipe(recipe, console=Console(file=io.StringIO()))
    record = read_json(tmp_path / "run" / "general.json")
    assert record["after"] == [""]
    (tmp_path / "run" / "general.json").write_text(json.dumps({**record, "values": {"mmlu": [9.0], "story": [9.0]}}))
    assert [path.name for path in (tmp_path / "run").glob("tasks/*")] == []
    run_recipe(recipe, console=Console(file=io.StringIO()))
    assert read_json(tmp_path / "run" / "general.json") == read_json(finished[0] / "general.json")
