"""Tasks: what a sequence trains and tests on, the formats they are read from, their tokens.

Importing it loads neither datasets nor torch nor transformers.
"""

from seekr_peft.tasks.formats import FORMATS
from seekr_peft.tasks.readers import MIXED, find_task_problems, read_tasks, task_names
from seekr_peft.tasks.task import METRICS, Task
from seekr_peft.tasks.text import Conversation, check_chat_template
from seekr_peft.tasks.tokenize import (
    AnswerCollator,
    Encoded,
    encode,
    encode_prompt,
    prepare_tokenizer,
)

__all__ = [
    "FORMATS",
    "METRICS",
    "MIXED",
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
