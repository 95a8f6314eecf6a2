"""RULER's frequent words extraction (arXiv 2404.06654): words that mean nothing, the k-th of them
with a frequency of k to the power of -2 (Zipf's law). The three most frequent are asked for, beside
dots, which are the most frequent."""

import math
import random
import string

from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.tasks import words

_ALPHA = 2.0
_ZETA = math.pi**2 / 6  # of 2
_ASKED = 3
_DOTS = "...."
_TOKENS_A_WORD = 50  # of the prompt, for each different word


def counts(num_words: int, vocabulary: int) -> list[int]:
    """How often each is there, if there are about so many in all."""
    return [int(num_words * k**-_ALPHA / _ZETA) + 1 for k in range(1, vocabulary + 1)]


def _make(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    vocabulary = num_tokens // _TOKENS_A_WORD
    coded = [_DOTS, *words.coded(random, vocabulary - 1, string.ascii_lowercase, 6)]
    order = random.random()

    def prompt(num_words: int) -> list[int]:
        text = [w for w, n in zip(coded, counts(num_words, vocabulary)) for _ in range(n)]
        return writer.chat(
            "Below is a text of coded words. Count how often each coded word is there.\n\n"
            + " ".join(words.shuffled(text, order))
            + f"\n\nQuestion: Ignoring the dots, what are the {_ASKED} most frequent words in the "
            "coded text above?",
            f"Answer: The {_ASKED} words that are most often in the coded text above are:\n1.",
        )

    return Sample(writer.fit(prompt, num_tokens, num_tokens), coded[1 : 1 + _ASKED])


TASKS = (Task("frequent words", _make, "all_found", 32),)
