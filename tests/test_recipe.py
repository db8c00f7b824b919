"""Recipes: every mistake at once, before anything is loaded; overrides, variables; and the recipes in ``recipes/``."""

from __future__ import annotations

import copy
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
from hypothesis import given, settings
from hypothesis import strategies as st

from seekr_peft import cli
from seekr_peft.compare import plan_comparison
from seekr_peft.config import SeekrConfig
from seekr_peft.demo.run import demo_recipe
from seekr_peft.errors import ConfigError
from seekr_peft.model.plain_lora import OFF
from seekr_peft.recipe.library_fields import Setting, lora_settings, training_choices, training_settings
from seekr_peft.recipe.schema import Recipe, general_tests, load_recipe, recipe_text, stored_recipe

RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))

GOOD: dict[str, Any] = {"model": {"name_or_path": "demo"}, "tasks": {"format": "demo"}}

FIVE_MISTAKES = """
model: {name_or_path: /nowhere/at/all, quantisation: nf4}
method: {name: seeker, lambda1: 2}
training: {learning_rate: fast}
tasks: {format: demo}
"""


def recipe(**sections: Any) -> dict[str, Any]:
    return {**copy.deepcopy(GOOD), **sections}


def problems(source: Any, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(source, overrides)
    return caught.value.problems


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
        ({"method": "seekr"}, "method: input should be a valid dictionary, got 'seekr'."),
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
            "tasks.epochs.3: input should be a finite number, got inf.",
        ),
        ({"seed": 2**31}, "seed: input should be less than 2147483648, got 2147483648."),
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
            "tasks.max_length: input should be greater than or equal to 5, got 2.",
        ),
        ({"tasks": {}}, "tasks.format is missing; add it to the recipe."),
        (
            {"tasks": {"format": "demo", "order": ["first", "lst"]}},
            "tasks.order: lst is an unknown key; did you mean last?",
        ),
        ({"tasks": {"format": "demo", "order": ["last", "last"]}}, "tasks.order names 'last' more than once."),
        ({"tasks": {"format": "demo", "order": "first"}}, "tasks.order: input should be a valid list, got 'first'."),
        (
            {"tasks": {"format": "demo", "epochs": [1, 2]}},
            "tasks.epochs has 2 numbers for 4 tasks; give one for each.",
        ),
        ({"tasks": {"format": "jsonl"}}, "tasks.path is missing; format 'jsonl' needs the folder of the tasks."),
        (
            {"tasks": {"format": "demo", "path": "data"}},
            "tasks.path: data would not be read, as the tasks of the format 'demo' come with the package; "
            "leave it out, or give the format of your own tasks: jsonl, csv, parquet, trace, superni, long_sequence, "
            "mixed.",
        ),
        ({"seed": -1}, "seed: input should be greater than or equal to 0, got -1."),
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
        ({"evaluation": {"general": "mmlu"}}, "evaluation.general: input should be a valid list, got 'mmlu'."),
        (
            {"evaluation": {"general_samples": 0}},
            "evaluation.general_samples: input should be greater than or equal to 1, got 0.",
        ),
        (
            {"evaluation": {"general_tokens": 1}},
            "evaluation.general_tokens: input should be greater than or equal to 2, got 1.",
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
    monkeypatch.setattr("seekr_peft.recipe.schema.lora_settings", lambda: later)
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


# Files, overrides, variables --------------------------------------------------------------------------------------


def test_a_saved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    found = load_recipe(recipe(training={"learning_rate": 1e-4}, tasks={"format": "demo", "epochs": [1, 2, 3, 0.5]}))
    (tmp_path / "recipe.yaml").write_text(recipe_text(found), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == found


def test_an_infinite_number_in_a_variant_is_stored_as_what_it_is(tmp_path: Path) -> None:
    found = load_recipe(recipe(compare={"variants": {"a": {"method.lambda2": math.inf}}}))
    (tmp_path / "recipe.yaml").write_text(recipe_text(found), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == found
    with pytest.raises(ConfigError, match=r"variant 'a': method\.lambda2 must be a number, got 'Infinity'"):
        plan_comparison(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "is not YAML"),
        ("- a\n- b\n", "must be a mapping with the keys model, tasks, ..., got list"),
        ("", "must be a mapping with the keys model, tasks, ..., got NoneType"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_sentence(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    (found,) = problems(path)
    assert found.startswith(f"recipe {path} ") and message in found and "\n" not in found


def test_1e_4_is_a_number_in_a_file_and_in_an_override(tmp_path: Path) -> None:
    # YAML 1.1 reads both as text.
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name_or_path: demo}\ntasks: {format: demo}\ntraining: {learning_rate: 1e-4}\n")
    assert load_recipe(path).training == {"learning_rate": 1e-4}
    assert load_recipe(path, ["training.learning_rate=2E-3"]).training == {"learning_rate": 2e-3}


def test_an_override_replaces_adds_and_makes_sections() -> None:
    source = recipe(training={"learning_rate": 0.1, "weight_decay": 0.5})
    overrides = ["training.learning_rate=0.2", "evaluation.batch_size=7", "tasks.order=[last, first]", "seed=3"]
    found = load_recipe(source, overrides)
    assert found.training == {"learning_rate": 0.2, "weight_decay": 0.5}
    assert found.evaluation.batch_size == 7
    assert found.tasks.order == ["last", "first"]
    assert found.seed == 3
    assert source["training"]["learning_rate"] == 0.1, "the caller's mapping was changed"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learningrate=1", "training.learningrate is an unknown key; did you mean training.learning_rate?"),
        ("trainin.learning_rate=1", "trainin is an unknown key; did you mean training?"),
        ("seed.value=1", "override 'seed.value=1': seed is 0, not a section."),
        ("seed", "override 'seed' must have the form section.key=value, as in training.learning_rate=1e-4."),
        ("training..x=1", "override 'training..x=1' must have the form section.key=value"),
        ("seed=[", "override 'seed=[': the value '[' is not YAML: "),
    ],
)
def test_an_override_that_fits_nothing_is_refused(override: str, message: str) -> None:
    (found,) = problems(recipe(seed=0), override)
    assert found.startswith(message)


def test_variables_are_filled_in_from_the_environment_or_their_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEKR_TEST_SET", "there")
    monkeypatch.delenv("SEEKR_TEST_UNSET", raising=False)
    source = recipe(
        output_dir="runs/${SEEKR_TEST_SET:-default}/${SEEKR_TEST_UNSET:-other}",
        seed="${SEEKR_TEST_UNSET:-7}",
        training={"learning_rate": "${SEEKR_TEST_UNSET:-1e-4}"},
    )
    found = load_recipe(source)
    assert found.output_dir == "runs/there/other"
    assert found.seed == 7
    assert found.training == {"learning_rate": 1e-4}


def test_a_variable_that_is_not_set_and_has_no_default_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEEKR_TEST_UNSET", raising=False)
    (message,) = problems(recipe(output_dir="runs/${SEEKR_TEST_UNSET}"))
    assert message == (
        "output_dir: the environment variable SEEKR_TEST_UNSET is not set; set it, or write "
        "${SEEKR_TEST_UNSET:-default}."
    )


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


# A recipe that extends another ------------------------------------------------------------------------------------


def test_a_recipe_takes_over_what_it_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "model: {name_or_path: demo}\ntasks: {format: demo, order: [first, last], max_train: 7}\n"
        "training: {learning_rate: 1.0e-3, num_train_epochs: 2}\nseed: 3\n"
    )
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nseed: 4\ntraining: {num_train_epochs: 5}\n")
    (tmp_path / "own.yaml").write_text("extends: middle.yaml\ntasks: {order: [third]}\n")
    found = load_recipe(tmp_path / "own.yaml", ["tasks.max_test=2"])
    assert found.tasks.order == ["third"] and (found.tasks.max_train, found.tasks.max_test) == (7, 2)
    assert found.training == {"learning_rate": 1e-3, "num_train_epochs": 5} and found.seed == 4


def test_recipes_that_extend_each_other_or_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert re.search(r"extends is '[ab]\.yaml'; give another recipe's file name", problems(tmp_path / "a.yaml")[0])
    (tmp_path / "c.yaml").write_text("extends: nowhere.yaml\n")
    assert re.search(r"nowhere\.yaml cannot be read", problems(tmp_path / "c.yaml")[0])
    (tmp_path / "d.yaml").write_text("extends: 5\n")
    assert re.search("extends is 5", problems(tmp_path / "d.yaml")[0])


def test_the_demo_recipe_of_the_repository_is_the_demos() -> None:
    written = yaml.safe_load((REPOSITORY / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    assert written == demo_recipe()
    assert load_recipe(written) == load_recipe(demo_recipe())


# Types and bounds of every setting ----------------------------------------------------------------------------------

WRONG_TRAINING: list[tuple[dict[str, Any], str]] = [
    ({"label_smoothing_factor": 7}, "label_smoothing_factor must be a number in [0, 1), got 7."),
    ({"label_smoothing_factor": 1.0}, "label_smoothing_factor must be a number in [0, 1), got 1.0."),
    ({"weight_decay": -1}, "weight_decay must be a number of at least 0, got -1."),
    ({"weight_decay": 1e30}, "weight_decay must be a number of at most 1000, got 1e+30."),
    ({"max_grad_norm": -1}, "max_grad_norm must be a number of at least 0, got -1."),
    ({"max_grad_norm": None}, "max_grad_norm must be a number of at least 0, got None."),
    ({"max_steps": 0}, "max_steps must be a whole number above 0, or -1 for whole epochs, got 0."),
    ({"max_steps": -2}, "max_steps must be a whole number above 0, or -1 for whole epochs, got -2."),
    ({"max_steps": True}, "max_steps must be a whole number above 0, or -1 for whole epochs, got True."),
    ({"max_steps": 2**31}, "max_steps must be a whole number of at most 2147483647, got 2147483648."),
    ({"neftune_noise_alpha": "abc"}, "neftune_noise_alpha must be a number of at least 0, got 'abc'."),
    ({"neftune_noise_alpha": -5}, "neftune_noise_alpha must be a number of at least 0, got -5."),
    ({"dataloader_num_workers": -3}, "dataloader_num_workers must be a whole number of at least 0, got -3."),
    ({"dataloader_num_workers": 10**6}, "dataloader_num_workers must be a whole number of at most 256, got 1000000."),
    ({"dataloader_prefetch_factor": 0, "dataloader_num_workers": 1}, "dataloader_prefetch_factor must be a whole"),
    ({"learning_rate": 0}, "learning_rate must be a number above 0, got 0."),
    ({"learning_rate": -1e-4}, "learning_rate must be a number above 0, got -0.0001."),
    ({"learning_rate": True}, "learning_rate must be a number above 0, got True."),
    ({"learning_rate": 1e30}, "learning_rate must be a number of at most 1000, got 1e+30."),
    ({"learning_rate": [1e-4]}, "learning_rate must be a number above 0, got [0.0001]."),
    ({"adam_beta1": 1}, "adam_beta1 must be a number in [0, 1), got 1."),
    ({"adam_beta2": -0.1}, "adam_beta2 must be a number in [0, 1), got -0.1."),
    ({"adam_epsilon": -1e-8}, "adam_epsilon must be a number of at least 0, got -1e-08."),
    ({"warmup_steps": -1}, "warmup_steps must be a number of at least 0, and whole from 1 on, got -1."),
    ({"warmup_steps": 1.5}, "warmup_steps must be a number of at least 0, and whole from 1 on, got 1.5."),
    ({"num_train_epochs": "three"}, "num_train_epochs must be a number above 0, got 'three'."),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number of at least 1, got 0."),
    (
        {"per_device_train_batch_size": 2.0},
        "per_device_train_batch_size must be a whole number of at least 1, got 2.0.",
    ),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number of at least 1, got 0."),
    ({"logging_steps": 1.5}, "logging_steps must be a number above 0, and whole from 1 on, got 1.5."),
    ({"eval_steps": -1}, "eval_steps must be a number of at least 0, got -1."),
    ({"eval_accumulation_steps": 0}, "eval_accumulation_steps must be a whole number of at least 1, got 0."),
    ({"torch_empty_cache_steps": 0}, "torch_empty_cache_steps must be a whole number of at least 1, got 0."),
    ({"save_strategy": True}, "save_strategy must be one of no, steps, epoch, got True."),
    ({"save_steps": 0}, "save_steps must be a number above 0, and whole from 1 on, got 0."),
    ({"save_steps": 2.5}, "save_steps must be a number above 0, and whole from 1 on, got 2.5."),
    ({"save_total_limit": 0}, "save_total_limit must be a whole number of at least 1, got 0."),
    ({"save_total_limit": 1.5}, "save_total_limit must be a whole number of at least 1, got 1.5."),
    ({"optim": 5}, "optim must be one of adamw_torch, "),
    ({"optim": ["sgd"]}, "optim must be one of adamw_torch, "),
    ({"optim": None}, "optim must be one of adamw_torch, "),
    ({"optim_args": "no_value"}, "optim_args must be text such as name=value,name=value, got 'no_value'."),
    ({"optim_target_modules": [1]}, "optim_target_modules must be text or a list of text, got [1]."),
    ({"lr_scheduler_type": 3}, "lr_scheduler_type must be one of linear, "),
    ({"hub_strategy": "often"}, "hub_strategy must be one of end, "),
    ({"debug": "everything"}, "debug must be one or more of underflow_overflow, tpu_metrics_debug, got 'everything'."),
    ({"report_to": "nonsense"}, "report_to must be none, all, or one or more of azure_ml, "),
    ({"report_to": ["wandb", 1]}, "report_to must be none, all, or one or more of azure_ml, "),
    ({"log_level": "loud"}, "log_level must be one of detail, debug, info, warning, error, critical, passive, got 'lo"),
    ({"run_name": 5}, "run_name must be text, got 5."),
    ({"label_names": "labels"}, "label_names must be a list of text, got 'labels'."),
    ({"include_num_input_tokens_seen": "some"}, "include_num_input_tokens_seen must be true or false or one of all, "),
    ({"train_sampling_strategy": "best"}, "train_sampling_strategy must be one of random, sequential, "),
    ({"torch_compile_backend": "gcc"}, "torch_compile_backend must be one of no, eager, "),
    ({"torch_compile_mode": "fast"}, "torch_compile_mode must be one of default, "),
    (
        {"dataloader_multiprocessing_context": "thread", "dataloader_num_workers": 1},
        "dataloader_multiprocessing_context must be one of fork, ",
    ),
    ({"liger_kernel_config": {"rope": 1}}, "liger_kernel_config must be a mapping of true or false, got {'rope': 1}."),
    ({"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs must be a mapping without infinite numbers, got 'x'."),
    (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": math.nan}},
        "lr_scheduler_kwargs must be a mapping without infinite",
    ),
    ({"gradient_checkpointing_kwargs": "x"}, "gradient_checkpointing_kwargs must be a mapping, got 'x'."),
    (
        {"gradient_checkpointing_kwargs": {"reentrant": False}},
        "gradient_checkpointing_kwargs has the unknown key reentr",
    ),
    (
        {"activation_checkpointing_kwargs": {"every_n_layers": 0}},
        "activation_checkpointing_kwargs.every_n_layers must ",
    ),
    ({"accelerator_config": {"split_batches": "yes"}}, "accelerator_config.split_batches must be true or false, got '"),
    ({"accelerator_config": {"split": True}}, "accelerator_config has the unknown key split; known keys are split_ba"),
    (
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 0}}},
        "accelerator_config.gradient_accumulation_kwargs.num_steps must be a whole number of at least 1, got 0.",
    ),
    (
        {"local_rank": 5},
        "local_rank is 5, which is for several processes, but a run is one process on one device; leave",
    ),
    ({"deepspeed": "ds.json"}, "deepspeed is 'ds.json', which is for several processes"),
    ({"fsdp": "full_shard"}, "fsdp is 'full_shard', which is for several processes"),
    ({"ddp_timeout": 5}, "ddp_timeout is 5, which is for several processes"),
    ({"ddp_find_unused_parameters": True}, "ddp_find_unused_parameters is True, which is for several processes"),
    ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint is set by the run; use save_strategy instead."),
]


@pytest.mark.parametrize(("training", "message"), WRONG_TRAINING, ids=str)
def test_a_training_setting_out_of_its_bounds_is_one_sentence(training: dict[str, Any], message: str) -> None:
    (problem,) = problems(recipe(training=training))
    assert problem.startswith(f"training.{message}"), problem


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"fp16": True, "bf16": True}, "training: fp16 and bf16 exclude each other; keep one."),
        ({"fp16_full_eval": True, "bf16_full_eval": True}, "training: fp16_full_eval and bf16_full_eval exclude"),
        (
            {"dataloader_prefetch_factor": 2},
            "training: dataloader_prefetch_factor needs dataloader_num_workers above 0;",
        ),
        ({"dataloader_persistent_workers": True}, "training: dataloader_persistent_workers needs dataloader_num_wor"),
        ({"dataloader_multiprocessing_context": "fork"}, "training: dataloader_multiprocessing_context needs dataloa"),
    ],
)
def test_training_settings_that_do_not_go_together_are_one_sentence(training: dict[str, Any], message: str) -> None:
    (problem,) = problems(recipe(training=training))
    assert problem.startswith(message)


