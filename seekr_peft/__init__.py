"""Continual learning for language models with LoRA and QLoRA adapters.

The public names are loaded on first use, so that ``import seekr_peft`` costs no import of torch or transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "SeekrConfig": "config",
    "HeadSelection": "heads",
    "AttentionTap": "attention",
    "ReplayMemory": "memory",
    "AdapterStack": "model.adapter_stack",
    "Seekr": "methods",
    "Replay": "methods",
    "Sequential": "methods",
    "ContinualTrainer": "training.trainer",
    "ContinualTrainerMixin": "training.trainer",
    "ContinualSFTTrainer": "training.sft_trainer",
    "Task": "tasks",
    "AnswerCollator": "tasks",
    "AccuracyMatrix": "evaluation",
    "run_recipe": "run.runner",
    "RunStopped": "training.stopping",
    "SeekrError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "CaptureError": "errors",
    "AdapterError": "errors",
    "MemoryFormatError": "errors",
    "RunError": "errors",
    "DivergenceError": "errors",
}


def _star_names() -> list[str]:
    """What ``from seekr_peft import *`` takes: all public names but those of an extra that is not installed."""
    names = [*_HOMES, "__version__"]
    try:
        importlib.import_module(".training.sft_trainer", __name__)
    except (ImportError, RuntimeError):
        # RuntimeError: a TRL that is there and does not go with the installed transformers.
        names.remove("ContinualSFTTrainer")
    return names


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return _star_names()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])


if TYPE_CHECKING:
    from .attention import AttentionTap as AttentionTap
    from .config import SeekrConfig as SeekrConfig
    from .evaluation import AccuracyMatrix as AccuracyMatrix
    from .heads import HeadSelection as HeadSelection
    from .memory import ReplayMemory as ReplayMemory
    from .methods import Replay as Replay
    from .methods import Seekr as Seekr
    from .methods import Sequential as Sequential
    from .model.adapter_stack import AdapterStack as AdapterStack
    from .run.runner import run_recipe as run_recipe
    from .tasks import AnswerCollator as AnswerCollator
    from .tasks import Task as Task
    from .training.sft_trainer import ContinualSFTTrainer as ContinualSFTTrainer
    from .training.stopping import RunStopped as RunStopped
    from .training.trainer import ContinualTrainer as ContinualTrainer
    from .training.trainer import ContinualTrainerMixin as ContinualTrainerMixin
