"""What a task is, and a sample of one."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

_NEARLY = 0.98  # of a length, which is close enough to it


@dataclass(frozen=True)
class Sample:
    """A prompt and what a good answer is.

    Attributes:
        prompt: token ids.
        answers: as the task's metric takes them.
        before: prompts that are asked before it, one after the other.
    """

    prompt: list[int]
    answers: list[str]
    before: list[list[int]] = field(default_factory=list)


class Writer:
    """Puts prompts together to a length in tokens.

    A tokenizer without a chat template is a base model's: its prompts are plain text to be
    continued, after the token that begins a text, if it has one.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def is_base(self) -> bool:
        return self.tokenizer.chat_template is None

    @cached_property
    def _begin(self) -> list[int]:
        """What begins a text: of a base model, also where its tokenizer leaves that to others."""
        begin = self.tokenizer.encode("")
        if self.is_base and not begin and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]
        return begin

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def chat(self, text: str, answer: str = "") -> list[int]:
        """A user's message, and how the answer begins."""
        return self.conversation([text], answer)

    def conversation(self, turns: list[str], answer: str) -> list[int]:
        """The user's messages and the assistant's in turn, the user's last, and how its answer
        begins."""
        if self.is_base:
            return self.plain(_as_text(turns, answer or "Answer:"))
        messages = [
            {"role": "assistant" if i % 2 else "user", "content": turn}
            for i, turn in enumerate(turns)
        ]
        asked = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        # The template has all special tokens that there are to be.
        return self.tokenizer.encode(asked + answer, add_special_tokens=False)

    def plain(self, text: str) -> list[int]:
        return self._begin + self.tokenizer.encode(text, add_special_tokens=False)

    def fill(self, parts: Callable[[], str], num_tokens: int) -> list[str]:
        """As many parts as fit."""
        chosen: list[str] = []
        while True:
            part = parts()
            num_tokens -= self.count(part)
            if num_tokens < 0:
                return chosen
            chosen.append(part)

    def fit(self, prompt: Callable[[int], list[int]], num_tokens: int, most: int) -> list[int]:
        """Of ``prompt(0)`` to ``prompt(most)``, which grow about evenly, one that has at most so
        many tokens and nearly as many, or as many as there are. Raises ValueError if none has."""
        best = prompt(0)
        least = len(best)
        if least > num_tokens:
            raise ValueError(f"at least {least} tokens are needed, not {num_tokens}")
        low, high, tried = 0, most + 1, min(16, most)
        while high - low > 1 and len(best) < _NEARLY * num_tokens:
            ids = prompt(tried)
            if len(ids) <= num_tokens:
                low, best = tried, ids
            else:
                high = tried
            each = max(len(ids) - least, 1) / tried
            tried = int((1 + _NEARLY) / 2 * (num_tokens - least) / each)
            if not low < tried < high:
                tried = (low + high) // 2 if high <= most else most
        return best


def _as_text(turns: list[str], answer: str) -> str:
    """One message and its answer as they are, several with who says them."""
    if len(turns) == 1:
        return f"{turns[0]}\n\n{answer}"
    said = [f"{'Assistant' if i % 2 else 'User'}: {turn}" for i, turn in enumerate(turns)]
    return "\n\n".join([*said, f"Assistant: {answer}"])


@dataclass(frozen=True)
class Task:
    """Attributes:
    make: a sample of about so many tokens, from a source of randomness of its own.
    metric: a name of ``METRICS``.
    max_tokens: longest answer.
    shortest: tokens of its shortest samples.
    """

    name: str
    make: Callable[[random.Random, Writer, int], Sample]
    metric: str
    max_tokens: int
    shortest: int = 0

    def samples(self, seeds: range, writer: Writer, num_tokens: int) -> list[Sample]:
        """One a seed, the same whatever else is made."""
        return [
            self.make(random.Random(f"{self.name} {seed} {num_tokens}"), writer, num_tokens)
            for seed in seeds
        ]
