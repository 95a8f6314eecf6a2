"""The loads: what arrives. A seed says all of it, so that every engine is asked the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.loads.play import Conversation, Turn, arrive, converse, send
from benchmarks.loads.results import Times

Seed = Sequence[int]


@dataclass(frozen=True)
class Cold:
    """Prompts of which none begins as another does.

    Attributes:
        rates: prompts a second, from light to where stock vLLM has more than it can do.
        tokens, max_tokens: of a prompt and of its answer.
        vocabulary: token ids are below it.
    """

    rates: tuple[float, ...]
    tokens: int
    max_tokens: int
    vocabulary: int = 30000
    name: str = "cold prompts"

    @property
    def told(self) -> str:
        return f"Prompts of {self.tokens:,} tokens that nobody sent before, {self.max_tokens} out"

    async def play(self, address: str, rate: float, seconds: float, seed: Seed) -> Times:
        random = np.random.default_rng(seed)
        count = max(round(rate * seconds), 1)
        prompts = [_ids(random, self.tokens, self.vocabulary) for _ in range(count)]
        return await arrive(address, prompts, self.max_tokens, rate, random)


@dataclass(frozen=True)
class Questions:
    """Questions about one document, which was sent alone before.

    Attributes:
        document, question, max_tokens: tokens.
    """

    rates: tuple[float, ...]
    document: int
    question: int
    max_tokens: int
    vocabulary: int = 30000
    name: str = "questions about a document"

    @property
    def told(self) -> str:
        return (
            f"Questions of {self.question} tokens about one document of {self.document:,}, which "
            f"was sent alone first, {self.max_tokens} out"
        )

    async def play(self, address: str, rate: float, seconds: float, seed: Seed) -> Times:
        random = np.random.default_rng(seed)
        document = _ids(random, self.document, self.vocabulary)
        count = max(round(rate * seconds), 1)
        prompts = [document + _ids(random, self.question, self.vocabulary) for _ in range(count)]
        await send(address, document)
        return await arrive(address, prompts, self.max_tokens, rate, random)


@dataclass(frozen=True)
class Conversations:
    """Several turns each, with time to think in between; lengths are those of vLLM's multi-turn
    benchmark (``generate_multi_turn.json``).

    Attributes:
        common: tokens that all conversations begin with; own: those that follow in each, on
            average (lognormal) and at most.
        turns: of a user; turn, answer: tokens; each the least and the most.
        thinking: seconds, on average (exponential).
    """

    rates: tuple[float, ...]
    common: int = 500
    own: tuple[int, int] = (1000, 5000)
    turns: tuple[int, int] = (6, 9)
    turn: tuple[int, int] = (120, 160)
    answer: tuple[int, int] = (80, 120)
    thinking: float = 1.0
    vocabulary: int = 30000
    name: str = "conversations"

    @property
    def told(self) -> str:
        turns, turn, answer = (f"{a} to {b}" for a, b in (self.turns, self.turn, self.answer))
        return (
            f"Conversations of {turns} turns of {turn} tokens, after {self.common} that all share "
            f"and {self.own[0]:,} of its own on average, {answer} out, and {self.thinking:g} s to "
            "think between turns"
        )

    async def play(self, address: str, rate: float, seconds: float, seed: Seed) -> Times:
        random = np.random.default_rng(seed)
        common = _ids(random, self.common, self.vocabulary)
        starts = np.cumsum(random.exponential(1 / rate, max(round(rate * seconds), 1)))
        conversations = [
            Conversation(float(start), self._turns(common, random))
            for start in starts
            if start < seconds or start is starts[0]
        ]
        return await converse(address, conversations, seconds)

    def _turns(self, common: list[int], random: np.random.Generator) -> list[Turn]:
        average, most = self.own
        # Spread by one: the mean of such a lognormal number is exp(mean + 1/2).
        own = min(round(random.lognormal(np.log(average) - 0.5, 1.0)), most)
        turns = []
        for i in range(random.integers(*self.turns, endpoint=True)):
            text = _ids(random, random.integers(*self.turn, endpoint=True), self.vocabulary)
            if i == 0:
                text = common + _ids(random, own, self.vocabulary) + text
            max_tokens = int(random.integers(*self.answer, endpoint=True))
            turns.append(Turn(text, max_tokens, float(random.exponential(self.thinking))))
        return turns


def _ids(random: np.random.Generator, tokens: int, vocabulary: int) -> list[int]:
    return random.integers(3, vocabulary, tokens).tolist()


LARGE = {
    "cold": Cold((1, 2, 3), 8192, 256),
    "conversations": Conversations((1, 3, 6)),
    "questions": Questions((2, 4, 8), 32768, 128, 64),
}
# For a trial on a CPU.
SMALL = {
    "cold": Cold((0.5, 1, 2), 160, 8, 1000),
    "conversations": Conversations(
        (0.5, 1, 2), 30, (100, 200), (2, 4), (10, 20), (6, 9), 0.3, 1000
    ),
    "questions": Questions((0.5, 1, 2), 300, 20, 6, 1000),
}
