"""Documents about people, companies and towns that are made up, since there is no data set at hand:
each is about one of them, and says a few things of it in one of several forms."""

import random
from dataclasses import dataclass

_FIRST = """
Adam Agnes Albert Alice Amy Anna Arthur Barbara Bernard Bruno Carla Cecil Clara Conrad Daniel Diana
Edgar Edith Elena Emil Emma Felix Flora Frank George Gloria Grace Hannah Harold Helen Henry Hugo Ida
Irene Isaac Jacob Jane Julia Karl Laura Leo Louis Lucy Magda Maria Martin Miriam Nina Norman Olga
Oscar Paula Peter Philip Rachel Robert Rosa Samuel Sarah Simon Sophie Stella Thomas Ursula Victor
""".split()
_LAST = """
Abbott Archer Barlow Becker Benson Bishop Brandt Carver Clayton Conway Cooper Dalton Dawson Draper
Ellis Farrell Fisher Fletcher Foster Garner Gibson Graham Hanson Harper Hobbs Holt Jensen Keller
Kemp Lambert Larsen Lawson Marsh Mercer Miller Morris Nash Nolan Norton Olsen Osborn Parker Pearce
Porter Quinn Ramsey Reed Rhodes Sawyer Seaton Sharp Slater Spencer Stone Sutton Tanner Thorne Turner
Vaughn Wagner Walker Warren Webster Wheeler Winslow Yates
""".split()
_TOWN_BEGINS = """
Alder Ash Beck Birch Bram Brook Cald Clay Cran Dal Dor Dun East Elm Fair Fal Glen Green Hart Hazel
Hol Ken Kirk Lang Lin Lock Maple Marl Mel Mill Nor Oak Pem Pen Rad Raven Red Rock Rose Sal Shel
South Stan Sten Thorn Tor Wake Wal West Whit Wil Win Wood
""".split()
_TOWN_ENDS = """
bridge burn bury by combe cote dale den fell field ford gate ham haven hill hurst ley low mere mont
mouth port ridge sby shaw stead stoke ton vale wick worth
""".split()
_PRODUCTS = """
bicycles blankets boats bricks candles carpets chairs clocks furniture glass gloves guitars hats
jewelry knives lamps locks mirrors nails paint paper pianos pipes pottery pumps ropes sails scales
shoes soap tents tiles tools toys tractors umbrellas wagons watches windows wire
""".split()
_JOBS = """
accountant actor architect baker barber biologist botanist butcher carpenter chemist composer cook
dancer dentist diver engineer farmer gardener geologist historian journalist judge lawyer librarian
mechanic musician nurse painter pharmacist photographer pilot plumber poet printer sailor sculptor
surgeon tailor teacher translator
""".split()
_RIVERS = """
Arden Bourne Calder Dever Elwy Fenn Garrow Hodder Iskar Jarrow Kelder Lorne Marden Nidd Orrin Pellan
Rother Sarn Tamble Urwen Velden Wharn Yarrel Zenn
""".split()
_FAIRS = """
apples books bread cattle cheese cherries cider flowers garlic honey horses kites lace lanterns
mushrooms onions pears plums pumpkins roses sheep wine
""".split()


@dataclass(frozen=True, eq=False)
class Fact:
    """What is said of a subject, "{0}", with a value, "{1}", and how the value is asked for.

    Attributes:
        of: kind of the subject: "person", "company" or "town".
        value: kind of the value, one of these or a list of words.
        what: noun for the value.
        described: the value in a longer question, where others are about it.
    """

    of: str
    value: str | list[str]
    forms: tuple[str, ...]
    question: str
    what: str
    described: str = ""

    def begun(self, subject: str) -> str:
        """The first form, up to the value."""
        begun = self.forms[0].split(" {1}")[0].format(subject)
        return begun[0].upper() + begun[1:]


FACTS = (
    Fact(
        "person",
        "company",
        ("{0} works for {1}.", "The employer of {0} is {1}.", "{0} is employed by {1}."),
        "Which company does {0} work for?",
        "company",
        "the company that {0} works for",
    ),
    Fact(
        "person",
        "town",
        ("{0} was born in {1}.", "The birthplace of {0} is {1}.", "{0} is a native of {1}."),
        "In which town was {0} born?",
        "town",
        "the town where {0} was born",
    ),
    Fact(
        "person",
        _JOBS,
        ("The profession of {0} is {1}.", "By profession, {0} is a {1}."),
        "What is the profession of {0}?",
        "profession",
    ),
    Fact(
        "company",
        "town",
        ("The head office of {0} is in {1}.", "{0} has its head office in {1}."),
        "In which town is the head office of {0}?",
        "town",
        "the town where {0} has its head office",
    ),
    Fact(
        "company",
        _PRODUCTS,
        ("{0} makes {1}.", "The product of {0} is {1}.", "{0} is known as a maker of {1}."),
        "What does {0} make?",
        "product",
    ),
    Fact(
        "company",
        "person",
        ("{0} was founded by {1}.", "The founder of {0} is {1}."),
        "Who founded {0}?",
        "founder",
        "the founder of {0}",
    ),
    Fact(
        "town",
        _RIVERS,
        ("{0} lies on the river {1}.", "The river that runs through {0} is the {1}."),
        "On which river does {0} lie?",
        "river",
    ),
    Fact(
        "town",
        _FAIRS,
        ("{0} has a yearly fair of {1}.", "Every year, {0} holds a fair of {1}."),
        "What is sold at the yearly fair of {0}?",
        "fair",
    ),
)


@dataclass(frozen=True)
class Document:
    """Attributes:
    facts: each with its value.
    """

    subject: str
    facts: tuple[tuple[Fact, str], ...]
    text: str


class World:
    """Made-up people, companies and towns, none of which is the subject of two documents."""

    def __init__(self, random: random.Random) -> None:
        self._random = random
        self._told: set[str] = set()

    def document(self, kind: str, subject: str | None = None) -> Document:
        """About a new subject of the kind, or of this name."""
        subject = subject or self._name(kind)
        while subject in self._told:
            subject = self._name(kind)
        self._told.add(subject)
        facts = [(fact, self._value(fact)) for fact in FACTS if fact.of == kind]
        self._random.shuffle(facts)
        sentences = (self._random.choice(f.forms).format(subject, v) for f, v in facts)
        return Document(subject, tuple(facts), " ".join(sentences))

    def others(self, count: int, answers: list[str]) -> list[str]:
        """Texts of so many documents of any kind that do not hold an answer."""
        texts: list[str] = []
        while len(texts) < count:
            text = self.document(self._random.choice(("person", "company", "town"))).text
            if not any(answer in text for answer in answers):
                texts.append(text)
        return texts

    def _value(self, fact: Fact) -> str:
        if isinstance(fact.value, str):
            return self._name(fact.value)
        return self._random.choice(fact.value)

    def _name(self, kind: str) -> str:
        choice = self._random.choice
        if kind == "person":
            return f"{choice(_FIRST)} {choice(_LAST)}"
        if kind == "company":
            return f"{choice(_LAST)} & {choice(_LAST)}"
        return choice(_TOWN_BEGINS) + choice(_TOWN_ENDS)
