"""Recipes as nobody would write them: ``mutations`` makes them, ``check_one`` says what became of one."""

from __future__ import annotations

import copy
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from seekr_peft.demo.run import demo_recipe
from seekr_peft.errors import ConfigError
from seekr_peft.methods.registry import OWN_CONFIGS
from seekr_peft.recipe import Recipe, load_recipe
from seekr_peft.recipe.library_fields import lora_settings, training_choices, training_settings

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
LONGEST_PROBLEM = 3000
"""Characters of a sentence: 200 of a value, and the names of all the settings that there are."""

_METHOD_KEYS = list(dict.fromkeys(key for kind in OWN_CONFIGS.values() for key in kind.setting_names()))
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_FULL_DEMO: dict[str, Any] = {
    **demo_recipe(),
    "model": {"name_or_path": "demo", "quantization": "nf4", "bnb_4bit_use_double_quant": True},
    "adapter": {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 4},
        "layers_to_transform": [0, 1],
        "use_rslora": True,
        "rank_limit": "auto",
    },
    "training": {
        "learning_rate": 2e-3,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_strategy": "steps",
        "save_steps": 5,
        "report_to": ["tensorboard"],
    },
    "tasks": {"format": "demo", "order": ["first", "last"], "epochs": [1, 0.5], "max_train": 8, "max_length": 64},
    "compare": {"variants": {"a": {"method.name": "replay"}, "b": {}}, "seeds": [0, 1], "orders": 1},
}
_SECTIONS = ("model", "adapter", "method", "training", "tasks", "evaluation", "compare")
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 255, 2**31, 2**63, -(2**70), 10**30),
    *(0.0, 0.1, 0.5, 0.999, 1.0, 1.5, -0.5, 1e-8, 1e-4, 1e30, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", " ", "abc", "yes", "none", "auto", "1e-4", "-1", "0", "1e999", "cosine", "steps", "epoch", "demo", "q_proj"),
    *("(", "[a-", "a{1,99999999999}", "*", "..", "/", "~", "~nobody/x", "/dev/zero", "/proc/self/mem", "${HOME}", "${"),
    *("x" * 300, "y" * 20_000, "a/" * 3000, "ünïcödé 日本 😀", "\u202e", "line\nline", "\x1b[31m", "\x00", "'\"\\"),
    *([], [1], [-1], ["q_proj"], ["a", "a"], [[]], [None], [1, "a", None], list(range(300)), ["w" * 500]),
    *({}, {"a": 1}, {"a": -1}, {"x": {"y": {"z": []}}}, {"use_reentrant": True}, {"(": 3}, {"q_proj": 0.5}),
)
_SCALARS = (
    *("9" * 5000, "-" + "9" * 400, "1." + "0" * 5000, "0x" + "f" * 5000, "1" + ":59" * 2000, "1e" + "9" * 50),
    *("2024-01-31", "2020-99-99", "2001-12-14 21:59:43." + "9" * 500, "~", "=", "<<", "!!binary aGk=", "!!set {a}"),
    *("!!python/object/apply:os.getcwd []", "!!int x", "!!float []", "!!str 5", "*nothing", "&a [*a]", '"\\0"', "|"),
    *("[" * 3000, "{a: " * 3000, "- " * 3000, '"' + "x" * 3000, "'", "{a: 1, a: 2}", "{<<: 5}", "{1: 2}", "? x", "%"),
)
_CHARACTERS = "\x00\x01\x1b\x7f\x85\u2028\ufeff\ud800\t\r:#&*!|>%@`\"'{}[],-? 😀é"

Mapping = dict[str, Any]
Change = Callable[[random.Random, Mapping], None]
Edit = Callable[[random.Random, str], str]


