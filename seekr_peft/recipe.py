"""Recipes: a YAML file checked in full before anything is loaded, every problem at once. May import ``config``,
``library_settings``, ``plain_lora``, ``tasks``, ``evaluation.general`` and ``errors``."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .config import SeekrConfig, unknown_key
from .errors import ConfigError, shown
from .files import write_text
from .library_settings import Setting, lora_settings, training_choices, training_settings
from .method_names import ADAPTER_MODES, method_names
from .paths import given_path, path_problem, reason
from .plain_lora import why_refused

if TYPE_CHECKING:
    from .evaluation.general import GeneralTest

_PATHS = (
    ("", "output_dir"),
    ("model", "name_or_path"),
    ("tasks", "path"),
    ("evaluation", "general_path"),
    ("compare", "runs_dir"),
)

DEMO = "demo"
"""As ``model.name_or_path`` and ``tasks.format``: the model and tasks that ship with the package."""

Count = Annotated[int, Field(ge=1, strict=True)]
# numpy takes 32 bits, and a task's index is added.
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
_SET_BY_THE_RUN = {
    "output_dir": "output_dir",
    "seed": "seed",
    "data_seed": "seed",
    "resume_from_checkpoint": "--resume",
    "use_cpu": "the environment variable CUDA_VISIBLE_DEVICES",
    "eval_strategy": "the evaluation section",
    "eval_on_start": "the evaluation section",
    "load_best_model_at_end": "the evaluation section",
    "push_to_hub": "seekr-peft export",
}
_CHECKPOINTING_OPTIONS = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
_PLAIN_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
_WITHOUT_KEYWORDS = ("constant", "constant_with_warmup")
_NEEDS_A_METRIC = ("reduce_lr_on_plateau", "greedy")
_POSITIVE = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
)


class _Section(BaseModel):
    # "model" is a key of the contract, not pydantic's namespace.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(_Section):
    """The base model. Names of ``from_pretrained`` and ``BitsAndBytesConfig`` where they have one."""

    name_or_path: str
    """A folder, or a model on the Hugging Face hub; "demo" is the model in the package."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """None: bfloat16 where the GPU has it, float16 on older ones, float32 on a CPU."""
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    use_safetensors: bool = True
    """False: weights that are there as pytorch_model.bin alone are read too, a format that can run code."""


class AdapterSection(_Section):
    """``mode`` and ``rank_limit`` of the adapter stack; every other key is one of ``LoraConfig``'s."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())
    mode: Literal["stack", "continue"] = "stack"
    rank_limit: Count | Literal["auto"] | None = "auto"
    """Largest rank of the earlier adapters' sum; auto: 8 times ``r``; null: no limit, and every task costs more."""

    def lora(self) -> dict[str, Any]:
        """The keyword arguments of ``LoraConfig``."""
        settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        return {**settings, **(self.model_extra or {})}


class TasksSection(_Section):
    """The task sequence."""

    format: str
    """jsonl, trace, superni, long_sequence, mixed (tasks of several formats, FORMAT/NAME each), or demo."""
    path: str | None = None
    order: list[str] | None = None
    """Task names in order of training; None takes the format's own order."""
    max_train: Count | None = None
    max_test: Count | None = None
    epochs: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """Epochs of each task in ``order``; None uses ``training.num_train_epochs`` for all."""
    max_length: Annotated[int, Field(ge=5, strict=True)] = 512
    """Tokens of prompt and answer together; longer prompts lose their middle."""
    chat_template: bool = False
    """Whether plain prompts and answers are written as a user's and an assistant's message, by the tokenizer's chat
    template; samples that are messages themselves always are."""


class EvaluationSection(_Section):
    """Greedy generation after each task on all tasks seen so far; tests of general ability, also before the first."""

    max_new_tokens: Count = 64
    batch_size: Count = 32
    general: list[str] = []
    """Names of the tests: NAME/test.jsonl (multiple choice, as mmlu) or text/NAME.txt (the loss on held-out text)."""
    general_path: str | None = None
    """The folder of those files; None looks in ``tasks.path`` and in the folder around it."""
    general_samples: Count = 200
    """Questions of a multiple-choice test, at most: always the same ones."""
    general_tokens: Annotated[int, Field(ge=2, strict=True)] = 16384
    """Tokens of a text, at most: its first ones."""


