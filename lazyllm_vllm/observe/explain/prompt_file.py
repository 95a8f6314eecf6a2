"""The prompt that a user gives in a file."""

import json
from dataclasses import dataclass
from pathlib import Path

from lazyllm_vllm.observe.explain.explanation import ExplainError


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    text: as it stands in the file.
    messages: of a chat, each with its ``role`` and ``content``; None: ``text`` is the prompt.
    """

    text: str
    messages: list[dict] | None = None


def read_prompt(path: Path, chat: bool) -> Prompt:
    """The prompt in a file of UTF-8.

    Args:
        chat: it goes through the model's chat template: a JSON list of messages, or else what the
            user says.

    Raises:
        ExplainError: there is none.
    """
    try:
        text = path.read_bytes().decode()  # line ends as they are
    except OSError as error:
        raise ExplainError(f"--prompt-file: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ExplainError(f"--prompt-file: {path} is not UTF-8: {error.reason}") from None
    if not text:
        raise ExplainError(f"--prompt-file: {path} is empty")
    if not chat:
        return Prompt(text)
    try:
        messages = json.loads(text)
    except json.JSONDecodeError:
        messages = None
    fields = {"role", "content"}
    is_chat = isinstance(messages, list) and messages
    if not (is_chat and all(isinstance(m, dict) and fields <= m.keys() for m in messages)):
        messages = [{"role": "user", "content": text}]
    return Prompt(text, messages)
