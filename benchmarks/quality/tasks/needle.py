"""Numbers hidden in a long text, asked for at the end: one, one among several, several at once. The
text is repeated filler (as in RULER), prose, or code.

For a lone number the answer is free, as a user would get it. Among several, a small model answers
with any of them, so there the answer's beginning is given, and what is tried is finding the one.
"""

import random
from collections.abc import Callable
from functools import partial

from benchmarks.quality import text
from benchmarks.quality.sample import Sample, Task, Writer

_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back."
_NAMES = (
    "apple",
    "anchor",
    "basket",
    "candle",
    "dragon",
    "engine",
    "falcon",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "orchard",
    "pepper",
    "quartz",
    "ribbon",
    "saddle",
    "temple",
    "umbrella",
    "violin",
    "window",
    "yogurt",
    "zebra",
)


def _haystack(kind: str, random: random.Random, writer: Writer, num_tokens: int) -> list[str]:
    if kind == "filler":
        return writer.fill(lambda: _FILLER, num_tokens)
    if kind == "prose":
        paragraphs = iter(text.prose(random, 8 * num_tokens))
        return writer.fill(lambda: next(paragraphs), num_tokens)
    lines = iter(text.code(random, 8 * num_tokens).splitlines())
    return writer.fill(lambda: next(lines) + "\n", num_tokens)


def _make(
    kind: str, num_keys: int, num_asked: int, random: random.Random, writer: Writer, num_tokens: int
) -> Sample:
    names = random.sample(_NAMES, num_keys)
    values = [str(random.randint(1000, 9999)) for _ in names]
    needles = [f"The special number of the {n} is {v}." for n, v in zip(names, values)]
    asked = " and of the ".join(names[:num_asked])
    number = "numbers" if num_asked > 1 else "number"
    head = "Some special numbers are hidden in the text below. Remember them.\n\n"
    tail = f"\n\nWhat is the special {number} of the {asked} in the text above?"
    answer = f"The special number of the {names[0]} is" if num_keys > 1 else ""
    spent = len(writer.chat(head + " ".join(needles) + tail, answer))
    parts = _haystack(kind, random, writer, num_tokens - spent)
    for needle in needles:
        parts.insert(random.randint(0, len(parts)), f"\n{needle}\n" if kind == "code" else needle)
    joined = "".join(parts) if kind == "code" else "\n".join(parts)
    return Sample(writer.chat(head + joined + tail, answer), values[:num_asked])


def _task(name: str, kind: str, num_keys: int, num_asked: int, max_tokens: int) -> Task:
    make: Callable = partial(_make, kind, num_keys, num_asked)
    return Task(name, make, "all_found", max_tokens)


TASKS = (
    _task("needle in filler", "filler", 1, 1, 32),
    _task("needle in prose", "prose", 1, 1, 32),
    _task("needle in code", "code", 1, 1, 32),
    _task("one needle of four", "prose", 4, 1, 10),
    _task("two needles of four", "prose", 4, 2, 40),
)
