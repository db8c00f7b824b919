"""ContinualSFTTrainer: replay beside TRL's own forward, which has no logits and no attentions; and life without TRL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import nf4_llama

from seekr_peft import Seekr, SeekrConfig, Task
from seekr_peft.demo import BASE_PATH
from seekr_peft.errors import AdapterError, DataError
from seekr_peft.tasks.demo_words import demo_tasks

# TRL's own default uses the name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning")

TERMS = ("replay_loss", "logits_loss", "attention_loss")


def without_trl(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process in which TRL cannot be imported."""
    script = f"import sys; sys.modules['trl'] = None\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)


def test_without_trl_the_package_works_and_the_sft_trainer_names_the_extra() -> None:
    result = without_trl(
        "import seekr_peft; seekr_peft.ContinualTrainer; print('fine')\n"
        "try: seekr_peft.ContinualSFTTrainer\n"
        "except ImportError as error: print(error)"
    )
    lines = result.stdout.splitlines()
    assert lines == ["fine", "ContinualSFTTrainer needs TRL; install it with: pip install 'seekr-peft[trl]'"], result


@pytest.fixture
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE_PATH)


@pytest.fixture
def tasks(tokenizer: Any) -> list[Task]:
    found = demo_tasks(0, n_train=24, n_test=4)[:2]
    return [Task.from_records(task["name"], task["train"], task["test"]).tokenized(tokenizer) for task in found]


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def demo_model() -> Any:
    from transformers import AutoModelForCausalLM

    return adapted(AutoModelForCausalLM.from_pretrained(BASE_PATH, dtype=torch.float32))


def sft_on(method: Any, dataset: Any, tokenizer: Any, folder: Path, **settings: Any) -> Any:
    pytest.importorskip("trl")
    from seekr_peft import ContinualSFTTrainer

    return ContinualSFTTrainer(
        model=method.model, method=method, args=sft_config(folder, **settings), train_dataset=dataset,
        processing_class=tokenizer,
    )  # fmt: skip


def sft_config(folder: Path, **settings: Any) -> Any:
    trl = pytest.importorskip("trl")
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "dataloader_pin_memory": False,
        "max_length": 64,
    }
    return trl.SFTConfig(output_dir=str(folder), **{**defaults, **settings})


def sft(method: Any, task: Task, tokenizer: Any, folder: Path, **changes: Any) -> Any:
    names = {"prompt": "prompt", "answer": "completion"}
    dataset = task.train.select_columns(list(names)).rename_columns(names)
    settings = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, **changes}
    return sft_on(method, dataset, tokenizer, folder, **settings)


def make_method(model: Any, folder: Path) -> Seekr:
    return Seekr(model, SeekrConfig(replay_ratio=0.2, replay_every=1, replay_batch_size=4), directory=folder)


def remember(method: Any, task: Task) -> None:
    """Finish a first task whose adapter is random."""
    with method.task(task.name, replay_from=task.train):
        for parameter in method.stack.parameters().values():
            parameter.data += 0.05 * torch.randn(parameter.shape)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_sft_step_replays_with_logits_and_attention(
    tmp_path: Path, tasks: list[Task], tokenizer: Any, checkpointing: bool
) -> None:
    pytest.importorskip("trl")
    method = make_method(demo_model(), tmp_path / "method")
    remember(method, tasks[0])
    with method.task(tasks[1].name, replay_from=tasks[1].train):
        own = {id(parameter) for parameter in method.stack.parameters().values()}
        before = [(p, p.detach().clone()) for p in method.model.parameters()]
        trainer = sft(method, tasks[1], tokenizer, tmp_path / "out", gradient_checkpointing=checkpointing)
        trainer.train()
        moved = {id(p) for p, old in before if not torch.equal(p, old)}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert moved == own
    assert len(logs) == 4
    # At the first step the fresh adapter changes nothing, so the teacher is met up to its stored eight bits.
    assert all(entry["replay_loss"] > 0.1 for entry in logs)
    assert logs[0]["attention_loss"] < 2e-4 and logs[0]["logits_loss"] < 1e-3
    assert all(logs[3][name] > 1e-4 for name in TERMS)
    assert "mean_token_accuracy" in logs[0]
    assert method.task_names == [task.name for task in tasks]


def test_a_set_of_splits_is_refused_by_name(tmp_path: Path, tasks: list[Task]) -> None:
    pytest.importorskip("trl")
    from seekr_peft import ContinualSFTTrainer

    method, splits = make_method(demo_model(), tmp_path / "method"), {"train": tasks[0].train}
    with pytest.raises(DataError, match="train_dataset is a dict with the splits 'train'"), method.task("first"):
        ContinualSFTTrainer(model=method.model, method=method, train_dataset=splits)


