"""``make stress``: all families, a line of counts for each; status 1 where something was accepted, lost or broken."""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

# Read when the libraries are imported.
os.environ["OMP_NUM_THREADS"] = "1"

from . import chains, families, places
from .bench import Bench
from .frame import Counts, chosen, mutated, run_cases
from .process import load_everything

FAMILIES = {**families.FAMILIES, **chains.FAMILIES, **places.FAMILIES}
USUAL = {**families.USUAL, **chains.USUAL, **places.USUAL}
MUTATIONS = {"recipes": 1000, "data": 500, "bases": 100}
"""Families of mutated input, each a module of this package, and how many cases are usual."""


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; the status."""
    options = _options(arguments)
    load_everything()
    n_failed = 0
    with tempfile.TemporaryDirectory(prefix="seekr-stress-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        bench = Bench(folder / "bench")
        for family, count in options.only:
            counts = tried(family, count, bench, folder / family, options)
            print(counts, flush=True)
            n_failed += len(counts.failed)
    return int(n_failed > 0)


def tried(family: str, count: int | None, bench: Bench, folder: Path, options: Any) -> Counts:
    """The counts of one family."""
    count = count or options.count or {**USUAL, **MUTATIONS}.get(family)
    cases = chosen(_cases(family, bench, options.seed, count), options.seed, count, options.numbers)
    # The number of mutated cases is a part of what they are.
    size = f"={count}" if family in MUTATIONS else ""
    repeat = f"PYTHONPATH=tests python -m stress --seed {options.seed} --only {family}{size} --numbers"
    return run_cases(family, cases, folder, options.workers, repeat)


def _cases(family: str, bench: Bench, seed: int, count: int | None) -> Any:
    if family in FAMILIES:
        return FAMILIES[family](bench, seed)
    return mutated(importlib.import_module(f".{family}", __package__), seed, count or 0)


def _families(text: str) -> list[tuple[str, int | None]]:
    """Names of families, with or without how many cases of each."""
    parts = [part.partition("=") for part in text.split(",")]
    unknown = [name for name, _, _ in parts if name not in _known()]
    if unknown:
        raise argparse.ArgumentTypeError(f"no family {unknown[0]!r}; there are {', '.join(_known())}")
    return [(name, int(count) if count else None) for name, _, count in parts]


def _known() -> list[str]:
    return [*FAMILIES, *(name for name in MUTATIONS if Path(__file__).with_name(f"{name}.py").exists())]


def _options(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(prog="stress", description=__doc__)
    parser.add_argument(
        "--only", type=_families, default=",".join(_known()), help="families with commas between: kills,damage=20"
    )
    parser.add_argument("--count", type=int, help="cases of each family (default: what is usual; many: all)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time")
    parser.add_argument(
        "--numbers", type=lambda text: set(map(int, text.split(","))), default=set(), help="these cases alone"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
