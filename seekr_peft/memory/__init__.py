"""The replay memory: samples and teacher signals on disk.

``samples`` chooses what is kept, ``codec`` packs the teacher's rows, ``storage`` writes and reads a task's folder,
``memory`` draws from all tasks in the order of ``stream``, and ``batch`` pads what was drawn for one forward.
"""

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
