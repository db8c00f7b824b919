"""Names, types, defaults and choices of TrainingArguments' and LoraConfig's settings, read from their source files.

Importing the two takes 5 seconds (they load torch), and a typing mistake in a recipe should be told at once. A test
compares what is read with the classes themselves (transformers 5.23, PEFT 0.21).
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass: its annotation as written, and its default where that is a literal (else None)."""

    annotation: str
    default: Any


@cache
def training_settings() -> dict[str, Setting]:
    """The fields of ``transformers.TrainingArguments``."""
    return _fields(_class("transformers", "training_args.py", "TrainingArguments"))


@cache
def lora_settings() -> dict[str, Setting]:
    """The fields of ``peft.LoraConfig``, inherited ones as well."""
    parts = (
        ("config.py", "PeftConfigMixin"),
        ("config.py", "PeftConfig"),
        ("tuners/lora/config.py", "LoraConfig"),
    )
    fields: dict[str, Setting] = {}
    for file, name in parts:
        fields |= _fields(_class("peft", file, name))
    return fields


@cache
def accelerator_settings() -> dict[str, Setting]:
    """The fields of ``transformers``' ``AcceleratorConfig``, the mapping ``accelerator_config``."""
    return _fields(_class("transformers", "trainer_pt_utils.py", "AcceleratorConfig"))


_ENUMERATIONS = {
    "SchedulerType": "trainer_utils.py",
    "OptimizerNames": "training_args.py",
    "IntervalStrategy": "trainer_utils.py",
    "SaveStrategy": "trainer_utils.py",
    "HubStrategy": "trainer_utils.py",
    "DebugOption": "debug_utils.py",
}


@cache
def training_choices() -> dict[str, list[str]]:
    """The values of those settings that are enumerations, by the setting's name."""
    found = {}
    for name, setting in training_settings().items():
        written = re.findall(r"\w+", setting.annotation)
        for enumeration in _ENUMERATIONS.keys() & written:
            found[name] = _values(_class("transformers", _ENUMERATIONS[enumeration], enumeration))
    return found


@cache
def compile_backends() -> list[str]:
    """The values of ``torch_compile_backend``, which accelerate knows."""
    return [name.lower() for name in _values(_class("accelerate", "utils/dataclasses.py", "DynamoBackend"))]


@cache
def report_integrations() -> list[str]:
    """The values of ``report_to``."""
    tree = _tree(_file("transformers", "integrations/integration_utils.py"))
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK"
    )
    assert isinstance(table, ast.Dict)
    return [str(key.value) for key in table.keys if isinstance(key, ast.Constant)]


def _values(enumeration: ast.ClassDef) -> list[str]:
    return [
        str(node.value.value)
        for node in enumeration.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    ]


def _file(package: str, file: str) -> Path:
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(f"{package} is not installed")
    return Path(found.origin).parent / file


def _class(package: str, file: str, name: str) -> ast.ClassDef:
    tree = _tree(_file(package, file))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _fields(node: ast.ClassDef) -> dict[str, Setting]:
    return {
        part.target.id: Setting(ast.unparse(part.annotation), _default(part.value))
        for part in node.body
        if isinstance(part, ast.AnnAssign)
        and isinstance(part.target, ast.Name)
        and "ClassVar" not in ast.unparse(part.annotation)
    }


def _default(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    sign = 1
    if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
        sign, value = -1, value.operand
    if not isinstance(value, ast.Constant):
        return None
    return sign * value.value if sign < 0 and isinstance(value.value, (int, float)) else value.value
