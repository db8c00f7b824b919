"""Conversations: which rows are some, and that what is trained, asked and scored is what the chat template writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.parrot import Parrot, parrot, plain
from support.small_run import read_lines, small_recipe
from support.tiny_models import tiny_llama
from support.tokenizer_zoo import byte_level, llama_bpe, unigram

from seekr_peft import ReplayMemory, Task, run_recipe
from seekr_peft.errors import DataError
from seekr_peft.evaluation import evaluate_task, generate_answers
from seekr_peft.evaluation.generation import find_unreachable, warn_of_unreachable
from seekr_peft.recipe import load_recipe
from seekr_peft.run.task_data import constant_answer_score, load_tasks
from seekr_peft.tasks import encode
from seekr_peft.tasks.task import prompts_of
from seekr_peft.tasks.tokenize import SampleTokens

CHATML = (
    "{% if tools %}{{ '<|im_start|>tools ' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no ' + m.role + ' here') }}{% endif %}{% endfor %}"
)
THINKING = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The prompt alone opens a thought that a whole conversation does not have.
OPENING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '|' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant|<think>' }}{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

MULTI_TURN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "def f(x):\n"},
]
QUESTIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Which color is it?"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "红色 😀"},
    ],
    [{"role": "user", "content": " three \n"}],
]
ANSWERS = ["red", "green.\nThe color is red", "红 é"]


def chat_tokenizer(template: str, build: Any = byte_level, **settings: Any) -> Any:
    tokenizer = build(**settings)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


KINDS = {
    "chatml": lambda: chat_tokenizer(CHATML),
    "chatml with a beginning before every text": lambda: chat_tokenizer(CHATML, front=True),
    "chatml in sentencepiece": lambda: chat_tokenizer(CHATML, llama_bpe),
    "llama2": lambda: chat_tokenizer(LLAMA2, llama_bpe),
    "llama2 in bytes": lambda: chat_tokenizer(LLAMA2, front=True),
    "llama2 in unigram": lambda: chat_tokenizer(LLAMA2, unigram, prepend="first"),
    "thinking": lambda: chat_tokenizer(THINKING, front=True),
    "opening": lambda: chat_tokenizer(OPENING),
    "endless": lambda: chat_tokenizer(ENDLESS),
}


def conversations(questions: Any = None, answers: Any = None) -> list[dict[str, Any]]:
    pairs = zip(questions or QUESTIONS, answers or ANSWERS, strict=True)
    return [
        {"prompt": question, "completion": [{"role": "assistant", "content": answer}]} for question, answer in pairs
    ]


def task_of(rows: list[dict[str, Any]], **settings: Any) -> Task:
    return Task.from_records("t", rows, rows, **settings)


def one(prompt: str, answer: str) -> list[dict[str, Any]]:
    return conversations([[{"role": "user", "content": prompt}]], [answer])


# ----------------------------------------------------- what TRL trains on


def trl_samples(tokenizer: Any, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, list[int]]]:
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], max_length=None, gradient_checkpointing=False
    )
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.SFTTrainer(
        model=tiny_llama(vocab_size=600),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return [{key: list(row[key]) for key in ("input_ids", "labels")} for row in trainer.train_dataset]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "endless"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning")
def test_conversations_become_what_trl_trains_on(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    ours = task_of(conversations()).tokenized(tokenizer).train.select_columns(["input_ids", "labels"])
    assert list(ours) == trl_samples(tokenizer, conversations(), tmp_path)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning")
def test_a_template_that_ends_in_a_space_is_asked_without_it_whatever_the_answer(tmp_path: Path) -> None:
    """TRL asks without the space where the answer's first token takes it, and with it elsewhere: by the answer."""
    tokenizer = KINDS["endless"]()
    ours = task_of(conversations()).tokenized(tokenizer).train
    theirs = trl_samples(tokenizer, conversations(), tmp_path)
    assert list(ours["input_ids"]) == [row["input_ids"] for row in theirs]
    assert list(ours["labels"])[:2] == [row["labels"] for row in theirs[:2]]
    prompts = [labels.count(-100) for labels in (ours[2]["labels"], theirs[2]["labels"])]
    assert prompts[1] - prompts[0] == 1 and tokenizer.decode(ours[2]["input_ids"][prompts[0] :]) == " 红 é\n"


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning")
def test_tools_and_system_messages_reach_the_template_as_they_do_in_trl(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    tools = json.dumps([{"type": "function", "function": {"name": "f"}}])
    rows = [{**conversations([MULTI_TURN], ["red"])[0], "tools": tools}]
    ours = task_of(rows).tokenized(tokenizer).train
    assert list(ours.select_columns(["input_ids", "labels"])) == trl_samples(tokenizer, rows, tmp_path)
    assert "<|im_start|>tools [" in tokenizer.decode(ours[0]["input_ids"])
    assert "<|im_start|>system\nBe brief.<|im_end|>" in tokenizer.decode(ours[0]["input_ids"])


# ------------------------------------------------------- asked and scored


@pytest.mark.parametrize("kind", KINDS)
def test_the_question_is_the_prompt_that_was_trained_and_no_beginning_is_doubled(kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokens = SampleTokens(tokenizer, prompts_of(task_of(conversations()).train), ANSWERS)
    for messages, ids, own in zip(QUESTIONS, tokens.prompts, tokens.answers, strict=True):
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # What the answer's tokens take with them, in a byte-level vocabulary its space.
        asked = asked.removesuffix("<think>").removesuffix(" ")
        assert ids == plain(tokenizer, asked) and own.own
        assert ids.count(tokenizer.bos_token_id) <= asked.count("<s>")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "endless"])