class CompareSection(_Section):
    """What ``seekr-peft compare`` runs side by side; ``seekr-peft run`` takes no notice of it."""

    title: str | None = None
    variants: dict[str, dict[str, Any]] = {}
    """Label to the recipe keys in which that variant differs, dotted: ``{random heads: {method.head_choice: random}}``.
    Empty: the methods sequential, replay and seekr."""
    seeds: list[Seed] = [0, 1, 2]
    orders: Count | list[list[str]] = 1
    """Orders of the tasks, or how many: the one of ``tasks.order``, then seeded shuffles of it."""
    runs_dir: str | None = None
    """Where the runs are kept; None: ``runs`` in ``output_dir``. Comparisons with the same one share their runs."""
    baseline: str | None = None
    """The variant that the others are tested against; None takes ``replay`` where there is one."""
    curve: str | None = None
    """The key whose values are the x axis of a figure, such as ``method.head_budget``."""


class Recipe(_Section):
    """A whole run: resolved, validated, plain values."""

    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    method: dict[str, Any] = {"name": "seekr"}
    training: dict[str, Any] = {}
    tasks: TasksSection
    evaluation: EvaluationSection = EvaluationSection()
    seed: Seed = 0
    output_dir: str = "runs/run"
    compare: CompareSection = CompareSection()

    @property
    def method_name(self) -> str:
        """Name of the method."""
        return str(self.method["name"])

    def method_config(self) -> SeekrConfig:
        """The method's knobs; the recipe's seed unless the method has its own."""
        settings = {key: value for key, value in self.method.items() if key != "name"}
        return SeekrConfig.from_mapping({"seed": self.seed, **settings})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML."""
        mapping = self.model_dump(mode="json")
        if self.compare == CompareSection():
            del mapping["compare"]
        return mapping


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe without loading a model or data.

    Args:
        source: A YAML file, a mapping, or a Recipe. A file with ``extends: OTHER.yaml`` (beside it) takes over all
            that it does not say itself.
        overrides: ``section.key=value`` strings; the value is read as YAML.

    Raises:
        ConfigError: ``problems`` holds every mistake, one sentence each.
    """
    if isinstance(source, Recipe):
        source = source.to_dict()
    mapping = (
        _read_extended(given_path(source, "recipe", ConfigError))
        if isinstance(source, (str, Path))
        else _copied(source)
    )
    problems: list[str] = []
    for override in overrides:
        _override(mapping, override, problems)
    mapping = _expanded(mapping, problems)
    if unusable := _fill_in_paths(mapping):
        # What the checks look for in the file system cannot be looked for.
        raise ConfigError([*problems, *unusable])
    recipe = _validated(mapping, problems)
    for check in _CHECKS:
        problems += _without_crash(check, mapping)
    if problems or recipe is None:
        raise ConfigError(problems)
    return _resolved(recipe)


def _fill_in_paths(mapping: dict[str, Any]) -> list[str]:
    """Fill in ``~`` in the recipe's paths; what is wrong with them, as far as any program would see."""
    problems = []
    for section, key in _PATHS:
        values = mapping.get(section) if section else mapping
        value = values.get(key) if isinstance(values, dict) else None
        if not isinstance(value, str):
            continue
        if problem := path_problem(value):
            problems.append(f"{section}.{key}".lstrip(".") + f" {shown(value)} {problem}; give another path.")
        elif isinstance(values, dict) and key != "name_or_path":
            values[key] = str(Path(value).expanduser()) if value.startswith("~") else value
    return problems


def task_order(recipe: Recipe) -> list[str]:
    """The names of the recipe's tasks, in order of training; reads file names only."""
    if recipe.tasks.order:
        return recipe.tasks.order
    if recipe.tasks.format == DEMO:
        from .demo.words import TASK_NAMES

        return list(TASK_NAMES)
    from .tasks import task_names

    return list(task_names(recipe.tasks.format, Path(str(recipe.tasks.path))))


