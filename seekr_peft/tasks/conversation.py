"""A prompt as messages, which the tokenizer's chat template writes, or as plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, shown
from ..types import Tokenizer


@dataclass(frozen=True)
class Conversation:
    """The messages before an answer, each with role and content, and the tools and settings of the template."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    settings: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """As the column ``prompt_messages`` of a task's samples holds it."""
        parts: dict[str, Any] = {"messages": list(self.messages), "tools": self.tools}
        if self.settings:
            parts["settings"] = dict(self.settings)
        return json.dumps(parts, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, place: str = "") -> Conversation:
        """What ``to_json`` wrote.

        Args:
            place: begins the message.

        Raises:
            DataError: it is something else.
        """
        try:
            parts = json.loads(text)
            messages = parts["messages"]
            if isinstance(messages, list) and messages and all(isinstance(each["role"], str) for each in messages):
                return cls(**parts)
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        beginning = f"{place}: the" if place else "The"
        raise DataError(
            f"{beginning} column 'prompt_messages' holds {shown(text, 60)}, which is not the messages of a task's "
            f"prompt; rename the column, or give the messages as a list in 'messages'."
        )

    def readable(self) -> str:
        """The user's text where that is all, else a line 'role: content' a message."""
        if len(self.messages) == 1 and self.messages[0]["role"] == "user" and not self.tools:
            return str(self.messages[0]["content"])
        return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in self.messages)


Prompt = str | Conversation
"""A prompt as a task gives it: plain text, or messages for the tokenizer's chat template."""


def check_chat_template(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that cannot write messages.

    Raises:
        DataError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"The tokenizer {tokenizer_name(tokenizer)} has no chat template, with which messages are written; use a "
            f"chat model's, set tokenizer.chat_template, or give prompt and answer as plain text without "
            f"tasks.chat_template."
        )


def tokenizer_name(tokenizer: Tokenizer) -> str:
    """How a message calls a tokenizer."""
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