def test_the_replay_gradient_is_the_same_as_without_trl(tmp_path: Path, tasks: list[Task], tokenizer: Any) -> None:
    pytest.importorskip("trl")
    gradients = []
    for with_trl in (True, False):
        torch.manual_seed(1)
        method = make_method(demo_model(), tmp_path / f"method-{with_trl}")
        remember(method, tasks[0])
        with method.task(tasks[1].name, replay_from=tasks[1].train):
            for parameter in method.stack.parameters().values():
                parameter.data += 0.05 * torch.randn(parameter.shape)
            method.start_training(4)
            if with_trl:
                trainer = sft(method, tasks[1], tokenizer, tmp_path / "out")
                trainer._replay_backward(trainer.model)
            else:
                with method.replay_terms(method.model) as terms:
                    terms.total.backward()
            gradients.append([p.grad.clone() for p in method.stack.parameters().values()])
    assert max(float(gradient.abs().max()) for gradient in gradients[0]) > 1e-3
    for ours, direct in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, direct, atol=1e-6, rtol=1e-5)


def test_over_a_4_bit_base_the_adapter_stays_in_float32(tmp_path: Path, tasks: list[Task], tokenizer: Any) -> None:
    pytest.importorskip("trl")
    # TRL casts such adapters to bfloat16 by itself.
    model = adapted(nf4_llama(tmp_path / "base", vocab_size=256))
    method = make_method(model, tmp_path / "method")
    remember(method, tasks[0])
    with method.task(tasks[1].name, replay_from=tasks[1].train):
        for parameter in method.stack.parameters().values():
            parameter.data += 1e-3 * torch.randn(parameter.shape)
        before = [parameter.detach().clone() for parameter in method.stack.parameters().values()]
        trainer = sft(method, tasks[1], tokenizer, tmp_path / "out", max_steps=2)
        assert all(map(torch.equal, before, method.stack.parameters().values())), "not even rounded once"
        assert {parameter.dtype for parameter in method.stack.parameters().values()} == {torch.float32}
        trainer.train()
        assert {parameter.dtype for parameter in method.stack.parameters().values()} == {torch.float32}
    assert all(trainer.state.log_history[1][name] > 0 for name in TERMS)


def test_an_sft_trainer_outside_of_a_task_is_refused(tmp_path: Path, tasks: list[Task], tokenizer: Any) -> None:
    pytest.importorskip("trl")
    method = make_method(demo_model(), tmp_path / "method")
    with pytest.raises(AdapterError, match="outside of a task"):
        sft(method, tasks[0], tokenizer, tmp_path / "out")


# Which samples are replayed ---------------------------------------------------------------------------------------


def conversations(task: Task, shape: str) -> Any:
    from datasets import Dataset

    rows = [(row["prompt"], row["answer"]) for row in task.train]
    # One that is longer than max_length: cut where it is all trained on, left out where only its answer is.
    rows[0] = (" ".join([rows[0][0]] * 3), rows[0][1])
    chats = [([{"role": "user", "content": p}], [{"role": "assistant", "content": a}]) for p, a in rows]
    if shape == "text":
        return Dataset.from_list([{"text": f"{p} {a}"} for p, a in rows])
    if shape == "prompt and completion":
        return Dataset.from_list([{"prompt": p, "completion": f" {a}"} for p, a in rows])
    if shape == "messages":
        return Dataset.from_list([{"messages": [*question, *answer]} for question, answer in chats])
    return Dataset.from_list([{"prompt": question, "completion": answer} for question, answer in chats])


SHAPES = ["text", "prompt and completion", "messages", "chat of prompt and completion"]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}"
    "{% else %} {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


def stored(method: Any, task: int = -1) -> list[tuple[list[int], list[int]]]:
    memory = method.memory.tasks[task]
    samples = [memory.sample(index) for index in range(len(memory))]
    return [(sample.input_ids.tolist(), sample.labels.tolist()) for sample in samples]


def rows_of(dataset: Any) -> list[tuple[list[int], list[int]]]:
    return [(list(row["input_ids"]), list(row["labels"])) for row in dataset]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strategy", [None, "bfd", "bfd_split", "wrapped"])
