"""The embedded demo: a tiny base model and four short tasks that contradict each other.

Lives here: the path of the base model (package data, loads offline). Imports only the standard
library, so `import seekr_peft.demo` stays cheap; anything may import it.
"""

from pathlib import Path

BASE_PATH = Path(__file__).resolve().parent / "base"
"""Folder of the demo's base model and tokenizer, as written by `train_base`."""

__all__ = ["BASE_PATH"]
