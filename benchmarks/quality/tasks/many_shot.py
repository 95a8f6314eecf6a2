"""Classification by many examples: made-up labels, each of a handful of words that have nothing in
common, so that the examples alone tell which. The word asked about is one of theirs.

A prompt too short for one example of each label has as many labels as there is place for.
"""

import random
from functools import partial

from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.tasks import words

_WORDS = 500  # items of all labels at most
_HANDFUL = 5  # of one
_ASKED = 3  # times that the word asked about is there at least


def _make(num_labels: int, random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    handful = min(_HANDFUL, _WORDS // num_labels)
    labels = words.made_up(random, num_labels, syllables=2)
    items = words.words(random, handful * num_labels)
    pairs = [(item, labels[i // handful]) for i, item in enumerate(items)]
    each = [random.choice(pairs[i : i + handful]) for i in range(0, len(pairs), handful)]
    asked, label = each[0]
    shown = each[:1] * _ASKED + each[1:] + random.choices(pairs, k=num_tokens // 5)
    order = random.random()

    def prompt(others: int) -> list[int]:
        examples = words.shuffled(shown[: others + _ASKED], order)
        text = "".join(f"{item}: {label}\n" for item, label in examples)
        return writer.plain(f"{text}{asked}:")

    return Sample(writer.fit(prompt, num_tokens, len(shown) - _ASKED), [label])


TASKS = tuple(
    Task(f"many-shot, {count} labels", partial(_make, count), "first_word", 8)
    for count in (10, 50, 200)
)
