"""Recipes: every mistake at once, before anything is loaded; and the recipes in ``recipes/``."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from support.good_recipe import problems, recipe

from seekr_peft import cli
from seekr_peft.compare import plan_comparison
from seekr_peft.demo.run import demo_recipe
from seekr_peft.errors import ConfigError
from seekr_peft.model.plain_lora import OFF
from seekr_peft.recipe import Recipe, general_tests, load_recipe
from seekr_peft.recipe.library_fields import Setting, lora_settings, training_choices

RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))

FIVE_MISTAKES = """
model: {name_or_path: /nowhere/at/all, quantisation: nf4}
method: {name: seeker, lambda1: 2}
training: {learning_rate: fast}
tasks: {format: demo}
"""


# Every mistake at once --------------------------------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_text(FIVE_MISTAKES + f"output_dir: {tmp_path / 'run'}\n", encoding="utf-8")
    return path


def check_five(lines: list[str]) -> None:
    assert len(lines) == 5, lines
    for start in (
        "model.quantisation is an unknown key; did you mean model.quantization?",
        "method.name must be one of sequential, replay, replay_logits, seekr, lwf, ewc, olora, multitask, got",
        "method.lambda1 must be in [0, 1], got 2.",
        "training.learning_rate must be a number above 0, got 'fast'.",
        "model.name_or_path: /nowhere/at/all has no config.json;",
    ):
        assert any(line.startswith(f"seekr-peft: {start}") for line in lines), (start, lines)


def test_five_mistakes_print_five_lines_and_load_no_model(
    bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model or tokenizer was loaded")

    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.AutoConfig):
        monkeypatch.setattr(loader, "from_pretrained", refuse)
    monkeypatch.setattr(sys, "argv", ["seekr-peft", "run", str(bad)])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    printed = capsys.readouterr()
    assert exited.value.code == 2
    assert printed.out == ""
    check_five(printed.err.splitlines())
    assert not (bad.parent / "run").exists()


@pytest.mark.slow
def test_five_mistakes_print_five_lines_in_a_process_of_its_own(bad: Path) -> None:
    command = [sys.executable, "-m", "seekr_peft.cli", "run", str(bad)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    check_five(result.stderr.splitlines())


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        (None, "modle", "modle is an unknown key; did you mean model?"),
        ("model", "name_or_pth", "model.name_or_pth is an unknown key; did you mean model.name_or_path?"),
        ("adapter", "lora_alpa", "adapter.lora_alpa is an unknown key; did you mean adapter.lora_alpha?"),
        ("adapter", "rank_limt", "adapter.rank_limt is an unknown key; did you mean adapter.rank_limit?"),
        ("method", "replay_ration", "method.replay_ration is an unknown key; did you mean method.replay_ratio?"),
        ("training", "learning_rat", "training.learning_rat is an unknown key; did you mean training.learning_rate?"),
        ("tasks", "max_trian", "tasks.max_trian is an unknown key; did you mean tasks.max_train?"),
        ("evaluation", "batchsize", "evaluation.batchsize is an unknown key; did you mean evaluation.batch_size?"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(section: str | None, key: str, message: str) -> None:
    mapping = recipe(method={"name": "seekr"})
    target = mapping if section is None else mapping.setdefault(section, {})
    target[key] = 1
    assert problems(mapping) == [message]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"method": {}},
            "method.name must be one of sequential, replay, replay_logits, seekr, lwf, ewc, olora, multitask, "
            "got None.",
        ),
        ({"method": "seekr"}, "method must be a mapping, got 'seekr'."),
        ({"training": {"seed": 3}}, "training.seed is set by the run; use seed instead."),
        ({"training": {"output_dir": "x"}}, "training.output_dir is set by the run; use output_dir instead."),
        (
            {"training": {"use_cpu": True}},
            "training.use_cpu is set by the run; use the environment variable CUDA_VISIBLE_DEVICES instead.",
        ),
        (
            {"training": {"eval_strategy": "steps"}},
            "training.eval_strategy is set by the run; use the evaluation section instead.",
        ),
        ({"training": {"num_train_epochs": 0}}, "training.num_train_epochs must be a number above 0, got 0."),
        (
            {"training": {"warmup_steps": "some"}},
            "training.warmup_steps must be a number of at least 0, and whole from 1 on, got 'some'.",
        ),
        ({"training": {"bf16": "often"}}, "training.bf16 must be true or false, got 'often'."),
        (
            {"training": {"gradient_checkpointing": "no"}},
            "training.gradient_checkpointing must be true or false, got 'no'.",
        ),
        (
            {"training": {"learning_rate": math.inf}},
            "training.learning_rate must be a number above 0, got inf.",
        ),
        ({"adapter": {"lora_alpha": math.nan}}, "adapter.lora_alpha must be a number above 0, got nan."),
        (
            {"tasks": {"format": "demo", "epochs": [1, 1, 1, math.inf]}},
            "tasks.epochs.3 must be in (0, 1000000], got inf.",
        ),
        ({"seed": 2**31}, "seed must be at most 2147483647, got 2147483648."),
        ({"method": {"name": "ewc"}}, "adapter.mode must be continue for method ewc, got 'stack'."),
        (
            {"method": {"name": "olora"}, "adapter": {"mode": "continue"}},
            "adapter.mode must be stack for method olora, got 'continue'.",
        ),
        ({"adapter": {"r": 0}}, "adapter.r must be a whole number of at least 1, got 0."),
        (
            {"training": {"max_steps": 2.5}},
            "training.max_steps must be a whole number above 0, or -1 for whole epochs, got 2.5.",
        ),
        (
            {"training": {"logging_steps": 0}},
            "training.logging_steps must be a number above 0, and whole from 1 on, got 0.",
        ),
        (
            {"training": {"save_strategy": "best"}},
            "training.save_strategy must be one of no, steps, epoch, got 'best'.",
        ),
        (
            {"training": {"gradient_checkpointing_kwargs": {"use_reentrant": True}}},
            "training.gradient_checkpointing_kwargs: use_reentrant must be false, got True; under reentrant "
            "checkpointing a captured attention has no gradient.",
        ),
        ({"adapter": {"r": 2.5}}, "adapter.r must be a whole number of at least 1, got 2.5."),
        ({"adapter": {"lora_dropout": "x"}}, "adapter.lora_dropout must be a number in [0, 1), got 'x'."),
        (
            {"adapter": {"use_dora": True}},
            "adapter.use_dora is True, whose change cannot be added up over the tasks; leave it out.",
        ),
        (
            {"tasks": {"format": "demo", "max_length": 2}},
            "tasks.max_length must be at least 5, got 2.",
        ),
        ({"tasks": {}}, "tasks.format is missing; add it to the recipe."),
        (
            {"tasks": {"format": "demo", "order": ["first", "lst"]}},
            "tasks: The task 'lst' is not among those of the format 'demo', which has first, last, third, second "
            "(did you mean 'last'?).",
        ),
        ({"tasks": {"format": "demo", "order": ["last", "last"]}}, "tasks: The task 'last' is 2 times in the order."),
        ({"tasks": {"format": "demo", "order": "first"}}, "tasks.order must be a list or null, got 'first'."),
        (
            {"tasks": {"format": "demo", "epochs": [1, 2]}},
            "tasks.epochs has 2 numbers for 4 tasks; give one for each.",
        ),
        ({"tasks": {"format": "jsonl"}}, "tasks.path is missing; format 'jsonl' needs the folder of the tasks."),
        (
            {"tasks": {"format": "demo", "path": "data"}},
            "tasks: The path 'data' would not be read, as the tasks of the format 'demo' come with the package; "
            "leave it out, or give the format of your own tasks: jsonl, csv, parquet, trace, superni, long_sequence, "
            "mixed.",
        ),
        ({"seed": -1}, "seed must be at least 0, got -1."),
        (
            {"evaluation": {"general": ["mmlu"]}},
            "evaluation.general: the test 'mmlu' was not found, there is no folder to look in; set "
            "evaluation.general_path to the folder that holds mmlu/test.jsonl (multiple choice) or text/mmlu.txt "
            "(plain text).",
        ),
        (
            {"evaluation": {"general": ["mmlu"], "general_path": "/no/where"}},
            "evaluation.general: the test 'mmlu' was not found, none of /no/where/mmlu/test.jsonl, "
            "/no/where/text/mmlu.txt is there; set evaluation.general_path to the folder that holds mmlu/test.jsonl "
            "(multiple choice) or text/mmlu.txt (plain text).",
        ),
        ({"evaluation": {"general": "mmlu"}}, "evaluation.general must be a list, got 'mmlu'."),
        (
            {"evaluation": {"general_samples": 0}},
            "evaluation.general_samples must be at least 1, got 0.",
        ),
        (
            {"evaluation": {"general_tokens": 1}},
            "evaluation.general_tokens must be at least 2, got 1.",
        ),
    ],
)
def test_a_wrong_value_is_one_sentence_with_its_place(sections: dict[str, Any], message: str) -> None:
    assert problems(recipe(**sections)) == [message]


@pytest.mark.parametrize("key", sorted(OFF))
def test_a_setting_of_lora_that_is_no_plain_sum_is_refused_by_name_and_passes_where_it_is_off(key: str) -> None:
    (problem,) = problems(recipe(adapter={key: {"nblocks": 2}}))
    assert problem.startswith(f"adapter.{key} is {{'nblocks': 2}}, whose change cannot be added up over the tasks; ")
    assert problem.endswith(".") and "leave" in problem
    for off in (None, False, []):
        load_recipe(recipe(adapter={key: off}))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"bias": "all"}, "adapter.bias is 'all', whose change .*; use bias='none', which adapts the weights alone."),
        ({"init_lora_weights": "pissa_niter_4"}, "is 'pissa_niter_4', which moves part of the base's own weights"),
        ({"init_lora_weights": "eva"}, "is 'eva', which would have to be computed anew for each task's adapter"),
        ({"init_lora_weights": "loftq"}, "is 'loftq', which replaces the base's weights by others"),
        ({"init_lora_weights": "new_one"}, "is 'new_one', whose change .* use init_lora_weights=True."),
        ({"task_type": "SEQ_CLS"}, "is 'SEQ_CLS', .* sequence classification with a head of its own is not supported"),
        ({"task_type": "TOKEN_CLS"}, "is 'TOKEN_CLS', .* token classification with a head of its own is not"),
        ({"task_type": "QUESTION_ANS"}, "is 'QUESTION_ANS', .* span extraction with a head of its own is not"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "is 'SEQ_2_SEQ_LM', but a run trains a causal language model; leave it out"),
        ({"task_type": "FEATURE_EXTRACTION"}, "is 'FEATURE_EXTRACTION', but a run trains a causal language model"),
        ({"task_type": "CAUSAL"}, "is 'CAUSAL', which is none of CAUSAL_LM, .*; use task_type='CAUSAL_LM'."),
        ({"peft_type": "IA3"}, "adapter.peft_type is 'IA3', whose change"),
    ],
    ids=str,
)
def test_what_the_stack_would_refuse_is_refused_by_the_recipe_already(adapter: dict, message: str) -> None:
    (problem,) = problems(recipe(adapter=adapter))
    assert re.search(message, problem), problem


def test_a_setting_of_a_later_peft_is_refused_unless_at_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    later = {**lora_settings(), "use_something_new": Setting("str | None", None), "safe_sums": Setting("bool", True)}
    monkeypatch.setattr("seekr_peft.recipe.checks.lora_settings", lambda: later)
    load_recipe(recipe(adapter={"use_something_new": None, "safe_sums": True}))
    first, second = problems(recipe(adapter={"use_something_new": "on", "safe_sums": False}))
    assert first.startswith("adapter.use_something_new is 'on', whose change cannot be added up over the tasks; this")
    assert second.endswith("does not know safe_sums: leave it at its default, True.")


def test_settings_of_lora_that_are_plain_pass() -> None:
    plain = {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"q_proj": 4},
        "exclude_modules": ["k_proj"],
        "init_lora_weights": "gaussian",
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    assert load_recipe(recipe(adapter=plain)).adapter.lora().items() >= plain.items()


@pytest.mark.parametrize(
    ("key", "value", "one"),
    [
        ("lr_scheduler_type", "lineer", "cosine"),
        ("optim", "adam", "adamw_torch"),
        ("logging_strategy", "often", "epoch"),
    ],
)
def test_a_choice_of_transformers_is_checked_before_the_run(key: str, value: str, one: str) -> None:
    (message,) = problems(recipe(training={key: value}))
    assert message.startswith(f"training.{key} must be one of ") and f" {one}," in message + ","
    assert message.endswith(f"got {value!r}.")
    assert load_recipe(recipe(training={key: one})).training == {key: one}


@pytest.mark.parametrize("name", training_choices()["lr_scheduler_type"])
def test_a_scheduler_is_taken_if_transformers_can_make_it(name: str) -> None:
    from torch import optim, zeros
    from transformers import TrainingArguments, get_scheduler

    refused = None
    try:
        arguments = TrainingArguments(lr_scheduler_type=name)
        get_scheduler(name, optim.SGD([zeros(1)]), 1, 2, dict(arguments.lr_scheduler_kwargs or {}))
    except (TypeError, ValueError) as error:
        refused = str(error)
    if refused is None:
        load_recipe(recipe(training={"lr_scheduler_type": name}))
        return
    (message,) = problems(recipe(training={"lr_scheduler_type": name}))
    assert name in message and ("metric" in message or refused in message)


@pytest.mark.parametrize(
    ("name", "keywords", "said"),
    [
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, None),
        ("warmup_stable_decay", {"num_decay_steps": 5}, None),
        ("warmup_stable_decay", {"num_decay_step": 5}, "num_decay_step"),
        ("linear", {"min_lr": 0.1}, "min_lr"),
        ("polynomial", {"lr_end": 1e-5}, None),
        ("polynomial", {"lr_end": 0.01}, "lr_end"),
        ("constant", {"min_lr": 0.1}, "takes none"),
        ("linear", [], "must be a mapping"),
        ("cosine", [1], "must be a mapping"),
    ],
)
def test_a_schedulers_keywords_are_checked_before_the_run(name: str, keywords: Any, said: str | None) -> None:
    training = {"lr_scheduler_type": name, "lr_scheduler_kwargs": keywords}
    if said is None:
        assert load_recipe(recipe(training=training)).training == training
    else:
        (message,) = problems(recipe(training=training))
        assert message.startswith("training.lr_scheduler_kwargs") and said in message


def test_the_schedulers_check_prints_its_answer_alone() -> None:
    settings = ["tasks.format=demo", "training.lr_scheduler_type=warmup_stable_decay", "--check"]
    code = "import sys; from seekr_peft.cli import main; sys.argv[0] = 'seekr-peft'; main()"
    recipe_path = str(REPOSITORY / "recipes" / "demo.yaml")
    command = [sys.executable, "-c", code, "run", recipe_path, *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "needs training.lr_scheduler_kwargs" in done.stderr


def test_an_unknown_task_format_is_named_even_without_a_path() -> None:
    (message,) = problems(recipe(tasks={"format": "jsnl"}))
    assert "'jsnl' is unknown" in message and "jsonl" in message


def test_a_folder_that_is_missing_is_named_with_its_nearest_parent(tmp_path: Path) -> None:
    (message,) = problems(recipe(tasks={"format": "jsonl", "path": str(tmp_path / "no" / "where")}))
    assert message.startswith("tasks: ") and str(tmp_path) in message


def test_general_tests_are_found_beside_the_tasks_by_name_alone(tmp_path: Path) -> None:
    for name in ("tasks/only", "mmlu", "tasks/arc", "text"):
        (tmp_path / name).mkdir(parents=True)
    files = ["tasks/only/train.jsonl", "tasks/only/test.jsonl", "mmlu/test.jsonl", "tasks/arc/test.jsonl", "text/a.txt"]
    for file in files:
        (tmp_path / file).write_text("not read")
    tasks = {"format": "jsonl", "path": str(tmp_path / "tasks"), "order": ["only"]}
    found = load_recipe(recipe(tasks=tasks, evaluation={"general": ["mmlu", "arc", "a"]}))
    assert [(test.name, test.kind) for test in general_tests(found)] == [
        ("mmlu", "choice"),
        ("arc", "choice"),
        ("a", "text"),
    ]
    assert (found.evaluation.general_samples, found.evaluation.general_tokens) == (200, 16384)
    assert general_tests(load_recipe(recipe(tasks=tasks))) == []
    (twice, missing) = problems(recipe(tasks=tasks, evaluation={"general": ["arc", "arc", "mmlv"]}))
    assert twice == "evaluation.general: 'arc' is named more than once; name it once."
    for folder in (tmp_path / "tasks", tmp_path):
        assert f"{folder / 'mmlv' / 'test.jsonl'}, {folder / 'text' / 'mmlv.txt'}" in missing
    assert "set evaluation.general_path" in missing


def test_the_sections_that_are_left_out_have_defaults() -> None:
    found = load_recipe(recipe())
    assert (found.method_name, found.adapter.mode, found.model.quantization) == ("seekr", "stack", "nf4")
    assert found.adapter.lora() == {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }


def test_the_methods_seed_is_the_recipes_unless_it_has_its_own() -> None:
    assert load_recipe(recipe(seed=5)).method_config().seed == 5
    assert load_recipe(recipe(seed=5, method={"name": "seekr", "seed": 6})).method_config().seed == 6


# The recipes of the repository ------------------------------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert {"demo.yaml", "real_tasks_cpu.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_of_the_repository_has_no_mistake_but_data_that_is_elsewhere(path: Path) -> None:
    try:
        assert isinstance(load_recipe(path), Recipe)
    except ConfigError as error:
        for problem in error.problems:
            assert re.match(
                r"model\.name_or_path: \S+ has no config\.json|tasks: The task path .* is not there|"
                r"evaluation\.general: the test \S+ was not found",
                problem,
            )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_of_the_repository_names_its_own_command(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = list(takewhile(lambda line: line.startswith("#"), lines))
    kind = "compare" if path.parent.name == "experiments" else "run"
    relative = path.relative_to(REPOSITORY).as_posix()
    assert any(re.search(rf"#   .*seekr-peft {kind} {re.escape(relative)}( |$)", line) for line in header), header


def empty_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name == "experiments"], ids=lambda p: p.name)
def test_an_experiment_of_the_repository_has_three_seeds_and_recipes_without_a_mistake(
    path: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEEKR_SHARED", str(shared))
    monkeypatch.chdir(tmp_path)
    # What is made by a command that a recipe names.
    for name in ("news", "letters", "mirror", "flipped"):
        for split in ("train", "test"):
            empty_file(tmp_path / "runs" / "data" / "adversarial" / name / f"{split}.jsonl")
    for name in ("llama", "gpt_neox", "qwen3"):
        config = tmp_path / "runs" / "data" / "bases" / name / "config.json"
        empty_file(config)
        config.write_text("{}")
    plan = plan_comparison(path)
    assert len(plan.seeds) >= 3 and plan.baseline is not None
    assert plan.directory.parent == Path("runs/experiments")


def test_the_demo_recipe_of_the_repository_is_the_demos() -> None:
    written = yaml.safe_load((REPOSITORY / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    assert written == demo_recipe()
    assert load_recipe(written) == load_recipe(demo_recipe())