# TRL advises another attention for packed rows; on a CPU there is none.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_replay_from_the_samples_are_those_that_trl_prepared_before_it_packed_them(
    tmp_path: Path, tasks: list[Task], tokenizer: Any, shape: str, strategy: str | None
) -> None:
    trl = pytest.importorskip("trl")
    tokenizer.chat_template = TEMPLATE
    dataset = conversations(tasks[0], shape)
    settings = {"max_length": 26, "assistant_only_loss": shape == "messages"}
    plain = trl.SFTTrainer(
        demo_model(), args=sft_config(tmp_path / "plain", **settings), train_dataset=dataset, processing_class=tokenizer
    )
    wanted = rows_of(plain.train_dataset)
    packed = {} if strategy is None else {"packing": True, "packing_strategy": strategy}
    method = make_method(demo_model(), tmp_path / "method")
    with method.task("chat"):
        trainer = sft_on(method, dataset, tokenizer, tmp_path / "out", **settings, **packed)
        trained_on = rows_of(trainer.train_dataset)
        trainer.train()
    found = stored(method)
    assert len(found) == round(0.2 * len(wanted)) and all(row in wanted for row in found)
    assert any(-100 in labels for _, labels in found) == (shape != "text")
    if strategy is None:
        assert trained_on == wanted
        return
    assert len(trained_on) < len(dataset)
    theirs = trl.SFTTrainer(
        demo_model(),
        args=sft_config(tmp_path / "packed", **settings, **packed),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    assert trained_on == rows_of(theirs.train_dataset), "what is trained is what TRL alone would train"


def test_rows_that_somebody_packed_before_are_refused_as_replay_samples(
    tmp_path: Path, tasks: list[Task], tokenizer: Any
) -> None:
    trl = pytest.importorskip("trl")
    packed = trl.pack_dataset(tasks[0].train.select_columns(["input_ids", "labels"]), 40, "bfd")
    assert len(packed[0]["seq_lengths"]) > 1
    method = make_method(demo_model(), tmp_path / "method")
    with pytest.raises(DataError, match=r"sample \d of replay_from is a row of \d samples that were packed together"):
        with method.task("packed", replay_from=packed):
            pass
    assert method.task_names == []


@pytest.mark.parametrize("shape", ["prompt and completion", "chat of prompt and completion"])
def test_two_tasks_from_texts_alone_replay_what_they_trained(
    tmp_path: Path, tasks: list[Task], tokenizer: Any, shape: str
) -> None:
    tokenizer.chat_template = TEMPLATE
    method = make_method(demo_model(), tmp_path / "method")
    for task in tasks:
        with method.task(task.name):
            trainer = sft_on(method, conversations(task, shape), tokenizer, tmp_path / task.name, logging_steps=1)
            trainer.train()
    assert all(trainer.state.log_history[0][name] >= 0 for name in TERMS)
    assert [len(memory) for memory in method.memory.tasks] == [5, 5]
    for ids, labels in stored(method, 0):
        start = next(place for place, label in enumerate(labels) if label != -100)
        assert ids[start:] == labels[start:] and ids[-1] == tokenizer.eos_token_id
        assert start == len(ids) - 2, "the answer is one word and the end"


def test_a_task_that_is_tokenised_already_is_trained_as_it_is(
    tmp_path: Path, tasks: list[Task], tokenizer: Any
) -> None:
    """So that ``evaluate_task`` asks the very prompts: TRL would put no space between a prompt and its completion."""
    method = make_method(demo_model(), tmp_path / "method")
    own = [(list(row["input_ids"]), list(row["labels"])) for row in tasks[0].train]
    with method.task("first"):
        trainer = sft_on(method, tasks[0].train, tokenizer, tmp_path / "out")
        assert rows_of(trainer.train_dataset) == own
        trainer.train()
    assert all(row in own for row in stored(method))


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.mark.parametrize("packing", [False, True])
def test_a_stopped_sft_training_goes_on_bit_for_bit(
    packing: bool, tmp_path: Path, tasks: list[Task], tokenizer: Any
) -> None:
    def trainer(method: Any, out: Path, stop_after: int | None = None) -> Any:
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "packing": packing}
        made = sft(method, tasks[1], tokenizer, out, logging_steps=4, **saving)
        step = made.training_step

        def stopping(*given: Any, **more: Any) -> Any:
            if made.state.global_step == stop_after:
                raise Killed
            return step(*given, **more)

        made.training_step = stopping
        return made

    results = []
    for out, stop in (("whole", None), ("stopped", 5)):
        torch.manual_seed(0)
        method = make_method(demo_model(), tmp_path / out)
        remember(method, tasks[0])
        if stop is not None:
            with pytest.raises(Killed), method.task("second"):
                trainer(method, tmp_path / f"{out}-second", stop).train()
            method = Seekr.from_pretrained(demo_model(), tmp_path / out)
        with method.task("second"):
            trained = trainer(method, tmp_path / f"{out}-second")
            trained.train(resume_from_checkpoint=stop is not None)
        results.append({path.relative_to(tmp_path / out): path.read_bytes() for path in (tmp_path / out).rglob("*.*")})
    assert len(results[0]) > 10 and results[0].keys() == results[1].keys()
    assert [name for name in results[0] if results[0][name] != results[1][name]] == []
