"""One of many pairs of hexadecimal keys and values, asked for by its key, to be continued."""

import random

from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.tasks import haystack, words

_DIGITS = 8


def _make(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    most = num_tokens // _DIGITS
    drawn = words.coded(random, 2 * most + 2, "0123456789abcdef", _DIGITS)
    (key, value), *others = zip(drawn[::2], drawn[1::2])
    depth = random.random()
    lines = [f'"{k}": "{v}",' for k, v in others]

    def prompt(count: int) -> list[int]:
        pairs = "\n".join(haystack.hidden([f'"{key}": "{value}",'], [depth], lines[:count]))
        return writer.plain(
            f'Pairs of a key and its value:\n\n{pairs}\n\nOne of them again:\n\n"{key}": "'
        )

    return Sample(writer.fit(prompt, num_tokens, most), [value])


TASKS = (Task("key-value retrieval", _make, "all_found", 16),)
