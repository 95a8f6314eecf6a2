"""RULER's common words extraction (arXiv 2404.06654): a numbered list of words in random order, of
which ten are there more often than the others. As there, they are 30 times and the others 3 times,
in short prompts 6 times and once."""

import random

from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.tasks import words

_COMMON = 10
_SHORT = 4096  # tokens


def _make(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    often, seldom = (6, 1) if num_tokens < _SHORT else (30, 3)
    pool = words.words(random, _COMMON + num_tokens // seldom // 3)
    common, others = pool[:_COMMON], pool[_COMMON:]
    order = random.random()

    def prompt(num_others: int) -> list[int]:
        listed = common * often + others[:num_others] * seldom
        listed = enumerate(words.shuffled(listed, order), 1)
        text = " ".join(f"{number}. {word}" for number, word in listed)
        return writer.chat(
            "Below is a numbered list of words. Some of them are there more often than others. "
            f"Remember those.\n\n{text}\n\nQuestion: What are the {_COMMON} most common words in "
            "the list above?",
            f"Answer: The {_COMMON} words that are most often in the list above are:\n1.",
        )

    return Sample(writer.fit(prompt, num_tokens, len(others)), common)


TASKS = (Task("common words", _make, "all_found", 80),)
