"""A few random lives of requests, the same each time; ``make fuzz`` makes up others."""

from fuzz.machine import Fuzzed, run


def test_nothing_is_lost_and_nothing_leaks():
    fuzzed = Fuzzed("reviving")
    try:
        run(fuzzed, seed=3, lives=5, steps=24, shortens=False)
    finally:
        fuzzed.close()
    counts = fuzzed.counts
    for what in ("aborts", "preemptions", "resets", "pauses", "refused", "answers compared"):
        assert counts[what] > 2, f"too few {what}: the test shows nothing: {counts}"