def test_what_was_learnt_by_heart_scores_full(kind: str) -> None:
    tokenizer = KINDS[kind]()
    task = task_of(conversations())
    result = evaluate_task(parrot(tokenizer, task), tokenizer, task)
    known = [answer for answer in ANSWERS if "unigram" not in kind or "😀" not in answer]
    assert [row["prediction"] for row in result.predictions] == known and result.score == 1.0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning")
def test_settings_of_a_row_reach_the_template_as_they_do_in_trl(tmp_path: Path) -> None:
    template = CHATML.replace(
        "{{ '<|im_start|>assistant\\n' }}",
        "{{ '<|im_start|>assistant\\n' }}{% if thinks is defined and not thinks %}{{ '<think></think>' }}{% endif %}",
    )
    template = template.replace(
        "+ m.role + '\\n' + m.content",
        "+ m.role + '\\n' + ('<think></think>' if m.role == 'assistant' and thinks is defined and not thinks else '')"
        " + m.content",
    )
    tokenizer = chat_tokenizer(template)
    rows = [{**row, "chat_template_kwargs": {"thinks": False, "other": None}} for row in conversations()]
    task = task_of(rows).tokenized(tokenizer)
    found = [{key: list(row[key]) for key in ("input_ids", "labels")} for row in task.train]
    assert found == trl_samples(tokenizer, rows, tmp_path)
    (question,) = SampleTokens(tokenizer, prompts_of(task.test)[:1], ANSWERS[:1]).questions
    assert question.head.endswith("<think></think>")
    with pytest.raises(DataError, match="'chat_template_kwargs' is 'thinks', not an object"):
        task_of([{**rows[0], "chat_template_kwargs": "thinks"}])


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "thinking"])
@pytest.mark.parametrize("content", ["red", None])
def test_what_an_answer_has_beside_its_text_is_refused_by_name(key: str, content: str | None) -> None:
    answer = {"role": "assistant", "content": content, "name": "a", "refusal": None, key: [{"name": "look"}]}
    for row in (
        {"messages": [*QUESTIONS[0], answer]},
        {"prompt": QUESTIONS[0], "completion": [answer]},
    ):
        with pytest.raises(DataError, match=f"train row 0: the assistant's message in .* has '{key}', which would not"):
            task_of([row])


def test_answers_that_a_template_changes_are_told_and_not_blamed_on_the_tokenizer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = chat_tokenizer(LLAMA2, llama_bpe)
    task = task_of([*one("x", "red"), *one("f", "    return x")])
    warn_of_unreachable(task, tokenizer)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "the chat template changes 2 answers, such as '    return x', so that another text is trained" in told


