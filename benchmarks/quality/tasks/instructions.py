"""A fact hidden in prose, with a rule for how to answer that is said far from the question: at the
beginning, in the middle, or as a table of code words at the beginning."""

import random

from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.tasks import haystack, words

_BRACKETS = (("<<", ">>"), ("[[", "]]"), ("{{", "}}"), ("((", "))"))
_CODES = 4


def _asked(random: random.Random) -> tuple[str, str, str]:
    """A needle, what is asked about it, and the answer."""
    (name,) = words.names(random, 1)
    value = str(random.randrange(1000, 10_000))
    return (
        f"The special number of {name} is {value}.",
        f"Question: What is the special number of {name}?",
        value,
    )


def _rule(rule: str, example: tuple[str, str, str], answer: str) -> str:
    """With an example of how it is kept to."""
    needle, question, _ = example
    return f"Rule: {rule} For example: {needle}\n\n{question}\n\nAnswer: {answer}"


def _at_the_start(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    (needle, question, value), example = _asked(random), _asked(random)
    (word,) = words.words(random, 1)
    rule = _rule(f'Every answer begins with the word "{word}".', example, f"{word} {example[-1]}")
    depth = random.random()
    sentences = haystack.prose(random, num_tokens)

    def prompt(num_words: int) -> list[int]:
        parts = haystack.hidden([needle], [depth], haystack.last_words(sentences, num_words))
        text = "\n".join(parts)
        return writer.chat(f"{rule}\n\n{text}\n\n{question}", "Answer:")

    return Sample(writer.fit(prompt, num_tokens, num_tokens), [word, value])


def _in_the_middle(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    (needle, question, value), example = _asked(random), _asked(random)
    left, right = random.choice(_BRACKETS)
    rule = _rule(
        f"Every answer is written between {left} and {right}.",
        example,
        f"{left} {example[-1]} {right}",
    )
    depths = [random.random(), random.uniform(0.3, 0.7)]
    sentences = haystack.prose(random, num_tokens)

    def prompt(num_words: int) -> list[int]:
        some = haystack.last_words(sentences, num_words)
        text = "\n".join(haystack.hidden([needle, f"\n{rule}\n"], depths, some))
        return writer.chat(
            f"Keep to the rule that is in the text.\n\n{text}\n\n{question}", "Answer:"
        )

    return Sample(writer.fit(prompt, num_tokens, num_tokens), [left, value, right])


def _by_a_table(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    name = random.choice(words.PEOPLE)
    places = random.sample(words.CITIES, _CODES)
    codes = words.words(random, _CODES)
    table = "\n".join(f"{place}: {code}" for place, code in zip(places, codes))
    place, code = random.choice(list(zip(places, codes)))
    depth = random.random()
    sentences = haystack.prose(random, num_tokens)

    def prompt(num_words: int) -> list[int]:
        needle = f"{name} lives in {place}."
        parts = haystack.hidden([needle], [depth], haystack.last_words(sentences, num_words))
        return writer.chat(
            f"Code words of cities:\n{table}\n\nThe text:\n\n"
            + "\n".join(parts)
            + f"\n\nQuestion: In which city does {name} live? Answer by its code word alone.",
            "Answer: The code word of the city is",
        )

    return Sample(writer.fit(prompt, num_tokens, num_tokens), [code])


TASKS = (
    Task("instruction at the start", _at_the_start, "all_found", 24),
    Task("instruction in the middle", _in_the_middle, "all_found", 24),
    Task("code words", _by_a_table, "all_found", 8),
)
