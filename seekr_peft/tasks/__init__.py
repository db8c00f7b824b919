"""Tasks: what a sequence trains and tests on, the formats they are read from, their tokens.

``readers`` finds a task's files, ``table_files`` and ``formats`` turn them into the ``samples`` of a ``task``, ``text``
puts a ``conversation``'s chat template around them, and ``tokenize`` makes the token ids and the labels.

Importing it loads neither datasets nor torch nor transformers.
"""

from .conversation import Conversation, check_chat_template
from .formats import FORMATS, PACKAGED
from .readers import MIXED, find_task_problems, read_tasks, task_names
from .task import Task
from .tokenize import AnswerCollator, Encoded, encode, encode_prompt, prepare_tokenizer

__all__ = [
    "FORMATS",
    "MIXED",
    "PACKAGED",
    "AnswerCollator",
    "Conversation",
    "Encoded",
    "Task",
    "check_chat_template",
    "encode",
    "encode_prompt",
    "find_task_problems",
    "prepare_tokenizer",
    "read_tasks",
    "task_names",
]
