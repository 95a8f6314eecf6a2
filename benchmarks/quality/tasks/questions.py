"""Questions that one or two of many documents answer: RULER's qa 1 and 2 (arXiv 2404.06654), two
questions at once, and a question that stands before the documents.

RULER takes documents from SQuAD and HotpotQA. Ours are made up, so that the answers are in the
prompt and nowhere else; a few others are like them, the rest is prose about other things.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.quality import text
from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.tasks import haystack
from benchmarks.quality.tasks.facts import FACTS, Fact, World

_ALIKE = 3  # made-up documents, those that answer among them


@dataclass(frozen=True)
class _Asked:
    """What is asked of a subject, which may be told of by another, and documents that answer it."""

    documents: list[str]
    fact: Fact
    subject: str
    answer: str

    @property
    def question(self) -> str:
        return self.fact.question.format(self.subject)


def _one_hop(random: random.Random, world: World) -> _Asked:
    document = world.document(random.choice(("person", "company", "town")))
    fact, answer = random.choice(document.facts)
    return _Asked([document.text], fact, document.subject, answer)


def _two_hops(random: random.Random, world: World) -> _Asked:
    """The second document is about what the first says of its subject."""
    hop = random.choice([fact for fact in FACTS if fact.described])
    first = world.document(hop.of)
    second = world.document(hop.value, dict(first.facts)[hop])
    fact, answer = random.choice(second.facts)
    subject = hop.described.format(first.subject)
    return _Asked([first.text, second.text], fact, subject, answer)


def _numbered(documents: list[str]) -> str:
    return "\n\n".join(f"Document {n}:\n{text}" for n, text in enumerate(documents, 1))


def _make(
    hops: tuple[Callable, ...],
    is_first: bool,
    random: random.Random,
    writer: Writer,
    num_tokens: int,
) -> Sample:
    world = World(random)
    asked = [hop(random, world) for hop in hops]
    answers = [one.answer for one in asked]
    documents = [document for one in asked for document in one.documents]
    documents += world.others(_ALIKE - len(documents), answers)
    depths = [random.random() for _ in documents]
    paragraphs = text.prose(random, 12 * num_tokens)

    head = "Read the documents and answer the question from them."
    tail = "\n".join(f"Question: {one.question}" for one in asked)
    begun = asked[0].fact.begun(asked[0].subject)
    if is_first:  # and not said again
        head, tail = f"{head} {tail}", "Answer the question at the beginning."
        begun = f"The {asked[0].fact.what} is"

    def prompt(num_words: int) -> list[int]:
        others = haystack.last_words(paragraphs, num_words)
        numbered = _numbered(haystack.hidden(documents, depths, others))
        return writer.chat(f"{head}\n\n{numbered}\n\n{tail}", f"Answer: {begun}")

    return Sample(writer.fit(prompt, num_tokens, num_tokens), answers)


def _task(name: str, hops: tuple[Callable, ...], is_first: bool = False) -> Task:
    metric = "any_found" if len(hops) == 1 else "all_found"
    return Task(name, partial(_make, hops, is_first), metric, 16 * len(hops))


TASKS = (
    _task("qa 1", (_one_hop,)),
    _task("qa 2", (_two_hops,)),
    _task("two questions", (_one_hop, _one_hop)),
    _task("question first, documents", (_one_hop,), is_first=True),
)
