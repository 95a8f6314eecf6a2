"""What a task is, and a sample of one."""

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A prompt and what a good answer is.

    Attributes:
        prompt: token ids.
        answers: as the task's metric takes them.
    """

    prompt: list[int]
    answers: list[str]


class Writer:
    """Puts prompts together to a length in tokens."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def chat(self, text: str, answer: str = "") -> list[int]:
        """A user's message, and how the answer begins."""
        messages = [{"role": "user", "content": text}]
        asked = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return self.plain(asked + answer)

    def plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def fill(self, parts: Callable[[], str], num_tokens: int) -> list[str]:
        """As many parts as fit."""
        chosen: list[str] = []
        while True:
            part = parts()
            num_tokens -= self.count(part)
            if num_tokens < 0:
                return chosen
            chosen.append(part)


@dataclass(frozen=True)
class Task:
    """Attributes:
    make: a sample of about so many tokens, from a source of randomness of its own.
    metric: a name of ``METRICS``.
    max_tokens: longest answer.
    """

    name: str
    make: Callable[[random.Random, Writer, int], Sample]
    metric: str
    max_tokens: int

    def samples(self, seeds: range, writer: Writer, num_tokens: int) -> list[Sample]:
        """One a seed, the same whatever else is made."""
        return [
            self.make(random.Random(f"{self.name} {seed} {num_tokens}"), writer, num_tokens)
            for seed in seeds
        ]
