"""A chat of many turns, whose last asks for what was said in the first."""

import random

from benchmarks.quality import text
from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.tasks import haystack, words

_MORE = ("Go on.", "Tell me more.", "And then?", "What else is there?", "Please continue.")


def _make(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    (name,) = words.names(random, 1)
    number = str(random.randrange(1000, 10_000))
    paragraphs = text.prose(random, 12 * num_tokens)
    asides = random.choices(_MORE, k=len(paragraphs))

    def prompt(num_words: int) -> list[int]:
        turns = [f"The special number of {name} is {number}. Remember it.", "I will."]
        for aside, paragraph in zip(asides, haystack.last_words(paragraphs, num_words)):
            turns += [aside, paragraph]
        turns.append(f"What is the special number of {name}?")
        return writer.conversation(turns, f"The special number of {name} is")

    return Sample(writer.fit(prompt, num_tokens, num_tokens), [number])


TASKS = (Task("conversation", _make, "all_found", 10),)
