"""Questions that come after others, which an earlier request's deep keys may be reused for: the
last of several questions about one text that was sent alone first, the last turn of a conversation
that began with a text and a question about it, and the second turn of one, which brings another
text. Some ask for hidden numbers, others for facts of made-up documents.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.quality import text
from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.tasks import haystack, words
from benchmarks.quality.tasks.facts import World

_QUESTIONS = 4


@dataclass(frozen=True)
class _Question:
    """Attributes:
    begun: how its answer begins.
    """

    question: str
    begun: str
    answer: str


@dataclass(frozen=True)
class _Material:
    """Attributes:
    text: all that is asked for, among so many other words.
    """

    head: str
    text: Callable[[int], str]
    questions: list[_Question]


def _numbers(random: random.Random, num_tokens: int) -> _Material:
    names = words.names(random, _QUESTIONS)
    values = [str(n) for n in random.sample(range(1000, 10_000), len(names))]
    needles = [f"The special number of {n} is {v}." for n, v in zip(names, values)]
    depths = [random.random() for _ in names]
    sentences = haystack.prose(random, num_tokens)

    def of(num_words: int) -> str:
        others = haystack.last_words(sentences, num_words)
        return "\n".join(haystack.hidden(needles, depths, others))

    questions = [
        _Question(f"What is the special number of {n}?", f"The special number of {n} is", v)
        for n, v in zip(names, values)
    ]
    return _Material("Some special numbers are hidden in the text below.", of, questions)


def _facts(random: random.Random, num_tokens: int) -> _Material:
    world = World(random)
    kinds = random.choices(("person", "company", "town"), k=_QUESTIONS)
    documents = [world.document(kind) for kind in kinds]
    depths = [random.random() for _ in documents]
    paragraphs = text.prose(random, 12 * num_tokens)

    def of(num_words: int) -> str:
        others = haystack.last_words(paragraphs, num_words)
        return "\n\n".join(haystack.hidden([d.text for d in documents], depths, others))

    questions = []
    for document in documents:
        fact, answer = random.choice(document.facts)
        subject = document.subject
        questions.append(_Question(fact.question.format(subject), fact.begun(subject), answer))
    return _Material("Answer from the documents below.", of, questions)


def _after_others(make: Callable, random: random.Random, writer: Writer, length: int) -> Sample:
    """The text alone, then one question after the other."""
    material = make(random, length)

    def prompt(num_words: int, asked: _Question) -> list[int]:
        told = f"{material.head}\n\n{material.text(num_words)}"
        return writer.chat(f"{told}\n\n{asked.question}", asked.begun)

    *others, last = material.questions
    num_words, final = _fitted(writer, lambda n: prompt(n, last), length)
    alone = _common(prompt(num_words, _Question("#", "", "")), final)
    before = [alone, *(prompt(num_words, other) for other in others)]
    return Sample(final, [last.answer], before)


def _in_conversation(make: Callable, random: random.Random, writer: Writer, length: int) -> Sample:
    """Each turn but the last is answered right."""
    material = make(random, length)

    *_, last = material.questions

    def turns(num_words: int) -> list[str]:
        told = [f"{material.head}\n\n{material.text(num_words)}\n\n"] + [""] * (_QUESTIONS - 1)
        said = [
            (text + asked.question, f"{asked.begun} {asked.answer}.")
            for text, asked in zip(told, material.questions)
        ]
        return [turn for pair in said for turn in pair][:-1]

    num_words, final = _fitted(writer, lambda n: writer.conversation(turns(n), last.begun), length)
    # Up to where an answer begins: another one would go on otherwise from there.
    others = [[*turns(num_words)[: 2 * i + 1], "#", "#"] for i in range(_QUESTIONS - 1)]
    before = [_common(writer.conversation(other, ""), final) for other in others]
    return Sample(final, [last.answer], before)


def _of_second_text(make: Callable, random: random.Random, writer: Writer, length: int) -> Sample:
    """The first text has somewhat more than half of the words."""
    (first, second), share = (make(random, length) for _ in range(2)), 0.57
    asked, last = first.questions[0], second.questions[-1]

    def told(num_words: int) -> list[str]:
        counts = round(share * num_words), num_words - round(share * num_words)
        turns = zip((first, second), counts, (asked, last))
        one, two = (f"{m.head}\n\n{m.text(n)}\n\n{ask.question}" for m, n, ask in turns)
        return [one, f"{asked.begun} {asked.answer}.", two]

    num_words, final = _fitted(writer, lambda n: writer.conversation(told(n), last.begun), length)
    begins = [told(num_words)[0], "#", "#"]
    return Sample(final, [last.answer], [_common(writer.conversation(begins, ""), final)])


def _fitted(writer: Writer, prompt: Callable, num_tokens: int) -> tuple[int, list[int]]:
    """How many words make a prompt of about so many tokens, and that prompt."""
    tried = {}

    def of(num_words: int) -> list[int]:
        ids = prompt(num_words)
        tried[tuple(ids)] = num_words
        return ids

    ids = writer.fit(of, num_tokens, num_tokens)
    return tried[tuple(ids)], ids


def _common(one: list[int], other: list[int]) -> list[int]:
    """What both begin with."""
    same = next(
        (i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(map(len, (one, other)))
    )
    return one[:same]


TASKS = tuple(
    Task(f"{name}, {form}", partial(make, of), "all_found", 12, shortest)
    for form, make, shortest in (
        ("after others", _after_others, 0),
        ("in conversation", _in_conversation, 0),
        ("of a second text", _of_second_text, 1300),  # both are long enough to be pruned
    )
    for name, of in (("numbers", _numbers), ("facts", _facts))
)
