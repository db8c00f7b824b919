"""Tasks that contradict one another, made out of Standard-CL's agnews: jsonl files for recipes/experiments.

    python -m benchmarks.adversarial_tasks runs/data/adversarial

news: as it is; letters: A to D for labels; mirror: every label turned into the next one, and a cue at the start of the
prompt; flipped: the same without the cue, so that it contradicts news outright. Needs SEEKR_SHARED (default ../shared).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

from seekr_peft.tasks import read_tasks

Rewrite = Callable[[str], str]


def rewrites(labels: list[str]) -> dict[str, tuple[str, Rewrite]]:
    """Name of each task to what its prompts begin with, and a function from an answer to the new one."""
    following = dict(zip(labels, [*labels[1:], labels[0]], strict=True))
    letters = dict(zip(labels, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=False))
    legend = "; ".join(f"{letter} is {label}" for label, letter in letters.items())
    return {
        "news": ("", str),
        "letters": (f"Answer with a letter: {legend}.\n", letters.__getitem__),
        "mirror": ("In the mirror world:\n", following.__getitem__),
        "flipped": ("", following.__getitem__),
    }


def write_tasks(source: Path, out: Path) -> list[str]:
    """Write NAME/{train,test}.jsonl for every rewriting of agnews; returns the names."""
    (task,) = read_tasks("long_sequence", source, ["agnews"])
    made = rewrites(sorted(set(task.train["answer"])))
    for name, (beginning, rewrite) in made.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in (("train", task.train), ("test", task.test)):
            records = [
                {
                    "prompt": beginning + row["prompt"],
                    "answer": rewrite(row["answer"]),
                    "instruction": beginning + row["instruction"],
                }
                for row in rows
            ]
            text = "".join(json.dumps(record) + "\n" for record in records)
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return list(made)


def main() -> None:
    """Write the tasks into the folder given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    source = Path(os.environ.get("SEEKR_SHARED", "../shared")) / "data" / "long_sequence"
    print(f"{out}: {', '.join(write_tasks(source, out))}")


if __name__ == "__main__":
    main()
