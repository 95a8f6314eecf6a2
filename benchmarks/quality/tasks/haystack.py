"""Long texts, as lists of sentences, that something is hidden in."""

import itertools
import random
import re

from benchmarks.quality import text

_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


def noise(num_words: int) -> list[str]:
    """The same few sentences again and again."""
    return list(itertools.islice(itertools.cycle(_NOISE), num_words // 3 + 1))


def prose(random: random.Random, num_words: int) -> list[str]:
    """Sentences of real text."""
    paragraphs = text.prose(random, 12 * num_words)
    return [s for paragraph in paragraphs for s in re.split(r"(?<=[.?!]) ", paragraph)]


def last_words(sentences: list[str], count: int) -> list[str]:
    """The last so many words, the first sentence cut if need be."""
    chosen: list[str] = []
    for sentence in reversed(sentences):
        words = sentence.split(" ")
        if count < len(words):
            if count:
                chosen.append(" ".join(words[-count:]))
            break
        chosen.append(sentence)
        count -= len(words)
    return chosen[::-1]


def hidden(needles: list[str], depths: list[float], sentences: list[str]) -> list[str]:
    """The sentences with each needle after such a share of them, in the needles' order where it is
    the same place."""
    places = [round(depth * len(sentences)) for depth in depths]
    parts = list(sentences)
    for place, needle in reversed(sorted(zip(places, needles), key=lambda pair: pair[0])):
        parts.insert(place, needle)
    return parts