WRONG_ADAPTERS: list[tuple[dict[str, Any], str]] = [
    ({"lora_alpha": 10**30}, ".lora_alpha: 1000000000000000000000000000000 is too large; give a smaller number."),
    ({"lora_alpha": 10**9}, ".lora_alpha must be a number of at most 1000000, got 1000000000."),
    ({"lora_alpha": 0}, ".lora_alpha must be a number above 0, got 0."),
    ({"lora_alpha": True}, ".lora_alpha must be a number above 0, got True."),
    ({"r": 10**9}, ".r must be a whole number of at most 16384, got 1000000000."),
    ({"r": -1}, ".r must be a whole number of at least 1, got -1."),
    ({"r": True}, ".r must be a whole number of at least 1, got True."),
    ({"lora_dropout": 1}, ".lora_dropout must be a number in [0, 1), got 1."),
    ({"lora_dropout": -0.1}, ".lora_dropout must be a number in [0, 1), got -0.1."),
    ({"peft_type": "IA3"}, ".peft_type is 'IA3', whose change cannot be added up over the tasks; leave it out."),
    ({"inference_mode": True}, ".inference_mode must be false, got True; the adapter is trained."),
    ({"inference_mode": "no"}, ".inference_mode must be false, got 'no'; the adapter is trained."),
    ({"use_rslora": "yes"}, ".use_rslora must be true or false, got 'yes'."),
    ({"use_rslora": 1}, ".use_rslora must be true or false, got 1."),
    ({"fan_in_fan_out": None}, ".fan_in_fan_out must be true or false, got None."),
    ({"rank_pattern": {"x": -1}}, ".rank_pattern must be a mapping of whole numbers from 1 to 16384, got {'x': -1}."),
    ({"rank_pattern": {"x": 1.5}}, ".rank_pattern must be a mapping of whole numbers from 1 to 16384, got {'x': 1.5}."),
    ({"rank_pattern": {"x": True}}, ".rank_pattern must be a mapping of whole numbers from 1 to 16384, got"),
    ({"rank_pattern": [1]}, ".rank_pattern must be a mapping of whole numbers from 1 to 16384, got [1]."),
    ({"rank_pattern": {"(": 1}}, ".rank_pattern must be a mapping of whole numbers whose keys are regular expressions"),
    ({"alpha_pattern": {"x": 0}}, ".alpha_pattern must be a mapping of numbers above 0 and of at most 1000000, got"),
    ({"alpha_pattern": {"x": "8"}}, ".alpha_pattern must be a mapping of numbers above 0 and of at most 1000000, got"),
    ({"target_modules": 5}, ".target_modules must be text or a list of text that holds at least one name, got 5."),
    ({"target_modules": []}, ".target_modules must be text or a list of text that holds at least one name, got []."),
    ({"target_modules": ["q_proj", 5]}, ".target_modules must be text or a list of text that holds at least one"),
    ({"target_modules": "("}, ".target_modules must be text or a list of text that holds regular expressions, got '"),
    ({"target_modules": "(" * 900 + ")" * 900}, ".target_modules must be text or a list of text that holds regular"),
    ({"exclude_modules": "a{1,99999999999999}"}, ".exclude_modules must be text or a list of text that holds regular"),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, -1]},
        ".layers_to_transform must be a whole number or a list of whole numbers of at least 0, got [0, -1].",
    ),
    ({"target_modules": ["q_proj"], "layers_to_transform": "1"}, ".layers_to_transform must be a whole number or a"),
    ({"layers_to_transform": [0]}, ": layers_to_transform needs a list of names as target_modules, not all-"),
    ({"target_modules": ["q"], "layers_pattern": "h"}, ": layers_pattern needs layers_to_transform; set it, or leave"),
    ({"init_lora_weights": 5}, ".init_lora_weights is 5, whose change cannot be added up"),
    ({"base_model_name_or_path": "x"}, ".base_model_name_or_path is 'x', which no run reads; use model.name_or_path."),
    ({"revision": "main"}, ".revision is 'main', which no run reads; give a folder that holds this revision as model."),
    ({"loftq_config": {"loftq_bits": 4}}, ".loftq_config is {'loftq_bits': 4}, which has no effect here; leave it"),
    ({"eva_config": False}, ".eva_config is False, which has no effect here; leave it out."),
    ({"runtime_config": {"ephemeral_gpu_offload": True}}, ".runtime_config is {'ephemeral_gpu_offload': True}, which"),
]  # fmt: skip


