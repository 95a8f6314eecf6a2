"""A question that one of many generated documents answers; the others are about other people."""

import random

from benchmarks.quality.sample import Sample, Task, Writer

_FIRST = (
    "Anna", "Boris", "Clara", "David", "Elena", "Frank", "Greta", "Henry", "Irene", "Jonas",
    "Karin", "Louis", "Maria", "Nina", "Oscar", "Paula", "Robert", "Sofia", "Thomas", "Vera",
)  # fmt: skip
_LAST = (
    "Adler", "Bauer", "Costa", "Dumont", "Evans", "Fischer", "Grant", "Hansen", "Ivanov", "Jensen",
    "Keller", "Larsen", "Moreau", "Novak", "Olsen", "Parker", "Rossi", "Santos", "Turner", "Weber",
)  # fmt: skip
_CITIES = (
    "Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Havana", "Kyoto", "Lisbon", "London",
    "Madrid", "Moscow", "Oslo", "Paris", "Prague", "Rome", "Seoul", "Sydney", "Tokyo", "Vienna",
    "Warsaw",
)  # fmt: skip
_WORK = (
    "baker", "carpenter", "dentist", "farmer", "lawyer", "nurse", "painter", "pilot", "plumber",
    "sailor", "singer", "surgeon", "tailor", "teacher", "waiter", "writer",
)  # fmt: skip
_HOBBIES = ("chess", "cycling", "fishing", "gardening", "hiking", "painting", "rowing", "tennis")


def _person(random: random.Random, name: str) -> dict[str, str]:
    return {
        "name": name,
        "city": random.choice(_CITIES),
        "work": random.choice(_WORK),
        "hobby": random.choice(_HOBBIES),
        "born": str(random.randint(1940, 2000)),
    }


def _document(p: dict[str, str]) -> str:
    return (
        f"{p['name']} works as a {p['work']}. {p['name']} was born in {p['born']} and lives in "
        f"{p['city']}. On weekends {p['name']} likes {p['hobby']}."
    )


_QUESTIONS = {
    "city": ("In which city does {name} live?", "{name} lives in"),
    "work": ("What is the job of {name}?", "{name} works as a"),
    "hobby": ("What does {name} like on weekends?", "On weekends {name} likes"),
    "born": ("In which year was {name} born?", "{name} was born in"),
}


def _make(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
    random.shuffle(names)
    people = iter(_person(random, name) for name in names)
    asked = next(people)
    field = random.choice(sorted(_QUESTIONS))
    question, answer = (text.format(**asked) for text in _QUESTIONS[field])
    head, tail = "Read the documents and answer the question.\n\n", f"\n\nQuestion: {question}"
    spent = len(writer.chat(head + _document(asked) + tail, answer))
    parts = writer.fill(lambda: f"Document: {_document(next(people))}\n", num_tokens - spent)
    parts.insert(random.randint(0, len(parts)), f"Document: {_document(asked)}\n")
    return Sample(writer.chat(head + "".join(parts) + tail, answer), [asked[field]])


TASKS = (Task("multi-document questions", _make, "any_found", 8),)