def general_tests(recipe: Recipe) -> list["GeneralTest"]:
    """The recipe's tests of general ability; reads file names only."""
    if not recipe.evaluation.general:
        return []
    from .evaluation.general import find_general_tests

    return find_general_tests(recipe.evaluation.general, recipe.evaluation.general_path, recipe.tasks.path)[0]


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML; a reader sees the whole file or none."""
    write_text(path, recipe_text(recipe))


def stored_recipe(path: Path) -> Recipe:
    """What ``save_recipe`` wrote; ConfigError when it is no recipe. The folders it names need not be there any more."""
    problems: list[str] = []
    recipe = _validated(_read_yaml(path), problems)
    if recipe is None:
        raise ConfigError(f"{path} is no recipe: {problems[0]}")
    return _resolved(recipe)


def _resolved(recipe: Recipe) -> Recipe:
    """With every default of the method and the adapter written out, so that the stored recipe says all of it."""
    settings = recipe.method_config().to_dict()
    if "seed" not in recipe.method:
        # It follows the recipe's own.
        del settings["seed"]
    method = {"name": recipe.method_name, **settings}
    adapter = AdapterSection(mode=recipe.adapter.mode, rank_limit=recipe.adapter.rank_limit, **recipe.adapter.lora())
    return recipe.model_copy(update={"method": method, "adapter": adapter})


def _read_extended(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's mapping, laid over that of the file it extends."""
    mapping = _read_yaml(path)
    parent = mapping.pop("extends", None)
    if parent is None:
        return mapping
    if not isinstance(parent, str) or path.resolve() in seen:
        raise ConfigError(f"recipe {path}: extends is {parent!r}; give another recipe's file name, not in a circle.")
    return _laid_over(
        _read_extended(given_path(path.parent / parent, "recipe", ConfigError), (*seen, path.resolve())), mapping
    )


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` with what only ``below`` says; sections are merged key by key, everything else is replaced."""
    both = {key: below[key] for key in below.keys() & above.keys()}
    merged = {
        key: _laid_over(value, above[key]) if isinstance(value, dict) and isinstance(above[key], dict) else above[key]
        for key, value in both.items()
    }
    return {**below, **above, **merged}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}; give the path of a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"recipe {path} is not YAML: {detail}") from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"recipe {path} must be a mapping with the keys model, tasks, ..., got {type(document).__name__}."
        )
    return document


def _override(mapping: dict[str, Any], override: str, problems: list[str]) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        problems.append(
            f"override {override!r} must have the form section.key=value, as in training.learning_rate=1e-4."
        )
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        problems.append(f"override {override!r}: the value {text!r} is not YAML.")
        return
    target = mapping
    for part in parts[:-1]:
        nested = target.setdefault(part, {})
        if not isinstance(nested, dict):
            problems.append(f"override {override!r}: {part} is {nested!r}, not a section.")
            return
        target = nested
    target[parts[-1]] = value


def _validated(mapping: dict[str, Any], problems: list[str]) -> Recipe | None:
    try:
        return Recipe.model_validate(mapping)
    except ValidationError as error:
        problems += [_sentence(detail, mapping) for detail in error.errors()]
        return None


def _sentence(detail: Any, mapping: dict[str, Any]) -> str:
    path = [str(part) for part in detail["loc"]]
    where = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return unknown_key(path[-1], _known_keys(path[:-1]), "".join(f"{part}." for part in path[:-1]))
    if detail["type"] == "missing":
        return f"{where} is missing; add it to the recipe."
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{where}: {message}, got {detail['input']!r}."


def _known_keys(path: list[str]) -> list[str]:
    section: Any = Recipe
    for part in path:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def _method_problems(mapping: dict[str, Any]) -> list[str]:
    method = mapping.get("method", {"name": "seekr"})
    if not isinstance(method, dict):
        return []
    problems = []
    known = method_names()
    if method.get("name", None) not in known:
        problems.append(f"method.name must be one of {', '.join(known)}, got {method.get('name')!r}.")
    mode, modes = mapping.get("adapter", {}).get("mode", "stack"), ADAPTER_MODES.get(str(method.get("name")))
    if modes and mode not in modes:
        problems.append(f"adapter.mode must be {' or '.join(modes)} for method {method['name']}, got {mode!r}.")
    try:
        SeekrConfig.from_mapping({key: value for key, value in method.items() if key != "name"})
    except ConfigError as error:
        problems += [f"method.{problem}".replace("did you mean ", "did you mean method.") for problem in error.problems]
    return problems


def _training_problems(mapping: dict[str, Any]) -> list[str]:
    training = mapping.get("training", {})
    if not isinstance(training, dict):
        return []
    fields, choices = training_settings(), training_choices()
    problems = []
    for key, value in training.items():
        if key in _SET_BY_THE_RUN:
            problems.append(f"training.{key} is set by the run; use {_SET_BY_THE_RUN[key]} instead.")
        elif key not in fields:
            problems.append(unknown_key(key, list(fields), "training."))
        elif key in _POSITIVE and not (_is_number(value) and value > 0):
            problems.append(f"training.{key} must be a number above 0, got {value!r}.")
        elif key == "max_steps" and value == 0:
            problems.append("training.max_steps must be a number above 0, or -1 for whole epochs, got 0.")
        elif _is_whole(fields[key]) and not (isinstance(value, int) and _is_number(value)):
            problems.append(f"training.{key} must be a whole number, got {value!r}.")
        elif type(fields[key].default) in (int, float) and not _is_number(value):
            problems.append(f"training.{key} must be a number, got {value!r}.")
        elif _is_switch(fields[key]) and not isinstance(value, bool):
            problems.append(f"training.{key} must be true or false, got {value!r}.")
        elif key in choices and value not in choices[key]:
            problems.append(f"training.{key} must be one of {', '.join(choices[key])}, got {value!r}.")
        elif key in _CHECKPOINTING_OPTIONS and isinstance(value, dict) and value.get("use_reentrant"):
            problems.append(
                f"training.{key}: use_reentrant must be false, got {value['use_reentrant']!r}; under reentrant "
                f"checkpointing a captured attention has no gradient."
            )
    if training.get("lr_scheduler_type", "linear") in choices["lr_scheduler_type"]:
        problems += _scheduler_problems(training)
    return problems


def _scheduler_problems(training: dict[str, Any]) -> list[str]:
    """By making the scheduler: which keywords one takes and needs is only in its function."""
    name, keywords = training.get("lr_scheduler_type"), training.get("lr_scheduler_kwargs")
    if name in _NEEDS_A_METRIC:
        return [f"training.lr_scheduler_type {name!r} needs a metric during training, which is not taken; try cosine."]
    if keywords is not None and not isinstance(keywords, dict):
        return [f"training.lr_scheduler_kwargs must be a mapping, got {keywords!r}."]
    if not keywords and name in (None, *_PLAIN_SCHEDULERS):
        return []
    if name in _WITHOUT_KEYWORDS:
        return [f"training.lr_scheduler_kwargs {keywords!r}: {name} takes none; leave them out."]
    # Seconds, and only for a recipe that asks for such a scheduler.
    import torch
    from transformers import get_scheduler

    rate = training.get("learning_rate", 5e-5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate if _is_number(rate) and rate > 0 else 5e-5)
    try:
        get_scheduler(name or "linear", optimizer, 1, 2, scheduler_specific_kwargs=keywords)
    except (TypeError, ValueError) as error:
        if keywords:
            return [f"training.lr_scheduler_kwargs {keywords!r} do not fit {name or 'linear'}: {error}"]
        return [f"training.lr_scheduler_type {name} needs training.lr_scheduler_kwargs: {error}"]
    return []


def _is_whole(field: Setting) -> bool:
    # warmup_steps has a whole default and takes shares too.
    return type(field.default) is int and "float" not in field.annotation


def _is_switch(field: Setting) -> bool:
    return field.annotation in ("bool", "bool | None")


def _adapter_problems(mapping: dict[str, Any]) -> list[str]:
    adapter = mapping.get("adapter", {})
    if not isinstance(adapter, dict):
        return []
    known = lora_settings()
    own = list(AdapterSection.model_fields)
    problems = [unknown_key(key, [*own, *known], "adapter.") for key in adapter if key not in (*own, *known)]
    r, alpha, dropout = adapter.get("r", 1), adapter.get("lora_alpha", 1), adapter.get("lora_dropout", 0.0)
    if not _is_number(r) or not isinstance(r, int) or r < 1:
        problems.append(f"adapter.r must be a whole number of at least 1, got {r!r}.")
    if not _is_number(alpha) or alpha < 1:
        problems.append(f"adapter.lora_alpha must be a number of at least 1, got {alpha!r}.")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        problems.append(f"adapter.lora_dropout must be a number in [0, 1), got {dropout!r}.")
    for key in [key for key in adapter if key in known]:
        why = _why_refused(key, adapter[key], known[key].default)
        if why:
            problems.append(f"adapter.{key} is {adapter[key]!r}, {why}")
    return problems


def _why_refused(key: str, value: Any, default: Any) -> str | None:
    why = why_refused(key, value, default)
    if key == "task_type" and not why and value not in (None, "CAUSAL_LM"):
        return "but a run trains a causal language model; leave it out, which means CAUSAL_LM."
    return why


def _model_problems(mapping: dict[str, Any]) -> list[str]:
    name = mapping["model"]["name_or_path"]
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    if not looks_local and "/" not in name and name != DEMO and get_close_matches(name, [DEMO]):
        return [f"model.name_or_path: {name} is no folder and no owner/name on the hub; did you mean {DEMO}?"]
    if name == DEMO or not looks_local:
        return []
    from .base_files import check_base_files

    try:
        check_base_files(Path(name).expanduser(), name, mapping["model"].get("use_safetensors", True) is not False)
    except ConfigError as error:
        return error.problems
    return []


def _task_problems(mapping: dict[str, Any]) -> list[str]:
    from .tasks import FORMATS, MIXED, find_task_problems

    tasks = mapping["tasks"]
    order, epochs = tasks.get("order"), tasks.get("epochs")
    if order is not None and not isinstance(order, list):
        return []
    problems = []
    if tasks["format"] == DEMO:
        from .demo.words import TASK_NAMES

        order = order or list(TASK_NAMES)
        unknown = [name for name in order if name not in TASK_NAMES]
        problems += [f"tasks.order: {unknown_key(name, list(TASK_NAMES))}" for name in unknown]
        twice = {name for name in order if order.count(name) > 1}
        problems += [f"tasks.order names {name!r} more than once." for name in sorted(twice)]
        # The general tests are looked for there, too.
        if tasks.get("path") and not mapping.get("evaluation", {}).get("general"):
            problems.append(
                f"tasks.path: {tasks['path']} would not be read, as the tasks of the format {DEMO!r} come with the "
                f"package; leave it out, or give the format of your own tasks: {', '.join((*FORMATS, MIXED))}."
            )
    elif tasks["format"] in (*FORMATS, MIXED) and not tasks.get("path"):
        problems.append(f"tasks.path is missing; format {tasks['format']!r} needs the folder of the tasks.")
    else:
        path = str(tasks.get("path") or "")
        problems += [f"tasks: {problem}" for problem in find_task_problems(tasks["format"], path, order)]
    if epochs is not None and order is not None and len(epochs) != len(order):
        problems.append(f"tasks.epochs has {len(epochs)} numbers for {len(order)} tasks; give one for each.")
    return problems


def _evaluation_problems(mapping: dict[str, Any]) -> list[str]:
    evaluation = mapping.get("evaluation", {})
    names = evaluation.get("general")
    if not isinstance(names, list) or not names:
        return []
    from .evaluation.general import find_general_tests

    _, problems = find_general_tests(names, evaluation.get("general_path"), mapping["tasks"].get("path"))
    return [f"evaluation.general: {problem}" for problem in problems]


_CHECKS = (
    _method_problems,
    _training_problems,
    _adapter_problems,
    _model_problems,
    _task_problems,
    _evaluation_problems,
)


def _without_crash(check: Callable[[dict[str, Any]], list[str]], mapping: dict[str, Any]) -> list[str]:
    """A section of the wrong shape was already reported by its type; its further checks then have nothing to say."""
    try:
        return check(mapping)
    except (KeyError, TypeError, AttributeError):
        return []
    except OSError as error:
        return [f"{error.filename}: {reason(error)}; check that path."]


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_PLAIN_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _expanded(value: Any, problems: list[str], where: str = "") -> Any:
    """Fill in ``${NAME:-default}`` from the environment, and read 1e-4 as a number (YAML 1.1 calls it text)."""
    if isinstance(value, dict):
        return {key: _expanded(item, problems, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, problems, where) for item in value]
    if not isinstance(value, str):
        return value
    for match in _VARIABLE.finditer(value):
        if match[2] is None and match[1] not in os.environ:
            problems.append(
                f"{where}: the environment variable {match[1]} is not set; set it, or write ${{{match[1]}:-default}}."
            )
    filled = _VARIABLE.sub(lambda match: os.environ.get(match[1]) or match[2] or "", value)
    if filled != value:
        # "${STEPS:-100}" means the number, as it would without the variable.
        filled = _scalar(filled)
    return float(filled) if isinstance(filled, str) and _PLAIN_FLOAT.fullmatch(filled) else filled


def _scalar(text: str) -> Any:
    """``text`` as YAML reads it where that is a number or a truth value, else itself."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