@pytest.mark.parametrize(("adapter", "message"), WRONG_ADAPTERS, ids=lambda value: str(value)[:60])
def test_an_adapter_setting_out_of_its_bounds_is_one_sentence(adapter: dict[str, Any], message: str) -> None:
    (problem,) = problems(recipe(adapter=adapter))
    assert problem.startswith(f"adapter{message}"), problem


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name_or_path": ""}}, "model.name_or_path: '' is empty"),
        ({"model": {"name_or_path": "two words"}}, "model.name_or_path: 'two words' is no folder and no owner/name on"),
        ({"model": {"name_or_path": "demo", "trust_remote_code": "yes"}}, "model.trust_remote_code: input should be a"),
        ({"model": {"name_or_path": "demo", "bnb_4bit_use_double_quant": 1}}, "model.bnb_4bit_use_double_quant: input"),
        ({"tasks": {"format": "demo", "chat_template": "on"}}, "tasks.chat_template: input should be a valid boolean"),
        ({"tasks": {"format": "demo", "max_train": 2**31}}, "tasks.max_train: input should be less than 2147483648"),
        ({"tasks": {"format": "demo", "max_length": 2**31}}, "tasks.max_length: input should be less than 2147483648"),
        ({"tasks": {"format": "demo", "epochs": ["1", 1, 1, 1]}}, "tasks.epochs.0: input should be a valid number"),
        ({"tasks": {"format": "demo", "epochs": [1e9, 1, 1, 1]}}, "tasks.epochs.0: input should be less than or equal"),
        ({"evaluation": {"max_new_tokens": 10**12}}, "evaluation.max_new_tokens: input should be less than 2147483648"),
        ({"adapter": {"rank_limit": 0}}, "adapter.rank_limit"),
        ({"output_dir": ""}, "output_dir: '' is empty"),
        (
            {"method": {"name": "seekr", "lwf_temperature": math.inf}},
            "method.lwf_temperature must be above 0 and finite",
        ),
        (
            {"method": {"name": "seekr", "replay_batch_size": 2**40}},
            "method.replay_batch_size must be at most 2147483647",
        ),
        ({"method": {"name": "seekr", "lambda2": 1e300}}, "method.lambda2 must be at most 2147483647, got 1e+300."),
        (
            {"method": {"name": "seekr", "teacher_loss_limit": math.inf}},
            "method.teacher_loss_limit must be above 0 and",
        ),
        ({"compare": {"seeds": [-1]}}, "compare.seeds.0: input should be greater than or equal to 0, got -1."),
        ({"compare": {"orders": 0}}, "compare.orders"),
    ],
    ids=str,
)
def test_a_value_of_another_section_out_of_its_bounds_is_told(sections: dict[str, Any], message: str) -> None:
    assert problems(recipe(**sections))[0].startswith(message)


