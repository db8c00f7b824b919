"""Recipes: a YAML file checked in full before anything is loaded, every problem at once."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..config import SeekrConfig, unknown_key, unknown_keys
from ..errors import ConfigError, cut, shown
from ..files.paths import given_path, path_problem, reason
from ..files.yaml_text import DEEPEST, MOST_NODES, UNSAFE, YamlTextError, parse_yaml, read_yaml
from ..methods.registry import ADAPTER_MODES, method_names
from ..model.plain_lora import why_refused
from .library_fields import lora_settings, training_choices, training_settings
from .setting_rules import NEVER_ON, is_number, lora_problems, training_problems

if TYPE_CHECKING:
    from ..evaluation.general import GeneralTest

_PATHS = (
    ("", "output_dir"),
    ("model", "name_or_path"),
    ("tasks", "path"),
    ("evaluation", "general_path"),
    ("compare", "runs_dir"),
)

DEMO = "demo"
"""As ``model.name_or_path`` and ``tasks.format``: the model and tasks that ship with the package."""

Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
Name = Annotated[str, Field(min_length=1)]
ShortName = Annotated[str, Field(min_length=1, max_length=200)]
Names = Annotated[list[ShortName], Field(max_length=1000)]
# numpy takes 32 bits, and a task's index is added.
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
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
"""Bytes of a file's or folder's name, on every common file system."""
_LONGEST_CHAIN = 20
"""Recipes that extend each other."""
_LARGEST_NUMBER = 10**18
"""No setting is larger, and any library takes it."""
_TOLD = 50
"""Mistakes that are told; the rest is counted."""


class _Section(BaseModel):
    # "model" is a key of the contract, not pydantic's namespace.
    # Infinite numbers stay what they are, so that a stored recipe is the same one.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )


class ModelSection(_Section):
    """The base model. Names of ``from_pretrained`` and ``BitsAndBytesConfig`` where they have one."""

    name_or_path: str
    """A folder, or a model on the Hugging Face hub; "demo" is the model in the package."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """None: bfloat16 where the GPU has it, float16 on older ones, float32 on a CPU."""
    attn_implementation: Name = "sdpa"
    trust_remote_code: bool = False
    use_safetensors: bool = True
    """False: weights that are there as pytorch_model.bin alone are read too, a format that can run code."""


class AdapterSection(_Section):
    """``mode`` and ``rank_limit`` of the adapter stack; every other key is one of ``LoraConfig``'s."""

    model_config = ConfigDict(extra="allow")
    mode: Literal["stack", "continue"] = "stack"
    rank_limit: Count | Literal["auto"] | None = "auto"
    """Largest rank of the earlier adapters' sum; auto: 8 times ``r``; null: no limit, and every task costs more."""

    def lora(self) -> dict[str, Any]:
        """The keyword arguments of ``LoraConfig``."""
        settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        # PEFT does not take every word for "off".
        given = {key: value for key, value in (self.model_extra or {}).items() if value or key not in NEVER_ON}
        return {**settings, **given}


class TasksSection(_Section):
    """The task sequence."""

    format: ShortName
    """jsonl, csv, parquet, trace, superni, long_sequence, mixed (an order of FORMAT/NAME entries), or demo."""
    path: str | None = None
    order: Names | None = None
    """Task names in order of training; None takes the format's own order."""
    max_train: Count | None = None
    max_test: Count | None = None
    epochs: list[Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False, strict=True)]] | None = None
    """Epochs of each task in ``order``; None uses ``training.num_train_epochs`` for all."""
    max_length: Annotated[int, Field(ge=5, lt=2**31, strict=True)] = 512
    """Tokens of prompt and answer together; longer prompts lose their middle."""
    chat_template: bool = False
    """Whether plain prompts and answers are written as a user's and an assistant's message, by the tokenizer's chat
    template; samples that are messages themselves always are."""


class EvaluationSection(_Section):
    """Greedy generation after each task on all tasks seen so far; tests of general ability, also before the first."""

    max_new_tokens: Count = 64
    batch_size: Count = 32
    general: Names = []
    """Names of the tests: NAME/test.jsonl (multiple choice, as mmlu) or text/NAME.txt (the loss on held-out text)."""
    general_path: str | None = None
    """The folder of those files; None looks in ``tasks.path`` and in the folder around it."""
    general_samples: Count = 200
    """Questions of a multiple-choice test, at most: always the same ones."""
    general_tokens: Annotated[int, Field(ge=2, lt=2**31, strict=True)] = 16384
    """Tokens of a text, at most: its first ones."""


