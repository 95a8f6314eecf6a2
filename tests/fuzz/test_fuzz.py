"""A few random lives of requests, the same each time; ``make fuzz`` makes up others."""

from fuzz.machine import DOCUMENTS, Fuzzed, run


def test_nothing_is_lost_and_nothing_leaks():
    fuzzed = Fuzzed("reviving")
    try:
        run(fuzzed, seed=3, lives=5, steps=24, shortens=False)
    finally:
        fuzzed.close()
    counts = fuzzed.counts
    counts["preemptions"] += counts["reset while they ran"]  # which preempts too
    for what in ("aborts", "preemptions", "resets", "pauses", "refused", "answers compared"):
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
