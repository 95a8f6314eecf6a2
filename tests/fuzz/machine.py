"""Random lives of requests, as hypothesis makes them up and shortens them when one goes wrong."""

import random
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

import benchmarks.engine
from fuzz import driver
from fuzz.answers import check_answers
from fuzz.model import CONFIG, ENGINES, GRAMMAR, LONGEST, MOST_TOKENS, ON_GPU, OPTIONS, ROOMS, save

RNG = random.Random(0)
DOCUMENTS = [[RNG.randrange(3, 1000) for _ in range(LONGEST)] for _ in range(3)]
LENGTHS = (1, 2, 15, 16, 17, 33, 59, 60, 64, 65, 100, 160, 220, 300)
SETTINGS = (
    None,
    {"lazyllm": "off"},
    {"lazyllm": "mild"},
    {"lazyllm_keep": 1.5},
    {"lazyllm_revive": "off"},
    {"lazyllm": "mild", "lazyllm_keep": 1.2, "lazyllm_revive": "off"},
)
# What of an answer's tokens ends it, beside its length: one token of ten; a part of its text.
STOPS = {
    "length": {},
    "token": {"stop_token_ids": list(range(0, 1000, 10))},
    "text": {"stop": ["7 ", "31"]},
}
REFUSED = (
    ([], {}),
    (DOCUMENTS[0] + [3], {}),
    ([3, 1000], {}),
    ([3], {"extra_args": {"lazyllm": "fast"}}),
    ([3] * 100, {"extra_args": {"lazyllm_keep": 0}}),
    ([3] * 100, {"prompt_logprobs": 1, "extra_args": {"lazyllm": "mild"}}),
)


def _event(method: str, **arguments):
    """One of ``Lives``' methods, and what to call it with."""
    return st.tuples(st.just(method), st.fixed_dictionaries(arguments))


INDEX = st.integers(0, 99)
LENGTH = st.sampled_from(LENGTHS) | st.integers(1, 300)
OWN = {
    "max_tokens": st.sampled_from((1, 6, 17, MOST_TOKENS, MOST_TOKENS)),
    "setting": st.sampled_from(SETTINGS),
    "stop": st.sampled_from(("length", "length", "token", "text")),
    "n": st.sampled_from((1, 1, 1, 2, 3)),
    "priority": st.integers(0, 2),
    "salt": st.sampled_from((None, None, "a")),
}
BEGINNING = {"document": st.integers(0, 2), "length": LENGTH}
MORE = {
    "other": st.integers(0, 2),
    "more": st.sampled_from((0, 0, 1, 17, 40)),
    "crowd": st.sampled_from((1, 1, 2, 5)),
}
PACE = {
    "budget": st.sampled_from((9, 33, 64, 200, LONGEST)),
    "chunk": st.sampled_from((0, 0, 7, 24, 48)),
}
TURN = {"more": st.sampled_from((1, 5, 30, 71, 85, 91)), "crowd": st.sampled_from((1, 1, 2, 4))}
ADD = _event("add", **BEGINNING, **MORE, **OWN)
EVENTS = st.one_of(
    *3 * [ADD],
    *2 * [_event("next_turn", which=INDEX, **TURN, **OWN)],
    *2 * [_event("converse", **BEGINNING, **TURN, **OWN)],
    _event("add_by_grammar", **BEGINNING),
    _event("add_what_is_refused", which=st.integers(0, len(REFUSED) - 1)),
    _event("abort", which=INDEX),
    _event("pace", **PACE),
    _event("wait"),
    _event("reset", running=st.booleans()),
    _event("pause", mode=st.sampled_from(("keep", "abort")), clears=st.booleans()),
)


