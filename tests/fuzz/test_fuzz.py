"""A few random lives of requests; ``make fuzz`` makes up others."""

import pytest

import benchmarks.engine
from fuzz.machine import DOCUMENTS, Fuzzed, run

SHOWN = ("aborts", "preemptions", "resets", "pauses", "refused", "held back", "answers compared")


def test_nothing_is_lost_and_nothing_leaks():
    """Lives of a seed depend on what else is imported, since hypothesis draws numbers that it finds
    there; so that there are more until enough happened."""
    fuzzed = Fuzzed("reviving")
    try:
        for seed in range(3, 8):
            run(fuzzed, seed, lives=5, steps=24, shortens=False)
            if all(fuzzed.counts[what] > 2 for what in SHOWN):
                break
    finally:
        fuzzed.close()
    counts = fuzzed.counts
    for what in SHOWN:
        assert counts[what] > 2, f"too few {what}: the test shows nothing: {counts}"


def test_who_revives_nothing_says_the_same_beside_one_that_does():
    """Found by ``make fuzz``: with ``keep_mass`` it revived where others did."""
    fuzzed = Fuzzed("mass")
    prompt, params = DOCUMENTS[1][:195], {"max_tokens": 24, "extra_args": {"lazyllm_revive": "off"}}
    try:
        alone = fuzzed.do("alone", prompt=prompt, params=params)
        fuzzed.do("begin", room=4, traced=False)
        fuzzed.do("add", name="other", prompt=DOCUMENTS[2][:250], params={"max_tokens": 24})
        fuzzed.do("add", name="one", prompt=prompt, params=params)
        said = fuzzed.do("finish")
        assert said["one"][0]["tokens"] == alone
    finally:
        fuzzed.close()


def test_an_engine_that_did_not_start_is_asked_nothing(monkeypatch):
    """Its own error is what is seen, also by who tries it again."""

    class Failing:
        def __init__(self, *arguments): ...
        def close(self): ...
        def ready(self):
            raise RuntimeError("no memory")

    monkeypatch.setattr(benchmarks.engine, "Engine", Failing)
    fuzzed = Fuzzed("reviving")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            fuzzed.do("take_counts")
    fuzzed.close()
