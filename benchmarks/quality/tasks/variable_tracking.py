"""RULER's variable tracking (arXiv 2404.06654): one chain of five variables, each set to the one
before, hidden in noise; all that have the first one's value are asked for. As there, a short chain
with its answer comes first, for base models alone: small chat models repeat its answer."""

import random
import string

from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.tasks import haystack, words

_HOPS = 4
_EXAMPLE_WORDS = 30


def _chain(names: list[str], value: str) -> list[str]:
    values = [value, *(f"VAR {name}" for name in names)]
    return [f"VAR {name} = {value}" for name, value in zip(names, values)]


def _question(text: list[str], value: str) -> tuple[str, str]:
    """A text with what is asked of it, and how the answer begins."""
    return (
        "Follow the chain of variables in the text below.\n\n"
        + "\n".join(text)
        + f"\n\nQuestion: Which variables have the value {value} in the text above?",
        f"Answer: {_HOPS + 1} variables have the value {value}: VAR",
    )


def _make(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    size = _HOPS + 1
    names = words.coded(random, 2 * size, string.ascii_uppercase, 5)
    shown, names = names[:size], names[size:]
    shown_value, value = (str(n) for n in random.sample(range(10_000, 100_000), 2))
    shown_depths, depths = (sorted(random.random() for _ in range(size)) for _ in range(2))
    sentences = haystack.noise(num_tokens)

    def text(names: list[str], value: str, depths: list[float], num_words: int) -> tuple[str, str]:
        some = haystack.last_words(sentences, num_words)
        return _question(haystack.hidden(_chain(names, value), depths, some), value)

    example = " ".join(
        [*text(shown, shown_value, shown_depths, _EXAMPLE_WORDS), ", VAR ".join(shown)]
    )

    def prompt(num_words: int) -> list[int]:
        question, answer = text(names, value, depths, num_words)
        return writer.chat(f"{example}\n\n{question}" if writer.is_base else question, answer)

    return Sample(writer.fit(prompt, num_tokens, num_tokens), names)


TASKS = (Task("variable tracking", _make, "all_found", 64),)