GOOD_TRAINING: list[dict[str, Any]] = [
    *({"learning_rate": value} for value in (1e-6, 2e-5, 2.0e-4, 1, 1.0)),
    *({"num_train_epochs": value} for value in (1, 0.5, 3.0, 100)),
    *({"max_steps": value} for value in (-1, 1, 10_000)),
    *({"warmup_steps": value} for value in (0, 100, 10.0, 0.03, 0.1)),
    *({"weight_decay": value} for value in (0, 0.0, 0.01, 0.1, 1)),
    *({"max_grad_norm": value} for value in (0, 0.0, 0.3, 1.0, 5)),
    *({"label_smoothing_factor": value} for value in (0, 0.1)),
    *({"neftune_noise_alpha": value} for value in (None, 5, 5.0, 15.0)),
    *({"logging_steps": value} for value in (1, 10, 500.0, 0.05)),
    *({"logging_strategy": value} for value in ("no", "steps", "epoch")),
    *({"save_strategy": value} for value in ("no", "steps", "epoch")),
    *({"save_steps": value} for value in (1, 500, 0.1)),
    *({"save_total_limit": value} for value in (None, 1, 3)),
    *({"optim": value} for value in ("adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "sgd")),
    *({"lr_scheduler_type": value} for value in ("linear", "cosine", "constant", "constant_with_warmup")),
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    {"lr_scheduler_kwargs": {}, "optim_args": "a=1, b=2", "optim_target_modules": ["attn", "mlp"]},
    *({"report_to": value} for value in ("none", "all", "wandb", ["tensorboard", "wandb"], [], None, ["none"])),
    {"bf16": True, "tf32": None, "fp16": False, "bf16_full_eval": True},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2, "offload": True}},
    {"dataloader_num_workers": 4, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True},
    {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "spawn", "dataloader_pin_memory": False},
    {"accelerator_config": {"split_batches": True, "gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-5},
    {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 4},
    {"torch_empty_cache_steps": 10, "auto_find_batch_size": True, "full_determinism": False, "use_cache": False},
    {"torch_compile": True, "torch_compile_backend": "inductor", "torch_compile_mode": "max-autotune"},
    {"local_rank": -1, "ddp_timeout": 1800, "deepspeed": None, "fsdp": None, "ddp_find_unused_parameters": False},
    {"log_level": "info", "disable_tqdm": True, "run_name": "first try", "project": "x", "hub_model_id": "me/it"},
    {"train_sampling_strategy": "group_by_length", "length_column_name": "length", "label_names": ["labels"]},
    {"include_num_input_tokens_seen": True}, {"include_num_input_tokens_seen": "non_padding"},
    {"use_liger_kernel": True, "liger_kernel_config": {"rope": True, "swiglu": False}},
    {"do_train": True, "do_eval": False, "remove_unused_columns": True, "debug": "underflow_overflow"},
    {"metric_for_best_model": None, "greater_is_better": None, "eval_steps": 100, "eval_delay": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("training", GOOD_TRAINING, ids=str)
def test_what_people_write_for_the_training_passes_and_transformers_takes_it(
    training: dict[str, Any], tmp_path: Path
) -> None:
    from stress.recipes import use

    found = load_recipe(recipe(training=training))
    assert found.training == training
    use(found, tmp_path)


GOOD_ADAPTERS: list[dict[str, Any]] = [
    *({"r": value} for value in (1, 8, 64, 256, 1024)),
    *({"lora_alpha": value} for value in (1, 16, 0.5, 32.0, 512)),
    *({"lora_dropout": value} for value in (0, 0.0, 0.05, 0.1, 0.5)),
    *({"target_modules": value} for value in (None, "all-linear", ["q_proj", "v_proj"], r".*\\.(q|v)_proj", "q_proj")),
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": ["layers", "h"]},
    *({"exclude_modules": value} for value in (None, ["lm_head"], "lm_head")),
    *({"init_lora_weights": value} for value in (True, False, "gaussian", "Gaussian", "orthogonal")),
    {"rank_pattern": {"q_proj": 4, "^model.layers.0.self_attn.k_proj": 2}, "alpha_pattern": {"q_proj": 8, "k": 0.5}},
    {"rank_pattern": {}, "alpha_pattern": None, "use_rslora": True, "fan_in_fan_out": False, "inference_mode": False},
    {"bias": "none", "task_type": "CAUSAL_LM", "peft_type": "LORA"}, {"task_type": None},
    {"modules_to_save": None, "loftq_config": {}, "eva_config": None, "use_dora": False, "megatron_core": "m.core"},
    {"velora_config": False, "kasa_config": [], "layer_replication": None, "runtime_config": None},
    {"mode": "continue", "rank_limit": None}, {"rank_limit": 64}, {"rank_limit": "auto"},
]  # fmt: skip


@pytest.mark.parametrize("adapter", GOOD_ADAPTERS, ids=str)
def test_what_people_write_for_the_adapter_passes_and_peft_takes_it(adapter: dict[str, Any], tmp_path: Path) -> None:
    from stress.recipes import use

    use(load_recipe(recipe(adapter=adapter)), tmp_path)


# Hostile files, keys and values -------------------------------------------------------------------------------------


def every_key() -> list[tuple[str, ...]]:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    inner = [(name, key) for name, kind in sections.items() for key in getattr(kind, "model_fields", ())]
    libraries = {"training": training_settings(), "adapter": lora_settings(), "method": SeekrConfig().to_dict()}
    named = [(section, key) for section, keys in libraries.items() for key in keys]
    return [*((name,) for name in sections), *inner, *named, ("method", "name")]


HUGE = (
    "x" * 30_000,
    "two words " * 3000,
    "a\nb" * 300,
    10**400,
    -(10**5000),
    [0] * 5000,
    ["y" * 5000] * 50,
    {f"k{n}": n for n in range(3000)},
    {"z" * 20_000: 1},
    {"a": {"b": ["c" * 9000]}},
    math.inf,
)


@pytest.mark.parametrize("value", HUGE, ids=range(len(HUGE)))
def test_a_huge_value_at_any_key_is_told_in_bounded_lines(value: Any) -> None:
    for place in every_key():
        mapping = recipe(method={"name": "seekr"})
        target = mapping if len(place) == 1 else mapping.setdefault(place[0], {})
        target[place[-1]] = value
        try:
            load_recipe(mapping)
        except ConfigError as error:
            for problem in error.problems:
                # 200 of the value, and all the names of a setting's choices.
                assert len(problem) < 3000 and len(problem.splitlines()) == 1, (place, len(problem))
                assert max(map(len, re.findall(r"x+|y+|z+|c+|0+|k+", problem)), default=0) <= 200, place


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    place=st.sampled_from(every_key()),
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**30), 10**30)
        | st.floats()
        | st.text(max_size=400).map(lambda text: text * 3),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=30), inner, max_size=5),
        max_leaves=10,
    ),
)
def test_any_value_at_any_key_is_accepted_or_told_in_bounded_lines(place: tuple[str, ...], value: Any) -> None:
    mapping = recipe(method={"name": "seekr"})
    target = mapping if len(place) == 1 else mapping.setdefault(place[0], {})
    target[place[-1]] = value
    told: list[str] = []
    try:
        found = load_recipe(mapping)
        assert load_recipe(found) == found
    except ConfigError as error:
        told = error.problems or ["" * 3000]
    assert all(len(problem) < 3000 and len(problem.splitlines()) == 1 for problem in told)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_recipe_is_accepted_and_usable_or_refused(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from stress.recipes import check_one, mutations

    folder = tmp_path_factory.mktemp("recipe")
    for text in mutations(seed, 3):
        assert check_one(text, folder) in ("accepted", "refused"), text


def test_what_becomes_of_a_mutated_recipe_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stress import recipes

    assert len(set(recipes.mutations(0, 30))) > 25 and list(recipes.mutations(0, 5)) == list(recipes.mutations(0, 5))
    good = yaml.safe_dump(GOOD)
    assert recipes.check_one(good, tmp_path) == "accepted"
    assert recipes.check_one("seed: 1", tmp_path) == "refused"
    bad = yaml.safe_dump(recipe(training={"lr_scheduler_type": "cosine", "logging_steps": 2.5}))
    assert recipes.check_one(bad, tmp_path) == "refused"
    monkeypatch.setattr("seekr_peft.recipe.schema.training_problems", lambda training, fields: [])
    assert recipes.check_one(bad, tmp_path).startswith("unusable: ValueError")
    monkeypatch.setattr("seekr_peft.recipe.schema.training_problems", lambda training, fields: 1 / 0)
    assert recipes.check_one(bad, tmp_path).startswith("traceback: ZeroDivisionError")
    monkeypatch.setattr("seekr_peft.recipe.schema.training_problems", lambda training, fields: ["x" * 5000])
    assert recipes.check_one(bad, tmp_path).startswith("traceback: 'xxx")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel: {name_or_path: demo}\nseed: 2\n", "the key seed is given twice, in line 1 and in line 3"),
        (
            "training: {weight_decay: 0,\n  weight_decay: 1}",
            "the key weight_decay is given twice, in line 1 and in line 2",
        ),
        ("[" * 100_000, "more than 20 levels"),
        ("a: &a [*a]", "stands for something that holds it"),
        ("seed: " + "9" * 5000, "a number has more than 100 characters"),
        ('output_dir: "a\\0b"', "holds control characters"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
)
def test_a_hostile_file_is_one_line_and_status_2(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["seekr-peft", "run", str(path), "--check"])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    printed = capsys.readouterr()
    assert exited.value.code == 2 and printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"seekr-peft: recipe {path} is not YAML: ") and message in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=" + "[" * 100_000, "more than 20 levels"),
        ("seed=&a [*a]", "stands for something that holds it"),
        ("seed=" + "9" * 5000, "a number has more than 100 characters"),
        ("training={a: 1, a: 2}", "the key a is given twice"),
        ("seed=!!python/object/apply:os.getcwd []", "is not allowed"),
        ('output_dir="a\\0b"', "holds control characters"),
        ("a.b" * 50_000 + "=1", "must have the form section.key=value"),
        ("x" * 50_000, "must have the form section.key=value"),
        ("a\x1bb=1", "must have the form section.key=value"),
        ("seed." + "y" * 50_000 + "=1", "seed is 0, not a section"),
        ("output_dir=" + "x" * 300, "a name has more than 255 bytes"),
        ("model.name_or_path=~nobody/at/all", "has no config.json"),
        ("tasks.order=[" + "x, " * 3000 + "]", "list should have at most 1000 items"),
    ],
    ids=lambda value: ascii(value[:40]),
)
def test_a_hostile_override_is_one_line(override: str, message: str) -> None:
    (found,) = problems(recipe(seed=0), override)
    assert message in found and len(found) < 900 and len(found.splitlines()) == 1