class CompareSection(_Section):
    """What ``seekr-peft compare`` runs side by side; ``seekr-peft run`` takes no notice of it."""

    title: str | None = None
    variants: dict[str, dict[str, Any]] = {}
    """Label to the recipe keys in which that variant differs, dotted: ``{random heads: {method.head_choice: random}}``.
    Empty: the methods sequential, replay and seekr."""
    seeds: Annotated[list[Seed], Field(max_length=1000)] = [0, 1, 2]
    orders: Count | Annotated[list[Names], Field(max_length=1000)] = 1
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
    # Copied, since an alias makes two places one.
    given = isinstance(source, (str, Path))
    mapping = _Copy().of(_read_extended(given_path(source, "recipe", ConfigError)) if given else source)
    problems: list[str] = []
    for override in overrides:
        _override(mapping, override, problems)
    mapping = _expanded(mapping, problems)
    _fill_in_homes(mapping)
    return _checked(mapping, _CHECKS, problems)


def _paths(mapping: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Each path of a recipe: the mapping that holds it, its key in there, and its whole key."""
    for section, key in _PATHS:
        values = mapping.get(section) if section else mapping
        if isinstance(values, dict) and isinstance(values.get(key), str):
            yield values, key, f"{section}.{key}".lstrip(".")


def _fill_in_homes(mapping: dict[str, Any]) -> None:
    for values, key, _ in _paths(mapping):
        if key != "name_or_path" and not path_problem(values[key]):
            values[key] = str(Path(values[key]).expanduser()) if values[key].startswith("~") else values[key]


def task_order(recipe: Recipe) -> list[str]:
    """The names of the recipe's tasks, in order of training; reads file names only."""
    if recipe.tasks.order:
        return recipe.tasks.order
    if recipe.tasks.format == DEMO:
        from ..tasks.demo_words import TASK_NAMES

        return list(TASK_NAMES)
    from ..tasks import task_names

    return list(task_names(recipe.tasks.format, Path(str(recipe.tasks.path))))


def general_tests(recipe: Recipe) -> list["GeneralTest"]:
    """The recipe's tests of general ability; reads file names only."""
    if not recipe.evaluation.general:
        return []
    from ..evaluation.general import find_general_tests

    return find_general_tests(recipe.evaluation.general, recipe.evaluation.general_path, recipe.tasks.path)[0]


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


def stored_recipe(path: Path) -> Recipe:
    """The recipe in a file of ``recipe_text``; ConfigError when it is none. The folders it names may be gone by now."""
    try:
        return _checked(_Copy().of(_read_yaml(path)), _CHECKS_OF_VALUES, [])
    except ConfigError as error:
        raise ConfigError(f"{path} is no recipe: {error.problems[0]}") from error


def _checked(mapping: dict[str, Any], checks: Sequence["Check"], problems: list[str]) -> Recipe:
    recipe = _validated(mapping, problems)
    for check in checks:
        problems += check(mapping) if recipe is not None else _without_crash(check, mapping)
    if problems or recipe is None:
        rest = len(problems) - _TOLD
        # A task's or a folder's name may hold the end of a line.
        problems = [problem.replace("\n", "\\n") for problem in problems]
        raise ConfigError(problems[:_TOLD] + ([f"... and {rest} more mistakes."] if rest > 0 else []))
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


def _read_extended(path: str | Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file's mapping, laid over that of the file it extends."""
    mapping = _read_yaml(path)
    parent = mapping.pop("extends", None)
    if parent is None:
        return mapping
    own = os.path.realpath(path)
    if not isinstance(parent, str) or not parent or own in seen or len(seen) == _LONGEST_CHAIN:
        raise ConfigError(
            f"recipe {cut(str(path))}: extends is {shown(parent)}; give another recipe's file name, not in a circle."
        )
    return _laid_over(_read_extended(Path(path).parent / parent, (*seen, own)), mapping)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` with what only ``below`` says; sections are merged key by key, everything else is replaced."""
    both = {key: below[key] for key in below.keys() & above.keys()}
    merged = {
        key: _laid_over(value, above[key]) if isinstance(value, dict) and isinstance(above[key], dict) else above[key]
        for key, value in both.items()
    }
    return {**below, **above, **merged}


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        document = read_yaml(Path(path))
    except YamlTextError as error:
        raise ConfigError(f"recipe {cut(str(path))} {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"recipe {cut(str(path))} must be a mapping with the keys model, tasks, ..., got {type(document).__name__}."
        )
    return document


def _override(mapping: dict[str, Any], override: str, problems: list[str]) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts) or len(parts) > DEEPEST or UNSAFE.search(key):
        problems.append(
            f"override {shown(override)} must have the form section.key=value, as in training.learning_rate=1e-4."
        )
        return
    try:
        value = parse_yaml(text)
    except YamlTextError as error:
        problems.append(f"override {shown(override)}: the value {shown(text)} {error}")
        return
    target = mapping
    for part in parts[:-1]:
        nested = target.setdefault(part, {})
        if not isinstance(nested, dict):
            problems.append(f"override {shown(override)}: {cut(part, 60)} is {shown(nested)}, not a section.")
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
    path = [cut(str(part), 60) for part in detail["loc"]]
    where = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return unknown_key(path[-1], _known_keys(path[:-1]), "".join(f"{part}." for part in path[:-1]))
    if detail["type"] == "missing":
        return f"{where} is missing; add it to the recipe."
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{where}: {message}, got {shown(detail['input'])}."


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
        problems.append(f"method.name must be one of {', '.join(known)}, got {shown(method.get('name'))}.")
    mode, modes = mapping.get("adapter", {}).get("mode", "stack"), ADAPTER_MODES.get(str(method.get("name")))
    if modes and mode not in modes:
        problems.append(f"adapter.mode must be {' or '.join(modes)} for method {method['name']}, got {shown(mode)}.")
    try:
        SeekrConfig.from_mapping({key: value for key, value in method.items() if key != "name"})
    except ConfigError as error:
        problems += [f"method.{problem}".replace("did you mean ", "did you mean method.") for problem in error.problems]
    return problems


def _training_problems(mapping: dict[str, Any]) -> list[str]:
    training = mapping.get("training", {})
    if not isinstance(training, dict):
        return []
    fields = training_settings()
    problems = unknown_keys(training, list(fields), "training.") + training_problems(training, fields)
    if _is_in(training.get("lr_scheduler_type", "linear"), training_choices()["lr_scheduler_type"]):
        problems += _scheduler_problems(training)
    return problems


def _is_in(value: Any, names: Sequence[str]) -> bool:
    return isinstance(value, str) and value in names


def _scheduler_problems(training: dict[str, Any]) -> list[str]:
    """By making the scheduler: which keywords one takes and needs is only in its function."""
    name, keywords = training.get("lr_scheduler_type"), training.get("lr_scheduler_kwargs")
    if name in _NEEDS_A_METRIC:
        return [f"training.lr_scheduler_type {name!r} needs a metric during training, which is not taken; try cosine."]
    if keywords is not None and not isinstance(keywords, dict):
        # It is told by its type.
        return []
    if not keywords and name in (None, *_PLAIN_SCHEDULERS):
        return []
    if name in _WITHOUT_KEYWORDS:
        return [f"training.lr_scheduler_kwargs {shown(keywords)}: {name} takes none; leave them out."]
    why = _why_no_schedule(name or "linear", keywords, training.get("learning_rate", 5e-5))
    if why and keywords:
        return [f"training.lr_scheduler_kwargs {shown(keywords)} do not fit {name or 'linear'}: {why}"]
    return [f"training.lr_scheduler_type {name} needs training.lr_scheduler_kwargs: {why}"] if why else []


def _why_no_schedule(name: str, keywords: dict[str, Any] | None, rate: Any) -> str:
    # Seconds, and only for a recipe that asks for such a scheduler.
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate if is_number(rate) and 0 < rate < 1000 else 5e-5)
    try:
        scheduler = get_scheduler(name, optimizer, 1, 2, scheduler_specific_kwargs=keywords)
        for _ in range(4):
            # Past the warmup: some keywords are only looked at then.
            optimizer.step()
            scheduler.step()
            _check_rate(scheduler.get_last_lr()[0])
    except Exception as error:
        # Whatever a keyword of the wrong kind leads to.
        return cut(" ".join(str(error).split()) or type(error).__name__)
    return ""


def _check_rate(rate: float) -> None:
    if not math.isfinite(rate) or rate < 0:
        raise ValueError(f"the learning rate becomes {rate}")


def _adapter_problems(mapping: dict[str, Any]) -> list[str]:
    adapter = mapping.get("adapter", {})
    if not isinstance(adapter, dict):
        return []
    known = lora_settings()
    own = list(AdapterSection.model_fields)
    problems = unknown_keys(adapter, [*own, *known], "adapter.")
    refused = {key: _why_refused(key, adapter[key], known[key].default) for key in adapter if key in known}
    problems += [f"adapter.{key} is {shown(adapter[key])}, {why}" for key, why in refused.items() if why]
    return problems + lora_problems({key: value for key, value in adapter.items() if not refused.get(key)}, known)


def _why_refused(key: str, value: Any, default: Any) -> str | None:
    why = why_refused(key, value, default)
    if key == "task_type" and not why and value not in (None, "CAUSAL_LM"):
        return "but a run trains a causal language model; leave it out, which means CAUSAL_LM."
    return why


_ON_THE_HUB = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


def _model_problems(mapping: dict[str, Any]) -> list[str]:
    name = mapping["model"]["name_or_path"]
    shown_name = cut(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name)
    if not looks_local and "/" not in name and name != DEMO and get_close_matches(name, [DEMO]):
        return [f"model.name_or_path: {shown_name} is no folder and no owner/name on the hub; did you mean {DEMO}?"]
    if not looks_local and not _ON_THE_HUB.fullmatch(name):
        return [f"model.name_or_path: {shown(name)} is no folder and no owner/name on the hub; give one of them."]
    if name == DEMO or not looks_local:
        return []
    from ..model.base_files import check_base_files

    try:
        check_base_files(Path(name).expanduser(), name, mapping["model"].get("use_safetensors", True) is not False)
    except ConfigError as error:
        return error.problems
    return []


def _task_problems(mapping: dict[str, Any]) -> list[str]:
    from ..tasks import FORMATS, MIXED, find_task_problems

    tasks = mapping["tasks"]
    order, epochs = tasks.get("order"), tasks.get("epochs")
    if not _are_names([tasks["format"]]) or not (order is None or _are_names(order)):
        return []
    problems = []
    if tasks["format"] == DEMO:
        from ..tasks.demo_words import TASK_NAMES

        order = order or list(TASK_NAMES)
        unknown = [name for name in order if name not in TASK_NAMES]
        problems += [f"tasks.order: {unknown_key(name, list(TASK_NAMES))}" for name in unknown]
        twice = {name for name in order if order.count(name) > 1}
        problems += [f"tasks.order names {shown(name)} more than once." for name in sorted(twice)]
        # The general tests are looked for there, too.
        if tasks.get("path") and not mapping.get("evaluation", {}).get("general"):
            problems.append(
                f"tasks.path: {cut(str(tasks['path']))} would not be read, as the tasks of the format {DEMO!r} come "
                f"with the package; leave it out, or give the format of your own tasks: {', '.join((*FORMATS, MIXED))}."
            )
    elif tasks["format"] in (*FORMATS, MIXED) and not tasks.get("path"):
        problems.append(f"tasks.path is missing; format {shown(tasks['format'])} needs the folder of the tasks.")
    else:
        path = str(tasks.get("path") or "")
        problems += [
            f"tasks: {problem.replace(path, cut(path))}" for problem in find_task_problems(tasks["format"], path, order)
        ]
    if epochs is not None and order is not None and len(epochs) != len(order):
        problems.append(f"tasks.epochs has {len(epochs)} numbers for {len(order)} tasks; give one for each.")
    return problems


_NAMES = TypeAdapter(Names)


def _are_names(value: Any) -> bool:
    """Whether ``value`` is a list of names, and not a longer one than anybody has, of which the type's check tells."""
    try:
        _NAMES.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _evaluation_problems(mapping: dict[str, Any]) -> list[str]:
    evaluation = mapping.get("evaluation", {})
    names = evaluation.get("general")
    if not names or not _are_names(names):
        return []
    from ..evaluation.general import find_general_tests

    _, problems = find_general_tests(names, evaluation.get("general_path"), mapping["tasks"].get("path"))
    folder = str(evaluation.get("general_path") or "")
    return [f"evaluation.general: {problem.replace(folder, cut(folder))}" for problem in problems]


def _path_problems(mapping: dict[str, Any]) -> list[str]:
    found = [(where, values[key]) for values, key, where in _paths(mapping)]
    told = [(where, path, path_problem(path)) for where, path in found]
    return [f"{where}: {shown(path)} {problem}; give another path." for where, path, problem in told if problem]


def _reading(check: "Check") -> "Check":
    """``check``, which looks at folders, with a sentence where one cannot be read."""

    def checked(mapping: dict[str, Any]) -> list[str]:
        if _path_problems(mapping):
            # They are told; nothing can be found there.
            return []
        try:
            return check(mapping)
        except OSError as error:
            return [f"{cut(str(error.filename))} cannot be read: {error.strerror or error}; give another path."]

    return checked


Check = Callable[[dict[str, Any]], list[str]]
_CHECKS_OF_VALUES: tuple[Check, ...] = (_method_problems, _training_problems, _adapter_problems)
_CHECKS: tuple[Check, ...] = (
    *_CHECKS_OF_VALUES,
    _path_problems,
    *map(_reading, (_model_problems, _task_problems, _evaluation_problems)),
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
        return {key: _expanded(item, problems, _dotted(where, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, problems, where) for item in value]
    if not isinstance(value, str):
        return value
    # Behind the last one nothing ends, and each "${" would be looked through to the end.
    end = value.rfind("}") + 1
    for match in _VARIABLE.finditer(value, 0, end):
        if match[2] is None and match[1] not in os.environ:
            problems.append(
                f"{cut(where)}: the environment variable {match[1]} is not set; set it, or write "
                f"${{{match[1]}:-default}}."
            )
    filled = _VARIABLE.sub(lambda match: os.environ.get(match[1]) or match[2] or "", value[:end]) + value[end:]
    if filled != value:
        # "${STEPS:-100}" means the number, as it would without the variable.
        filled = _scalar(filled)
        if isinstance(filled, str) and UNSAFE.search(filled):
            problems.append(f"{cut(where)}: {shown(filled)} holds control characters; set its variables anew.")
    return float(filled) if isinstance(filled, str) and _PLAIN_FLOAT.fullmatch(filled) else filled


def _scalar(text: str) -> Any:
    """``text`` as YAML reads it where that is a number or a truth value, else itself."""
    try:
        value = parse_yaml(text)
    except YamlTextError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


class _Copy:
    """Plain values of its own, of a mapping that anybody made: in bounds as those of a file are."""

    def __init__(self) -> None:
        self._left = MOST_NODES

    def of(self, value: Any, where: str = "", depth: int = 0) -> Any:
        self._left -= 1 + (len(value) // 100 if isinstance(value, str) else 0)
        if depth > DEEPEST or self._left < 0:
            raise ConfigError(
                f"recipe: {cut(where)} holds more than {DEEPEST} levels or {MOST_NODES} values; no recipe needs them."
            )
        if isinstance(value, Mapping):
            return {self._key(key, where): self.of(item, _dotted(where, key), depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.of(item, where, depth + 1) for item in value]
        why = _why_no_value(value)
        if why:
            raise ConfigError(f"{cut(where)}: {shown(value)} {why}.")
        return value

    def _key(self, key: Any, where: str) -> str:
        if not isinstance(key, str) or UNSAFE.search(key):
            raise ConfigError(f"{cut(where) or 'recipe'}: the key {shown(key)} is no plain text; write it in quotes.")
        return key


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{cut(str(key), 60)}".lstrip(".")


def _why_no_value(value: Any) -> str | None:
    if isinstance(value, str):
        return "holds control characters; leave them out" if UNSAFE.search(value) else None
    if value is None or isinstance(value, bool | float):
        return None
    if isinstance(value, int):
        return "is too large; give a smaller number" if abs(value) > _LARGEST_NUMBER else None
    return f"is of the type {type(value).__name__}; give text, numbers, truth values, lists and mappings of them"
