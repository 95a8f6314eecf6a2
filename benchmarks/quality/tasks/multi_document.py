"""A question that one of many documents answers. A few are about people, and differ in who lives
where; the rest is prose about other things. With more people, or more about each, the answers of a
model of a hundred million parameters are guesses, and nothing can be told from them."""

import random

from benchmarks.quality import text
from benchmarks.quality.sample import Sample, Task, Writer

_NAMES = (
    "Anna",
    "David",
    "Elena",
    "Frank",
    "Henry",
    "Irene",
    "Louis",
    "Maria",
    "Oscar",
    "Paula",
    "Robert",
    "Thomas",
)
_CITIES = (
    "Athens",
    "Berlin",
    "Cairo",
    "Dublin",
    "Geneva",
    "Havana",
    "Kyoto",
    "Lisbon",
    "London",
    "Madrid",
    "Moscow",
    "Oslo",
    "Paris",
    "Prague",
    "Rome",
    "Seoul",
    "Sydney",
    "Tokyo",
    "Vienna",
    "Warsaw",
)
_PEOPLE = 3


def _make(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    names, cities = random.sample(_NAMES, _PEOPLE), random.sample(_CITIES, _PEOPLE)
    people = [
        f"Document: {name} lives in {city}. The house of {name} is in {city}.\n\n"
        for name, city in zip(names, cities)
    ]
    head = "Read the documents and answer the question.\n\n"
    tail = f"Question: In which city does {names[0]} live?"
    answer = f"{names[0]} lives in"
    spent = len(writer.chat(head + "".join(people) + tail, answer))
    prose = iter(text.prose(random, 8 * num_tokens))
    parts = writer.fill(lambda: f"Document: {next(prose)}\n\n", num_tokens - spent)
    for document in people:
        parts.insert(random.randint(0, len(parts)), document)
    return Sample(writer.chat(head + "".join(parts) + tail, answer), [cities[0]])


TASKS = (Task("multi-document questions", _make, "any_found", 8),)