def test_a_path_that_no_file_can_have_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    long = str(tmp_path / ("ä" * 130))
    for place, path, why in (
        (("output_dir",), long, "a name has more than 255 bytes"),
        (("output_dir",), str(tmp_path / "loop"), "Too many levels of symbolic links"),
        (("output_dir",), "a/" * 3000, "File name too long"),
        (("model", "name_or_path"), long, "a name has more than 255 bytes"),
        (("tasks", "path"), str(tmp_path / "loop" / "x"), "Too many levels of symbolic links"),
        (("evaluation", "general_path"), long, "a name has more than 255 bytes"),
        (("compare", "runs_dir"), long, "a name has more than 255 bytes"),
    ):
        mapping = recipe()
        (mapping if len(place) == 1 else mapping.setdefault(place[0], {}))[place[-1]] = path
        found = problems(mapping)
        assert f"{'.'.join(place)}: " in found[0] and f"cannot be used ({why}); give another path." in found[0], found


def test_recipes_that_extend_each_other_without_end_are_refused(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    assert "extends is '21.yaml'; give another" in problems(tmp_path / "0.yaml")[0]
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "a.yaml").write_text("extends: loop.yaml\n")
    assert "loop.yaml cannot be read: Too many levels of symbolic links" in problems(tmp_path / "a.yaml")[0]
    (tmp_path / "a.yaml").write_text(f"extends: {'x' * 300}.yaml\n")
    assert "cannot be read: File name too long" in problems(tmp_path / "a.yaml")[0]


