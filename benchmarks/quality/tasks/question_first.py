"""A number hidden in prose, asked for before the text."""

import random

from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.tasks import haystack, words


def _make(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    (name,) = words.names(random, 1)
    value = str(random.randrange(1_000_000, 10_000_000))
    depth = random.random()
    sentences = haystack.prose(random, num_tokens)
    needle = f"The special magic number of {name} is {value}."

    def prompt(num_words: int) -> list[int]:
        parts = haystack.hidden([needle], [depth], haystack.last_words(sentences, num_words))
        return writer.chat(
            f"Question: What is the special magic number of {name}? The text below says it.\n\n"
            + "\n".join(parts)
            + "\n\nAnswer the question at the beginning.",
            "Answer: The special magic number is",
        )

    return Sample(writer.fit(prompt, num_tokens, num_tokens), [value])


TASKS = (Task("question first, needle", _make, "all_found", 16),)
