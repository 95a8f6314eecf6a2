"""What is asked: jobs made from a seed, each a generator of requests that is sent their answers."""

from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np

# A job's kind, and how often it is chosen. A document's job is one question about it; of documents
# there are so many at a time, and a question is about a new one with this chance.
KINDS = {"cold": 0.30, "conversation": 0.12, "document": 0.28, "chat": 0.30}
GIANT = "giant"  # comes by the clock
_DOCUMENTS, _NEW_DOCUMENT = 8, 0.25
_TURNS = (3, 5)
_THINKING = (0.5, 3.0)  # seconds before a conversation's next turn
# Of the requests whose client goes away, the share that does so by the clock, and within which
# time: in the queue, in prefill or in decoding. The others do after some tokens.
_BY_CLOCK, _WITHIN = 0.5, 2.0


@dataclass(frozen=True)
class Sizes:
    """Tokens: the least and the most."""

    cold: tuple[int, int]
    first_turn: tuple[int, int]
    turn: tuple[int, int]
    document: tuple[int, int]
    question: tuple[int, int]
    chat: tuple[int, int]
    answer: tuple[int, int]
    giant: int

    @property
    def longest(self) -> int:
        """A prompt and its answer."""
        turns = _TURNS[1] * (self.turn[1] + self.answer[1]) + self.first_turn[1]
        return max(self.giant + self.answer[1], self.cold[1] + self.answer[1], turns)


# Chats are shorter than the default of min_prompt_tokens.
LARGE = Sizes(
    cold=(4096, 16384),
    first_turn=(1024, 6144),
    turn=(100, 800),
    document=(6144, 12288),
    question=(20, 200),
    chat=(30, 1000),
    answer=(32, 200),
    giant=130_800,
)
SMALL = Sizes(
    cold=(160, 400),
    first_turn=(80, 160),
    turn=(5, 40),
    document=(160, 320),
    question=(5, 20),
    chat=(4, 60),
    answer=(4, 12),
    giant=1500,
)


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        setting: its ``vllm_xargs``.
        wait: seconds before it is sent.
        leaves_after: tokens after which its client goes away; None: it stays.
        leaves_within: the same in seconds.
    """

    kind: str
    prompt: list[int]
    max_tokens: int
    setting: dict[str, str]
    wait: float = 0.0
    leaves_after: int | None = None
    leaves_within: float | None = None


Job = Generator[Ask, list[int], None]


class Jobs:
    """Makes jobs.

    Args:
        settings: what requests set for themselves, and how often.
        vocabulary: token ids are under it.
        aborts: share of the requests whose client goes away.
    """

    def __init__(
        self,
        seed: int,
        sizes: Sizes,
        settings: list[tuple[dict, float]],
        vocabulary: int,
        aborts: float,
    ) -> None:
        self.sizes, self.settings, self.vocabulary, self.aborts = (
            sizes,
            settings,
            vocabulary,
            aborts,
        )
        self._random = np.random.default_rng(seed)
        self._documents: list[list[int]] = []

    def next(self) -> Job:
        return self.of_kind(str(self._random.choice(list(KINDS), p=list(KINDS.values()))))

    def of_kind(self, kind: str) -> Job:
        weights = [weight for _, weight in self.settings]
        setting = self.settings[self._random.choice(len(weights), p=weights)][0]
        if kind == "conversation":
            return self._conversation(setting)
        return self._single(kind, {} if kind == GIANT else setting)

    def pause(self, rate: float) -> float:
        """Seconds to the next of arrivals that come at a rate a second, independently."""
        return self._random.exponential(1 / rate)

    def _single(self, kind: str, setting: dict) -> Job:
        if kind == "document":
            prompt = self._document() + self._ids(self.sizes.question)
        elif kind == GIANT:
            prompt = self._ids((self.sizes.giant, self.sizes.giant))
        else:
            prompt = self._ids(getattr(self.sizes, kind))
        yield self._ask(kind, prompt, setting)

    def _conversation(self, setting: dict) -> Job:
        prompt = self._ids(self.sizes.first_turn)
        ask = self._ask("conversation", prompt, setting)
        for _ in range(self._within(_TURNS)):
            answer = yield ask
            prompt = prompt + answer + self._ids(self.sizes.turn)
            ask = self._ask("conversation", prompt, setting)
            ask = replace(ask, wait=self._random.uniform(*_THINKING))

    def _document(self) -> list[int]:
        if not self._documents or self._random.random() < _NEW_DOCUMENT:
            self._documents.append(self._ids(self.sizes.document))
            self._documents = self._documents[-_DOCUMENTS:]
        return self._documents[self._random.integers(len(self._documents))]

    def _ask(self, kind: str, prompt: list[int], setting: dict) -> Ask:
        ask = Ask(kind, prompt, self._within(self.sizes.answer), setting)
        if self._random.random() >= self.aborts:
            return ask
        if self._random.random() < _BY_CLOCK:
            return replace(ask, leaves_within=self._random.uniform(0, _WITHIN))
        return replace(ask, leaves_after=self._within((1, ask.max_tokens - 1)))

    def _ids(self, bounds: tuple[int, int]) -> list[int]:
        # By the logarithm: as many between 4,000 and 8,000 as between 8,000 and 16,000.
        size = round(np.exp(self._random.uniform(*np.log(bounds))))
        return self._random.integers(3, self.vocabulary, size).tolist()

    def _within(self, bounds: tuple[int, int]) -> int:
        return int(self._random.integers(bounds[0], bounds[1] + 1))