@pytest.mark.parametrize(("room", "cut"), [(2, 2), (3, 1), (9, 0)])
def test_answers_that_do_not_fit_are_told_before_they_are_asked(
    room: int, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = chat_tokenizer(CHATML)
    # One token a letter.
    rows = [{"prompt": "qqq", "answer": answer} for answer in ("zz", "zzz", "zzzz")]
    lengths = [len(tokenizer(" " + row["answer"])["input_ids"]) for row in rows]
    assert len(set(lengths)) == 3
    limit = {2: lengths[0], 3: lengths[1], 9: lengths[2]}[room]
    warn_of_unreachable(Task.from_records("long", rows, rows), tokenizer, limit)
    told = [record.getMessage() for record in caplog.records]
    expected = f"{cut} of 3 test answers need up to {lengths[2]} tokens, but max_new_tokens is {limit}, so they will"
    assert len(told) == (cut > 0) and all(expected in text for text in told)


def test_half_of_what_leads_to_an_answer_is_no_answer() -> None:
    tokenizer = chat_tokenizer(THINKING)
    (question,) = SampleTokens(tokenizer, prompts_of(task_of(conversations()).test)[:1], ["red"]).questions
    lead = question.lead
    assert len(lead) > 4
    assert [question.answer_in(lead[:size]) for size in range(len(lead) + 1)] == [""] * (len(lead) + 1)
    assert question.answer_in(lead + "red") == "red"


def test_an_answer_ends_at_the_end_of_a_turn_and_at_end_of_sequence() -> None:
    tokenizer = chat_tokenizer(CHATML)
    messages = [{"role": "user", "content": "one"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for end in ("<|im_end|>", "</s>"):
        model = Parrot({tuple(plain(tokenizer, prompt)): plain(tokenizer, f"red{end}\n green")}, 0)
        assert generate_answers(model, tokenizer, [messages], max_new_tokens=9) == ["red"]


def test_generation_stops_at_both_ends() -> None:
    tokenizer, seen = chat_tokenizer(CHATML), []

    class Recorder(Parrot):
        def generate(self, **arguments: Any) -> torch.Tensor:
            seen.append(arguments["generation_config"].eos_token_id)
            return super().generate(**arguments)

    for prompt in ([{"role": "user", "content": "one"}], "one"):
        text = prompt
        if not isinstance(prompt, str):
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        generate_answers(Recorder({tuple(plain(tokenizer, text)): [1]}, 0), tokenizer, [prompt], max_new_tokens=2)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert seen == [sorted([tokenizer.eos_token_id, end]), [tokenizer.eos_token_id]]


def test_indentation_that_a_template_keeps_is_kept_and_one_that_it_strips_is_told() -> None:
    rows = one("def f(x):\n", "    return x")
    kept, stripped = chat_tokenizer(CHATML), chat_tokenizer(LLAMA2)
    assert evaluate_task(parrot(kept, task_of(rows)), kept, task_of(rows)).score == 1.0
    assert find_unreachable(task_of(rows), kept) == []
    assert find_unreachable(task_of(rows), stripped) == [("    return x", "return x")]


def test_an_end_that_is_no_token_is_read_as_text_and_its_lack_is_told(caplog: pytest.LogCaptureFixture) -> None:
    spelt = byte_level()
    spelt.chat_template = CHATML
    task = task_of(conversations())
    assert evaluate_task(parrot(spelt, task), spelt, task).score == 1.0
    endless = KINDS["endless"]()
    with caplog.at_level(logging.WARNING):
        task.tokenized(endless)
    assert "the tokenizer's chat template ends an answer with no token of its own" in caplog.text
    assert find_unreachable(task, endless) == [("green.\nThe color is red", "green.")]


def test_an_answer_with_the_end_of_a_turn_in_it_is_refused() -> None:
    with pytest.raises(DataError, match=r"Task 't', train row 0: the answer 'red<|im_end|>' holds '<|im_end|>'"):
        task_of(one("Q", "red<|im_end|>")).tokenized(chat_tokenizer(CHATML))


def test_a_prompt_that_is_too_long_keeps_its_head_and_its_end() -> None:
    tokenizer = chat_tokenizer(CHATML)
    task = task_of(one("begin " + "word " * 200 + "end", "red")).tokenized(tokenizer, 48)
    assert task.cut == 1 and len(task.train[0]["input_ids"]) == 48
    text = tokenizer.decode(task.train[0]["input_ids"])
    assert text.startswith("<|im_start|>user\nbegin word")
    assert text.endswith("end<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n")
    result = evaluate_task(parrot(tokenizer, task, 48), tokenizer, task, max_length=48)
    assert result.score == 1.0


def test_an_instruction_is_kept_in_a_message_too() -> None:
    tokenizer = chat_tokenizer(CHATML)
    row = {"prompt": "Sort these words now: " + "word " * 200, "answer": "red", "instruction": "Sort these words now:"}
    task = task_of([row]).as_chat().tokenized(tokenizer, 70)
    assert "Sort these words now: word" in tokenizer.decode(task.train[0]["input_ids"])
    without = task_of([{**row, "instruction": ""}]).as_chat().tokenized(tokenizer, 70)
    kept = [tokenizer.decode(own.train[0]["input_ids"]).index("word") for own in (task, without)]
    assert kept[0] == kept[1], "room for both, and the same beginning"
    short = [own.tokenized(tokenizer, 40).train[0]["input_ids"] for own in (task_of([row]).as_chat(), without)]
    assert short[0] != short[1]


def test_a_long_answer_loses_its_end_but_not_the_end_of_the_turn() -> None:
    tokenizer = chat_tokenizer(CHATML)
    encoded = task_of(one("Q", "red " * 100)).tokenized(tokenizer, 40).train[0]["input_ids"]
    assert len(encoded) == 40 and encoded[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


# ---------------------------------------------------------- rows and columns


MESSAGES = [*MULTI_TURN, {"role": "assistant", "content": "    return x"}]


def test_the_last_of_the_messages_is_the_answer() -> None:
    whole = task_of([{"messages": MESSAGES}])
    parts = task_of([{"prompt": MULTI_TURN, "completion": MESSAGES[-1:]}])
    mixed = task_of([{"prompt": MULTI_TURN, "answer": "    return x"}])
    assert list(whole.train) == list(parts.train) == list(mixed.train)
    assert whole.train[0]["answer"] == "    return x"
    assert json.loads(whole.train[0]["prompt_messages"]) == {"messages": MULTI_TURN, "tools": None}
    assert whole.train[0]["prompt"] == "system: Be brief.\nuser: one two\nassistant: red\nuser: def f(x):\n"
    labels = whole.tokenized(chat_tokenizer(CHATML)).train[0]["labels"]
    assert chat_tokenizer(CHATML).decode([label for label in labels if label != -100]) == "    return x<|im_end|>\n"


def test_a_plain_completion_is_an_answer() -> None:
    task = task_of([{"prompt": "p", "completion": "c"}])
    assert list(task.train) == [{"prompt": "p", "answer": "c"}]


def test_a_row_with_prompt_and_answer_keeps_these_beside_messages() -> None:
    assert list(task_of([{"prompt": "p", "answer": "a", "messages": MESSAGES}]).train) == [
        {"prompt": "p", "answer": "a"}
    ]


def test_json_lines_and_datasets_hold_conversations(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": MESSAGES}) + "\n", encoding="utf-8")
    expected = task_of([{"messages": MESSAGES}])
    # A column of a Dataset fills up keys that some messages do not have.
    filled = [{**message, "name": None} for message in MESSAGES]
    data = Dataset.from_list([{"messages": filled}])
    for task in (Task.from_jsonl("t", file, file), Task.from_dataset("t", data, data)):
        assert list(task.train) == list(expected.train) and task.fingerprint() == expected.fingerprint()
    again = Task.from_records("t", expected.train, expected.test)
    assert list(again.train) == list(expected.train)


def test_the_fingerprint_tells_messages_from_their_text() -> None:
    plain_task = task_of([{"prompt": "p", "answer": "a"}])
    assert plain_task.fingerprint() != plain_task.as_chat().fingerprint()
    assert list(plain_task.as_chat().train) == [
        {
            "prompt": "p",
            "answer": "a",
            "prompt_messages": '{"messages": [{"role": "user", "content": "p"}], "tools": null}',
        }
    ]
    assert plain_task.as_chat().as_chat().fingerprint() == plain_task.as_chat().fingerprint()


def test_the_recipe_wraps_plain_samples(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [{"prompt": "one", "answer": "red"}, {"messages": MESSAGES}]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"a.{split}.jsonl").write_text(text, encoding="utf-8")
    section = {"format": "jsonl", "path": str(tmp_path)}
    found = {}
    for wrapped in (False, True):
        recipe = load_recipe({"model": {"name_or_path": "demo"}, "tasks": {**section, "chat_template": wrapped}})
        (found[wrapped],) = load_tasks(recipe)
    assert [isinstance(prompt, str) for prompt in prompts_of(found[False].train)] == [True, False]
    assert [isinstance(prompt, str) for prompt in prompts_of(found[True].test)] == [False, False]
    assert constant_answer_score(found[True]) == 0.5
    tokenizer = chat_tokenizer(CHATML)
    (encoded, _) = found[True].tokenized(tokenizer).train["input_ids"]
    assert tokenizer.decode(encoded) == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    assert evaluate_task(parrot(tokenizer, found[False]), tokenizer, found[False]).score == 1.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"'messages' is \[\]; it must be a list of two messages"),
        ({"messages": "red"}, "'messages' is 'red'; it must be a list"),
        ({"messages": MESSAGES[-1:]}, "it must be a list of two messages or more"),
        ({"messages": MESSAGES[:-1]}, "'messages' ends with a message by 'user'; it must end with the assistant's"),
        ({"messages": [*MESSAGES, "red"]}, "'messages' ends with a message by None"),
        ({"messages": [{"content": "q"}, MESSAGES[-1]]}, r"message 0 of 'prompt' is \{'content': 'q'\}; it must be an"),
        ({"messages": [{"role": "user"}, MESSAGES[-1]]}, "message 0 of 'prompt': 'content' is None, not a string"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": None}]}, "'content' of 'answer' is None"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": " "}]}, "has an empty 'answer'"),
        ({"prompt": [], "completion": "red"}, "'prompt' is a list without messages"),
        ({"prompt": MULTI_TURN, "completion": []}, r"list of messages by nobody; it must be the assistant's one"),
        ({"prompt": MULTI_TURN, "completion": MULTI_TURN[:1]}, "list of messages by 'system'"),
        ({"prompt": MULTI_TURN, "answer": "red", "tools": "red"}, "'tools' is 'red', not a list, nor JSON of one"),
        ({"prompt": MULTI_TURN, "completion": 7}, r"answer \(key 'completion'\) is 7, not a string"),
        ({"prompt": "p", "messages": None}, "'messages' is None"),
    ],
)
def test_messages_that_are_none_are_refused_with_their_place(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^Task 't', train row 1:? .*{message}|^Task 't', train row 1: {message}"):
        Task.from_records("t", [{"prompt": "p", "answer": "a"}, row], [{"prompt": "p", "answer": "a"}])


def test_messages_that_a_template_refuses_are_told_with_their_place() -> None:
    task = task_of([*conversations(), *conversations([MULTI_TURN], ["red"])])
    for refuse in (task.tokenized, task.check_texts):
        with pytest.raises(
            DataError, match=r"train row 3: the tokenizer's chat template refuses .* \(no system here\)"
        ):
            refuse(chat_tokenizer(LLAMA2))


def test_messages_without_a_chat_template_are_refused() -> None:
    with pytest.raises(DataError, match="has no chat template, with which messages are written"):
        task_of(conversations()).tokenized(byte_level())


def test_a_column_that_only_looks_like_messages_is_refused() -> None:
    data = Dataset.from_dict({"prompt": ["p"], "answer": ["a"], "prompt_messages": ["hello"]})
    with pytest.raises(DataError, match="The column 'prompt_messages' holds 'hello', which is not the messages"):
        Task("t", data, data).tokenized(byte_level())


def test_a_plain_prompt_of_a_chat_model_stays_plain() -> None:
    tokenizer = chat_tokenizer(CHATML)
    assert encode(tokenizer, "one", "red", 64).input_ids == [*plain(tokenizer, "one red"), tokenizer.eos_token_id]


def test_a_run_trains_replays_and_asks_conversations(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    for name in ("a", "b"):
        for split in ("train", "test"):
            rows = [{"prompt": f"{name} {index}", "answer": "red"} for index in range(8)] + [{"messages": MESSAGES}]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    recipe = small_recipe(
        tmp_path / "run",
        model={"name_or_path": str(tmp_path / "base"), "quantization": "none"},
        tasks={"format": "jsonl", "path": str(tmp_path / "data"), "chat_template": True},
        training={"learning_rate": 1e-2, "per_device_train_batch_size": 9, "max_steps": 25, "logging_steps": 25},
        method={"name": "replay", "replay_ratio": 0.5, "replay_every": 1},
        evaluation={"max_new_tokens": 12},
    )
    run_recipe(recipe, report=False)
    lines = read_lines(tmp_path / "run" / "predictions" / "02-b" / "01-a.jsonl")
    assert [line["prediction"] for line in lines] == ["red"] * 8 + ["    return x"]
    assert [line["prompt"] for line in lines][::8] == [
        "a 0",
        "system: Be brief.\nuser: one two\nassistant: red\nuser: def f(x):\n",
    ]
    (memory,) = ReplayMemory.open([tmp_path / "run" / "tasks" / "01-a"]).tasks
    kept = [tokenizer.decode(memory.sample(index).input_ids) for index in range(len(memory))]
    assert all(text.endswith(("assistant\nred<|im_end|>\n", "assistant\n    return x<|im_end|>\n")) for text in kept)