def test_an_alias_is_a_value_of_its_own_that_an_override_changes_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "model: {name_or_path: demo}\ntasks: {format: demo}\n"
        "training: {gradient_checkpointing_kwargs: &k {every_n_layers: 1}, activation_checkpointing_kwargs: *k}\n"
    )
    found = load_recipe(path, ["training.gradient_checkpointing_kwargs.every_n_layers=2"])
    assert found.training["activation_checkpointing_kwargs"] == {"every_n_layers": 1}
    assert found.training["gradient_checkpointing_kwargs"] == {"every_n_layers": 2}


def test_a_mapping_that_no_recipe_needs_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    for value, message in (
        (endless, "holds more than 20 levels or 10000 values"),
        ({"a": [0] * 20_000}, "holds more than 20 levels or 10000 values"),
        ({1: 2}, "training: the key 1 is no plain text; write it in quotes."),
        ({"run_name": "a\0"}, "training.run_name: 'a\\x00' holds control characters; leave them out."),
        ({"run_name": Path("x")}, "is of the type PosixPath; give text, numbers, truth values, lists and mappings"),
    ):
        (found,) = problems(recipe(training=value))
        assert message in found


def test_many_mistakes_are_counted_and_soon_told() -> None:
    found = problems(recipe(training={f"k{n}": n for n in range(9000)}))
    assert len(found) == 21 and found[-1] == "training: there are 8980 more unknown keys."
    found = problems({**recipe(), **{f"k{n}": n for n in range(900)}})
    assert len(found) == 51 and found[-1] == "... and 850 more mistakes."