class Fuzzed:
    """An engine, and another one when it broke.

    Args:
        name: out of ``ENGINES``.

    Attributes:
        counts: what was done, by kind, and the answers that were seen to be right.
    """

    def __init__(self, name: str) -> None:
        self.name, self._engine = name, None
        self._files = tempfile.TemporaryDirectory()
        self.folder = save(Path(self._files.name) / "model")
        self.counts = Counter()

    def do(self, what: str, **arguments):
        """See ``driver.do``. Raises RuntimeError if something is not as it must be."""
        try:
            if self._engine is None:
                self._start()
            return self._engine.run("do", what=what, **arguments)
        except (RuntimeError, OSError):
            self.broke()
            raise

    def _start(self) -> None:
        given = {"model": str(self.folder), "lazyllm": CONFIG | ENGINES[self.name]}
        given |= {"options": OPTIONS, "trace": not ON_GPU}  # a trace needs eager steps
        log = Path(self._files.name) / "log"
        self._engine = benchmarks.engine.Engine(driver.start, given, driver.__name__, log)
        self._engine.ready()

    def broke(self) -> None:
        """What state it is in is not to be trusted."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def close(self) -> None:
        self.broke()
        self._files.cleanup()


class Lives(RuleBasedStateMachine):
    """Attributes:
    fuzzed: the engine.
    asked: what was asked of it, by name: ``prompt`` and ``params``.
    ended: names and tokens of what finished.
    """

    fuzzed: Fuzzed

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.ended, self.added = {}, [], 0
        self.is_paused = self.is_broken = False

    def do(self, what: str, **arguments):
        try:
            return self.fuzzed.do(what, **arguments)
        except (RuntimeError, OSError):
            self.is_broken = True
            raise

    @initialize(room=st.sampled_from(ROOMS), traced=st.booleans(), **PACE)
    def begin(self, room, traced, budget, chunk):
        self.do("begin", room=room, traced=traced and not ON_GPU)
        self.pace(budget, chunk)

    @rule(event=EVENTS, steps=st.sampled_from((0, 0, 1, 2, 5)))
    def live(self, event, steps):
        """One rule for all: hypothesis leaves out some rules in most lives."""
        method, arguments = event
        getattr(self, method)(**arguments)
        self.ended += self.do("step", times=steps).items()

    def pace(self, budget, chunk):
        self.do("pace", budget=budget, chunk=chunk)

    def wait(self):
        """Nobody comes for a while, so that something ends that a conversation goes on from."""
        self.ended += self.do("step", times=30).items()

    def add(self, document, length, other, more, crowd, **own):
        """So many at once, of other lengths and documents."""
        for i in range(crowd):
            begins = DOCUMENTS[(document + i) % 3][: (length + 61 * i) % 300 or 1]
            self._add(begins + DOCUMENTS[other][100 : 100 + more], **own)

    def next_turn(self, which, more, crowd, **own):
        """A conversation goes on, in several ways at once: the prompt, its answer, and some more,
        half of the time by the same setting and in the same part of the cache."""
        if self.ended:
            name, said = self.ended[which % len(self.ended)]
            if more % 2:
                own |= self.asked[name]["own"]
            for i in range(crowd):
                tail = DOCUMENTS[1][50 + 40 * i :][:more]
                self._add(self.asked[name]["prompt"] + said + tail, **own)

    def converse(self, document, length, more, crowd, **own):
        """Something is said, and when it has been answered the next turn comes, for some time."""
        self._add(DOCUMENTS[document][:length], **own)
        for _ in range(3):
            self.wait()
            self.next_turn(len(self.ended) - 1, more, crowd, **own)

    def _add(self, prompt, max_tokens, setting, stop, n, priority, salt):
        prompt = prompt[: LONGEST - MOST_TOKENS]
        params = {"max_tokens": max_tokens, "extra_args": setting, "n": n} | STOPS[stop]
        self._ask(prompt, params, priority=priority, salt=salt)

    def _ask(self, prompt, params, **arguments):
        name = f"r{self.added}"
        self.added += 1
        own = {"setting": params.get("extra_args"), "salt": arguments.get("salt")}
        self.asked[name] = {"prompt": prompt, "params": params, "own": own}
        error = self.do("add", name=name, prompt=prompt, params=params, **arguments)
        assert error is None, error

    def add_by_grammar(self, document, length):
        params = {"max_tokens": MOST_TOKENS, "grammar": GRAMMAR, "ignore_eos": False}
        self._ask(DOCUMENTS[document][:length], params)

    def add_what_is_refused(self, which):
        prompt, params = REFUSED[which]
        assert self.do("add", name="bad", prompt=prompt, params={"max_tokens": 1} | params)

    def abort(self, which):
        """Of all that was asked: what has ended already is aborted too late."""
        if names := list(self.asked):
            self._forget([names[which % len(names)]])

    def _forget(self, names: list[str]) -> None:
        self.do("abort", names=names)
        self.ended = [one for one in self.ended if one[0] not in names]
        for name in names:
            del self.asked[name]

    def reset(self, running):
        self.do("reset", running=running)

    def pause(self, mode, clears):
        """Or go on, if it pauses."""
        if self.is_paused:
            self.do("resume")
        else:
            self.do("pause", mode=mode, clears=clears)
            if mode == "abort":
                self._forget([n for n in self.asked if n not in dict(self.ended)])
        self.is_paused = not self.is_paused

    def teardown(self) -> None:
        if self.is_broken:
            return
        said = self.do("finish")
        what = "answers to their end" if ON_GPU else "answers compared"
        self.fuzzed.counts[what] += check_answers(self.asked, said, None if ON_GPU else self.do)


def run(fuzzed: Fuzzed, seed: int, lives: int, steps: int, shortens: bool = True) -> None:
    """Raises what went wrong, and prints the life in which it did, and how to see it again.

    Args:
        lives: how many.
        steps: events in each, at most.
        shortens: look for a shorter life in which it goes wrong, which takes minutes.
    """

    @seeded(seed)
    class OfOne(Lives):
        pass

    OfOne.fuzzed = fuzzed
    how = settings(
        max_examples=lives,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        print_blob=False,
        phases=[Phase.generate] + [Phase.shrink] * shortens,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(OfOne, settings=how)
    except Exception:
        print(f"To see it again: make fuzz FUZZ_ENGINE={fuzzed.name} FUZZ_SEED={seed}")
        raise
    fuzzed.counts.update(fuzzed.do("take_counts"))
