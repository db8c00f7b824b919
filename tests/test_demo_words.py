"""The embedded demo's vocabulary, its four tasks and its base model."""

import random

import pytest

from seekr_peft.demo import BASE_PATH
from seekr_peft.tasks.demo_words import CUES, LIST_LENGTH, NOUNS, TASK_NAMES, base_lines, demo_tasks, vocabulary

MAX_BASE_BYTES = 4_000_000
POSITIONS = {"first": 1, "last": LIST_LENGTH, "third": 3, "second": 2}


@pytest.fixture(scope="module")
def tasks() -> list[dict]:
    return demo_tasks(seed=3, n_train=31, n_test=17)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE_PATH, local_files_only=True)


@pytest.fixture(scope="module")
def base():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE_PATH, local_files_only=True, dtype=torch.float32).eval()


def test_vocabulary_has_no_word_twice():
    assert len(vocabulary()) == len(set(vocabulary())) == 256


def test_tasks_have_the_asked_sizes(tasks):
    assert [task["name"] for task in tasks] == TASK_NAMES
    assert {(len(task["train"]), len(task["test"])) for task in tasks} == {(31, 17)}


def test_default_sizes():
    assert {(len(task["train"]), len(task["test"])) for task in demo_tasks(0)} == {(600, 100)}


def test_same_seed_gives_the_same_tasks(tasks):
    assert demo_tasks(seed=3, n_train=31, n_test=17) == tasks


def test_another_seed_gives_other_prompts(tasks):
    others = demo_tasks(seed=4, n_train=31, n_test=17)
    for task, other in zip(tasks, others, strict=True):
        assert task["train"] != other["train"]


def test_train_and_test_prompts_are_disjoint(tasks):
    for task in tasks:
        prompts = [sample["prompt"] for sample in task["train"] + task["test"]]
        assert len(set(prompts)) == 48


@pytest.mark.parametrize("name", TASK_NAMES)
def test_answer_is_the_noun_the_task_asks_for(tasks, name):
    task = tasks[TASK_NAMES.index(name)]
    for sample in task["train"] + task["test"]:
        cue, *nouns, separator = sample["prompt"].split()
        assert (cue, len(nouns), separator) == (CUES[name], LIST_LENGTH, "=")
        # The prompt's word 0 is the cue, so its word n is the n-th noun.
        assert sample["answer"] == sample["prompt"].split()[POSITIONS[name]]


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("first", "sable island hill flame grass door bus field =", "island"),
        ("last", "umber hedge cloud cream crane desert bean metal =", "metal"),
        ("third", "cobalt lodge night garden engine kettle farm barn =", "garden"),
        ("second", "scarlet apron bridge lock ocean cape lane copper =", "bridge"),
    ],
)
def test_first_sample_by_hand(name, prompt, answer):
    task = demo_tasks(seed=0)[TASK_NAMES.index(name)]
    assert task["train"][0] == {"prompt": prompt, "answer": answer}


def test_base_text_never_holds_a_cue():
    lines = base_lines(random.Random(0), 2000)
    words = {word for prompt, answer in lines for word in prompt + answer}
    assert set(NOUNS) <= words
    assert words.isdisjoint(CUES.values())


def test_base_is_at_most_4_megabytes():
    sizes = [file.stat().st_size for file in BASE_PATH.iterdir()]
    assert 0 < sum(sizes) <= MAX_BASE_BYTES


def test_base_folder_holds_a_complete_checkpoint():
    assert {file.name for file in BASE_PATH.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_saved_tokenizer_is_the_vocabulary(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == vocabulary()


def test_prompt_and_answer_become_one_token_a_word(tasks, tokenizer):
    sample = tasks[0]["test"][0]
    prompt = tokenizer(sample["prompt"])["input_ids"]
    answer = tokenizer(" " + sample["answer"], add_special_tokens=False)["input_ids"]
    assert len(prompt) == 1 + 1 + LIST_LENGTH + 1  # <bos>, cue, nouns, =
    assert prompt[0] == tokenizer.bos_token_id
    assert len(answer) == 1
    assert tokenizer.unk_token_id not in prompt + answer


def test_decoding_joins_words_with_spaces(tokenizer):
    text = "copy lamp fig lake = lamp fig lake"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_base_follows_the_instructions_it_was_trained_on(base, tokenizer):
    assert _answer(base, tokenizer, ["copy lamp crow fig ="]) == ["lamp crow fig"]


@pytest.mark.parametrize("name", TASK_NAMES)
def test_base_alone_does_not_solve_the_tasks(base, tokenizer, name):
    task = demo_tasks(seed=0, n_train=1, n_test=40)[TASK_NAMES.index(name)]
    answers = _answer(base, tokenizer, [sample["prompt"] for sample in task["test"]])
    right = [answer == sample["answer"] for answer, sample in zip(answers, task["test"], strict=True)]
    assert sum(right) / len(right) < 0.6


def _answer(base, tokenizer, prompts: list[str]) -> list[str]:
    """Greedy answers of the base to prompts of one length."""
    inputs = tokenizer(prompts, return_tensors="pt")
    output = base.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
