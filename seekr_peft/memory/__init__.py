"""The replay memory: samples and teacher signals on disk. May import ``heads``, ``attention``, ``losses``."""

from .batch import LayerTeacher, ReplayBatch, collate
from .memory import ReplayMemory
from .samples import ReplaySample, choose_queries, choose_samples, draw_queries, replay_count
from .storage import PackedSignals, TaskMemory, TeacherQuality, TeacherSignals, estimate_bytes

__all__ = [
    "LayerTeacher",
    "PackedSignals",
    "ReplayBatch",
    "ReplayMemory",
    "ReplaySample",
    "TaskMemory",
    "TeacherQuality",
    "TeacherSignals",
    "choose_queries",
    "choose_samples",
    "collate",
    "draw_queries",
    "estimate_bytes",
    "replay_count",
]