def mutations(seed: int, count: int) -> Iterator[str]:
    """``count`` recipe texts, the same ones for the same ``seed``: of the recipes of the repository and of a demo with
    many settings, changed one to three times as values, and every third time as text."""
    random_ = random.Random(seed)
    originals = [path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.yaml"))]
    for number in range(count):
        # Most of them of the demo, which needs no data and so can be accepted.
        text = random_.choice(originals) if number % 4 == 0 else ""
        mapping = yaml.safe_load(text) if text else json.loads(json.dumps(_FULL_DEMO))
        for _ in range(random_.choice((0, 1, 1, 1, 2, 3))):
            random_.choice(_CHANGES)(random_, mapping)
        if number % 3:
            yield _written(random_, mapping)
        else:
            yield random_.choice(_EDITS)(random_, text or _written(random_, mapping))


def check_one(text: str, folder: Path) -> str:
    """What ``load_recipe`` makes of ``text``: "refused", in sentences of one bounded line each, "accepted", if the
    libraries take its settings as well, "unusable: ..." if they do not, or "traceback: ..."."""
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe(path)
    except ConfigError as error:
        bad = [
            problem for problem in error.problems if len(problem) > LONGEST_PROBLEM or len(problem.splitlines()) != 1
        ]
        return f"traceback: {bad[0][:500]!r} is no sentence" if bad or not error.problems else "refused"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {str(error)[:500]}"
    try:
        use(recipe, folder)
    except Exception as error:
        return f"unusable: {type(error).__name__}: {str(error)[:500]}"
    return "accepted"


def use(recipe: Recipe, folder: Path) -> None:
    """Make of the recipe what a run makes of it before it loads the model."""
    from peft import LoraConfig
    from transformers import TrainingArguments

    # Needs a GPU of a certain kind, which only the machine knows.
    settings = {key: value for key, value in recipe.training.items() if key not in ("tf32", "bf16", "bf16_full_eval")}
    for old, new in _RENAMED.items():
        if old in settings:
            settings.setdefault(new, settings.pop(old))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TrainingArguments(output_dir=str(folder), use_cpu=True, **settings)
        LoraConfig(**recipe.adapter.lora())
    recipe.method_config()
    assert load_recipe(recipe) == recipe, "what is stored is another recipe"


# Changes of the values ----------------------------------------------------------------------------------------------


def _places(mapping: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Every (collection, key) in a recipe."""
    found = [] if found is None else found
    for key, value in mapping.items() if isinstance(mapping, dict) else enumerate(mapping):
        found.append((mapping, key))
        if isinstance(value, (dict, list)):
            _places(value, found)
    return found


def _place(random_: random.Random, mapping: Mapping) -> tuple[Any, Any]:
    return random_.choice(_places(mapping) or [(mapping, "model")])


def _another_value(random_: random.Random, mapping: Mapping) -> None:
    collection, key = _place(random_, mapping)
    collection[key] = copy.deepcopy(random_.choice(_VALUES))


def _any_setting(random_: random.Random, mapping: Mapping) -> None:
    """A setting that a recipe may name, at a value from the pool or from its neighbourhood."""
    section, names = random_.choice(
        (
            ("training", list(training_settings())),
            ("training", list(training_settings())),
            ("adapter", list(lora_settings())),
            ("method", _METHOD_KEYS),
        )
    )
    target = mapping.setdefault(section, {})
    if not isinstance(target, dict):
        return
    name = random_.choice(names)
    settings = {**training_settings(), **lora_settings()}
    near = [setting.default for setting in (settings.get(name),) if setting is not None]
    target[name] = copy.deepcopy(random_.choice([*_VALUES, *near, *near, *training_choices().get(name, [])]))


def _deleted(random_: random.Random, mapping: Mapping) -> None:
    collection, key = _place(random_, mapping)
    collection.pop(key, None) if isinstance(collection, dict) else collection.clear()


def _renamed(random_: random.Random, mapping: Mapping) -> None:
    collection, key = _place(random_, mapping)
    if isinstance(collection, dict) and key in collection:
        letters = list(key)
        random_.shuffle(letters)
        new = random_.choice(
            [key[:-1], key + "s", key.upper(), "".join(letters), "z" * 5000, random_.choice(_SECTIONS)]
        )
        collection[new] = collection.pop(key)


def _wrapped(random_: random.Random, mapping: Mapping) -> None:
    collection, key = _place(random_, mapping)
    value = copy.deepcopy(collection[key] if isinstance(collection, list) else collection.get(key))
    collection[key] = random_.choice(([value], {"value": value}, str(value), [value, value], {key: value}))


def _moved(random_: random.Random, mapping: Mapping) -> None:
    (one, key), (other, place) = _place(random_, mapping), _place(random_, mapping)
    if isinstance(one, dict) and isinstance(other, dict) and key in one and other is not one[key]:
        other[place] = json.loads(json.dumps(one[key]))


_CHANGES: tuple[Change, ...] = (
    *(_another_value, _another_value, _any_setting, _any_setting, _any_setting, _any_setting),
    *(_deleted, _renamed, _wrapped, _moved),
)


def _written(random_: random.Random, mapping: Mapping) -> str:
    if random_.random() < 0.2:
        return json.dumps(mapping)
    return yaml.safe_dump(
        mapping, sort_keys=False, allow_unicode=True, default_flow_style=random_.choice((None, False))
    )


# Changes of the text ------------------------------------------------------------------------------------------------


def _line(random_: random.Random, text: str) -> tuple[list[str], int]:
    lines = text.splitlines(keepends=True) or [""]
    return lines, random_.randrange(len(lines))


def _line_twice(random_: random.Random, text: str) -> str:
    lines, place = _line(random_, text)
    return "".join(lines[: place + 1] + lines[place:])


def _line_lost(random_: random.Random, text: str) -> str:
    lines, place = _line(random_, text)
    return "".join(lines[:place] + lines[place + 1 :])


def _line_indented(random_: random.Random, text: str) -> str:
    lines, place = _line(random_, text)
    lines[place] = random_.choice(("  ", "\t", " " * 50, "- ", "? ")) + lines[place]
    return "".join(lines)


def _character(random_: random.Random, text: str) -> str:
    place = random_.randrange(len(text) + 1)
    return text[:place] + random_.choice(_CHARACTERS) + text[place + random_.randrange(2) :]


def _cut(random_: random.Random, text: str) -> str:
    return text[: random_.randrange(len(text) + 1)]


def _scalar(random_: random.Random, text: str) -> str:
    """Something of YAML's own in place of a value."""
    values = list(re.finditer(r"(?<=: )[^{\[\n,}\]]+", text))
    if not values:
        return random_.choice(_SCALARS)
    match = random_.choice(values)
    return text[: match.start()] + random_.choice(_SCALARS) + text[match.end() :]


def _aliases(random_: random.Random, text: str) -> str:
    levels = random_.choice((2, 5, 9, 30))
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, levels)]
    whole = random_.choice((f"training: *a{levels - 1}", f"{{<<: *a{levels - 1}}}", "compare: &c {variants: *c}"))
    return "\n".join([*bomb, whole, text])


def _around(random_: random.Random, text: str) -> str:
    before = random_.choice(
        ("---\n", "%YAML 1.2\n---\n", "\ufeff", "&a ", "!!map ", "<<: {seed: 1}\n", "? ", "x: 1\n---\n")
    )
    after = random_.choice(
        ("", "\n...\n", "\n---\nseed: 1\n", "\nseed: 1\nseed: 2\n", "\n<<: {seed: 1}\n", "\n}\n", "\x00")
    )
    return before + text + after


_EDITS: tuple[Edit, ...] = (
    *(_line_twice, _line_lost, _line_indented, _character, _character, _cut, _scalar, _scalar, _scalar),
    *(_aliases, _around),
)
