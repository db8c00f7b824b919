"""The shape of the package: imports point down, importing it costs nothing, and nothing that runs code is ever read."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import seekr_peft

SOURCE = Path(seekr_peft.__file__).parent

# A module imports only from levels above its own line. Two names on one line do not know each other.
LEVELS = [
    {"errors", "types"},
    {"terminal", "files", "metrics", "validation", "loss_names", "sparse"},
    {"config"},
    {"heads"},
    {"attention", "tasks"},
    {"losses"},
    {"model"},
    {"memory"},
    {"methods"},
    {"training"},
    {"evaluation"},
    {"recipe"},
    {"report"},
    {"run"},
    {"doctor"},
    {"compare"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(SOURCE.rglob("*.py"))


def unit(module: str) -> str:
    """The entry of the table that a dotted module name (below ``seekr_peft``) belongs to."""
    while module not in LEVEL and "." in module:
        module = module.rpartition(".")[0]
    return module


def package_imports(path: Path) -> Iterator[str]:
    """Dotted names below ``seekr_peft`` that a file imports, also inside functions."""
    package = ["seekr_peft", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = [*base, *([node.module] if node.module else [])]
            # ``from . import rows`` names a module, ``from .rows import x`` a name in it.
            names = [".".join([*origin, alias.name]) for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("seekr_peft.") for name in names if name.startswith("seekr_peft."))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != SOURCE or p.name != "__init__.py"], ids=module_name)
def test_imports_point_down(path: Path) -> None:
    own = unit(module_name(path))
    assert own in LEVEL, f"{path.relative_to(SOURCE)} has no level; add it to the table"
    for name in package_imports(path):
        target = unit(name)
        if target == own or name == "__version__":
            continue
        assert target in LEVEL, f"{module_name(path)} imports {name}, which has no level"
        assert LEVEL[target] < LEVEL[own], f"{module_name(path)} must not import {name}"


def loaded_with(path: Path) -> set[str]:
    """Modules of the package that importing the file ``path`` imports, but not those for the type checker's eyes."""
    package = ["seekr_peft", *path.relative_to(SOURCE).parts[:-1]]
    modules = {module_name(file): file for file in FILES}
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        origin = [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])][1:]
        for alias in node.names:
            inner, outer = ".".join([*origin, alias.name]), ".".join(origin)
            found.add(inner if inner in modules else outer)
    return found & set(modules)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, or []."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            cycle = walk(target, [*path, name])
            if cycle:
                return cycle
        done.add(name)
        return []

    return next((cycle for cycle in (walk(name, []) for name in sorted(graph)) if cycle), [])


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"], "a planted one is found"
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    graph = {module_name(path): loaded_with(path) for path in FILES}
    assert graph["attention.rows"] >= {"sparse", "attention.masks", "attention.pairs"}
    assert find_cycle(graph) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_fits_into_a_readers_head(path: Path) -> None:
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines <= 450, f"{path.relative_to(SOURCE)} has {n_lines} lines; split it by subject"


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_a_file_of_tests_has_one_subject(path: Path) -> None:
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines <= 600, f"{path.name} has {n_lines} lines; split it by subject, and share helpers in tests/support"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_of_the_package_are_relative(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [name for name in names if str(name).split(".")[0] == "seekr_peft"]


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES} - {SOURCE}), ids=lambda folder: folder.name)
def test_a_folder_says_what_lives_there_and_how_data_passes_through(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    sentences = [part for part in " ".join(text.split()).split(". ") if len(part.split()) > 3]
    assert len(sentences) >= 2, text
    named = [path.stem for path in folder.glob("*.py") if f"``{path.stem}" in text]
    assert named, f"{folder.name} names none of its modules"


CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_the_map_of_the_package_names_its_rooms_and_no_other() -> None:
    text = CONTRIBUTING.read_text(encoding="utf-8")
    rooms = {path.name for path in SOURCE.iterdir() if path.suffix == ".py" and path.name != "__init__.py"}
    rooms |= {f"{path.name}/" for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    assert not [room for room in sorted(rooms) if not any(room in line for line in lines)]
    there = {path.name for path in FILES}
    named = {word for line in lines for word in re.findall(r"\b\w+\.py\b", line)}
    assert named <= there, named - there


def test_every_stop_of_the_three_journeys_exists() -> None:
    journeys = CONTRIBUTING.read_text(encoding="utf-8").partition("## Three journeys")[2].partition("\n**The triton")[0]
    stops = re.findall(r"`([a-z_]+(?:\.\w+)+)`", journeys)
    assert len(stops) > 40
    for stop in stops:
        if stop != "memory.safetensors":
            assert resolved(stop) is not None, stop


def resolved(name: str) -> object:
    """The object of a dotted name below ``seekr_peft``, or None."""
    parts = name.split(".")
    length = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in {module_name(path) for path in FILES})
    found: object = importlib.import_module(".".join(["seekr_peft", *parts[:length]]))
    for part in parts[length:]:
        found = getattr(found, part, None)
    return found


def test_the_import_rule_sees_imports_at_all() -> None:
    names = {name for path in FILES for name in package_imports(path)}
    assert {"errors.ConfigError", "attention.models.base_transformer", "model.answers.answer_positions"} <= names
    assert len(FILES) > 40


@pytest.mark.parametrize("module", ["tasks", "evaluation"])
def test_tasks_and_evaluation_know_no_method(module: str) -> None:
    files = [path for path in (SOURCE / module).rglob("*.py") if unit(module_name(path)) == module]
    targets = {unit(name) for path in files for name in package_imports(path)}
    assert targets - {module} <= {"errors", "types", "files", "config", "metrics", "tasks", "model"}


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, seekr_peft; seekr_peft.__version__; dir(seekr_peft); seekr_peft.SeekrConfig(); "
        "seekr_peft.ConfigError; "
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib', 'accelerate', 'numpy'}; "
        "heavy = heavy & set(sys.modules); "
        "assert 'seekr_peft.config' in sys.modules; sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"loaded: {run.stderr}"


@pytest.mark.parametrize("name", [name for name in seekr_peft.__all__ if name != "ContinualSFTTrainer"])
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(seekr_peft, name) is not None
    assert name in dir(seekr_peft)


def test_the_trl_trainer_is_public_and_resolves_where_trl_is_installed() -> None:
    assert "ContinualSFTTrainer" in dir(seekr_peft)
    pytest.importorskip("trl", reason="ContinualSFTTrainer needs the trl package")
    assert seekr_peft.ContinualSFTTrainer is not None


def test_the_public_names_of_the_contract_are_there() -> None:
    assert {
        "SeekrConfig", "Seekr", "AttentionTap", "HeadSelection", "ReplayMemory", "AdapterStack", "ContinualTrainer",
        "ContinualSFTTrainer", "Task", "AccuracyMatrix", "run_recipe",
    } <= set(dir(seekr_peft))  # fmt: skip


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Seeker'"):
        _ = seekr_peft.Seeker


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_that_runs_code_on_reading_is_used(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for word in ("pickle", "torch.load", "torch.save", "yaml.load(", "allow_pickle", "shelve", "eval(", "exec("):
        hits = [line for line in text.splitlines() if word in line.replace(".eval(", "")]
        assert not hits, f"{path.name} uses {word}: {hits[0]}"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != SOURCE / "demo"], ids=module_name)
def test_every_module_says_what_lives_there(path: Path) -> None:
    assert len(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "") > 20


@pytest.mark.parametrize("without", ["", "sys.meta_path.insert(0, NoTrl())"])
def test_the_star_takes_all_names_but_those_of_an_extra_that_is_missing(without: str) -> None:
    if not without:
        pytest.importorskip("trl")
    code = f"""
import sys
class NoTrl:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "trl":
            raise ImportError("no trl here")
{without}
import seekr_peft
from seekr_peft import *
assert Task is seekr_peft.Task and SeekrConfig and ContinualTrainer and run_recipe
assert "ContinualSFTTrainer" in dir(seekr_peft)
print("ContinualSFTTrainer" in globals())
"""
    result = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == [str(not without)], result.stderr


def test_the_types_are_shipped() -> None:
    """PEP 561: without the marker a type checker ignores the annotations of an installed package."""
    assert (SOURCE / "py.typed").read_bytes() == b""
    # Hatchling takes every file of a package that git does not ignore.
    settings = (SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '[tool.hatch.build.targets.wheel]\npackages = ["seekr_peft"]\n\n' in settings
