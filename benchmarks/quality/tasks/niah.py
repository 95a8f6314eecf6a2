"""The eight tasks of RULER (arXiv 2404.06654) that hide numbers in a text, in our own words: single
1 to 3, multikey 1 to 3, multivalue and multiquery. Its essays are our prose.

They differ in the text, in what stands for a number (two words or a uuid), in what is a number (or
a uuid instead), in how many needles there are and how many are asked for. The text's first sentence
may be cut, to fill a length.
"""

import random
from dataclasses import dataclass
from functools import partial

from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.tasks import haystack, words


@dataclass(frozen=True)
class _Kind:
    """Attributes:
    text: "noise", "prose", or "needles" that all differ.
    key, value: "name" (two words), "number" or "uuid".
    keys: how many are in the text, beside those of a text of needles.
    values: how many of each key.
    asked: how many keys are asked about at once.
    """

    text: str = "prose"
    key: str = "name"
    value: str = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def drawn(self, random: random.Random, what: str, count: int) -> list[str]:
        if what == "name":
            return words.names(random, count)
        if what == "uuid":
            return words.uuids(random, count)
        return [str(n) for n in random.sample(range(1_000_000, 10_000_000), count)]

    def needles(self, random: random.Random, keys: list[str]) -> tuple[list[str], list[str]]:
        """Needles with their values, a key's one after another."""
        keys = [key for key in keys for _ in range(self.values)]
        values = self.drawn(random, self.value, len(keys))
        return [
            f"One of the special magic {self.value}s for {key} is: {value}."
            for key, value in zip(keys, values)
        ], values

    def sentences(self, random: random.Random, keys: list[str], num_words: int) -> list[str]:
        """The text."""
        if self.text == "needles":
            return self.needles(random, keys)[0]
        if self.text == "noise":
            return haystack.noise(num_words)
        return haystack.prose(random, num_words)


def _make(kind: _Kind, random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    others = num_tokens // 10 if kind.text == "needles" else 0
    keys = kind.drawn(random, kind.key, kind.keys + others)
    needles, values = kind.needles(random, keys[: kind.keys])
    sentences = kind.sentences(random, keys[kind.keys :], num_tokens)
    depths = [random.random() for _ in needles]

    query = ", ".join(keys[: kind.asked])
    if kind.asked > 1:
        query = ", and ".join(query.rsplit(", ", 1))
    what, ask, are = f"special magic {kind.value}", "What is", "is"
    if kind.asked * kind.values > 1:
        what, ask, are = f"{what}s", "What are all", "are"
    head = f"Some special magic {kind.value}s are hidden in the text below. Remember them.\n\n"
    tail = f"\n\n{ask} the {what} for {query} mentioned in the text above?"
    answer = f"The {what} for {query} mentioned in the text above {are}"

    def prompt(num_words: int) -> list[int]:
        parts = haystack.hidden(needles, depths, haystack.last_words(sentences, num_words))
        return writer.chat(head + "\n".join(parts) + tail, answer)

    return Sample(writer.fit(prompt, num_tokens, num_tokens), values[: kind.asked * kind.values])


def _task(name: str, kind: _Kind, max_tokens: int) -> Task:
    return Task(f"niah {name}", partial(_make, kind), "all_found", max_tokens)


TASKS = (
    _task("single 1", _Kind("noise"), 16),
    _task("single 2", _Kind(), 16),
    _task("single 3", _Kind(value="uuid"), 48),
    _task("multikey 1", _Kind(keys=4), 16),
    _task("multikey 2", _Kind("needles"), 16),
    _task("multikey 3", _Kind("needles", key="uuid", value="uuid"), 48),
    _task("multivalue", _Kind(values=4), 64),
    _task("multiquery", _Kind(keys=4, asked=4), 96),
)