def test_a_stored_recipe_that_somebody_changed_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for text, message in (
        ("model: {name_or_path: demo}\ntasks: {format: demo}\nmethod: {}", "is no recipe: method.name must be one of"),
        (
            "model: {name_or_path: demo}\ntasks: {format: demo}\nmethod: {name: seekr, lambda1: 7}",
            "method.lambda1 must",
        ),
        ("a: &a [*a]", "is not YAML: the alias *a stands for"),
        ("model: 5", "is no recipe: model: input should be"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            stored_recipe(path)
        assert message in caught.value.problems[0] and len(caught.value.problems) == 1


def test_a_variable_is_filled_in_whatever_its_length_and_dollars_without_an_end_are_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SEEKR_TEST_UNSET", raising=False)
    found = load_recipe(recipe(training={"run_name": f"${{SEEKR_TEST_UNSET:-{'x' * 3000}}}/${{"}))
    assert found.training["run_name"] == "x" * 3000 + "/${"
    endless = "${SEEKR_TEST_UNSET:-" * 20_000
    assert load_recipe(recipe(training={"run_name": endless})).training["run_name"] == endless
    monkeypatch.setenv("SEEKR_TEST_SET", "a\x1b[31m")
    assert problems(recipe(training={"run_name": "${SEEKR_TEST_SET}"})) == [
        "training.run_name: 'a\\x1b[31m' holds control characters; set its variables anew."
    ]
