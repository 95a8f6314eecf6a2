"""The soak's arithmetic, without a server."""

import numpy as np
import pytest

from benchmarks.serving.metrics import parse
from benchmarks.soak import verdict, watch
from benchmarks.soak.client import FINISHED, LEFT, Sent
from benchmarks.soak.counts import compare
from benchmarks.soak.jobs import GIANT, KINDS, LARGE, SMALL, Ask, Jobs
from benchmarks.soak.latency import BINS, Latencies, summary
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.schedule import Schedule

SETTINGS = [({}, 0.5), ({"lazyllm": "off"}, 0.5)]
CONFIG = LazyLLMConfig(
    prune=({"layer": 2, "keep": 0.5},), min_prompt_tokens=50, first_tokens=1, last_tokens=1,
    score_window=1, reuse="deep",
)  # fmt: skip
SCHEDULE = Schedule.build(CONFIG, 4)


# What is asked.


def play(jobs: Jobs, kind: str) -> list[Ask]:
    """All requests of a job whose answers are all sevens."""
    job = jobs.of_kind(kind)
    asks = [next(job)]
    while True:
        try:
            asks.append(job.send([7] * asks[-1].max_tokens))
        except StopIteration:
            return asks


def test_jobs_are_those_of_their_seed():
    made = [Jobs(seed, SMALL, SETTINGS, 1000, 0.5) for seed in (3, 3, 4)]
    first, again, other = ([play(jobs, kind) for kind in KINDS for _ in range(5)] for jobs in made)
    assert first == again != other


def test_a_conversation_goes_on():
    """Each turn begins with all of the one before."""
    turns = play(Jobs(0, SMALL, SETTINGS, 1000, 0.0), "conversation")
    assert 3 <= len(turns) <= 5
    for before, turn in zip(turns, turns[1:]):
        said = before.prompt + [7] * before.max_tokens
        assert turn.prompt[: len(said)] == said and len(turn.prompt) > len(said)
        assert turn.setting == before.setting and turn.wait > 0 == turns[0].wait


def test_questions_share_documents():
    jobs = Jobs(0, SMALL, SETTINGS, 1000, 0.0)
    begins = [tuple(play(jobs, "document")[0].prompt[:100]) for _ in range(100)]
    assert 10 < len(set(begins)) < 50  # a quarter are new ones


@pytest.mark.parametrize("sizes", (LARGE, SMALL))
def test_sizes(sizes):
    jobs, asks = Jobs(1, sizes, SETTINGS, 1000, 0.3), []
    for kind in (*KINDS, GIANT):
        asks += [ask for _ in range(60) for ask in play(jobs, kind)]
    for ask in asks:
        assert len(ask.prompt) + ask.max_tokens <= sizes.longest
        assert 3 <= min(ask.prompt) and max(ask.prompt) < 1000
        assert ask.leaves_after is None or 0 < ask.leaves_after < ask.max_tokens
    assert max(len(ask.prompt) for ask in asks if ask.kind == "chat") < 1024
    leave = [ask for ask in asks if ask.leaves_after or ask.leaves_within is not None]
    assert 0.2 < len(leave) / len(asks) < 0.4
    assert {ask.setting.get("lazyllm") for ask in asks} == {None, "off"}


# Latency.


def test_a_run_is_cut_into_bins():
    latencies = Latencies(100.0)
    for at in range(100):
        latencies.first_token("cold" if at % 2 else "chat", at, at / 1000)
    latencies.next_tokens(99.0, 0.4, 4)
    latencies.next_tokens(250.0, 0.6, 1)  # while the last requests end
    assert [each["ttft"]["count"] for each in latencies.by_bin()] == [100 // BINS] * BINS
    ends = latencies.first_and_last()
    assert [end["count"] for end in ends["ttft"]] == [20, 20]
    assert [end["median"] for end in ends["ttft"]] == [9.5, 89.5]
    assert [end["median"] for end in ends["ttft, cold"]] == [10.0, 90.0]
    assert ends["itl"] == [None, {"count": 5, "median": 100.0, "p99": 580.0}]


def test_summary():
    assert summary([]) is None
    assert summary(np.arange(101) / 1000) == {"count": 101, "median": 50.0, "p99": 99.0}


# What the server counted.


def grown(**changes) -> dict:
    """By hand, for a finished request of 100 tokens that is pruned and one of 10 that is not, and
    one of 60 whose client left after 2 of 8 tokens."""
    counts = {
        ("request_success", "length"): 2.0,
        ("request_success", "error"): 0.0,
        ("request_success", "stop"): 0.0,
        ("request_success", "repetition"): 0.0,
        ("prompt_tokens", None): 170.0,
        ("generation_tokens", None): 15.0,
        ("num_preemptions", None): 0.0,
        ("lazyllm_reuses", None): 0.0,
        ("lazyllm_requests", "true"): 2.0,
        ("lazyllm_requests", "false"): 1.0,
        ("lazyllm_prompt_tokens", None): 170.0,
        ("lazyllm_kept_tokens", "0"): 170.0,
        ("lazyllm_kept_tokens", "1"): 50.0 + 10.0 + 30.0,
    }
    return counts | {tuple(key.split("/")) if "/" in key else (key, None): v
                     for key, v in changes.items()}  # fmt: skip


SENT = [
    Sent(100, 8, (), FINISHED, 8),
    Sent(10, 4, (), FINISHED, 4),
    Sent(60, 8, (), LEFT, 2),
]


def wrong(sent: list[Sent], counts: dict) -> list[str]:
    return [one.name for one in compare(sent, counts, SCHEDULE) if not one.is_right]


def test_counts_that_agree():
    assert wrong(SENT, grown()) == []


@pytest.mark.parametrize(
    "name, value",
    [
        ("request_success/length", 1),
        ("request_success/error", 1),
        ("prompt_tokens", 109),
        ("prompt_tokens", 171),
        ("generation_tokens", 13),
        ("generation_tokens", 21),
        ("lazyllm_requests/true", 3),
        ("lazyllm_requests/false", 0),
        ("lazyllm_prompt_tokens", 109),
        ("lazyllm_kept_tokens/1", 59),
        ("lazyllm_kept_tokens/1", 91),
    ],
)
def test_a_count_too_many_or_too_few_is_seen(name, value):
    assert wrong(SENT, grown(**{name: value})) == [name.replace("/", " ")]


def test_who_goes_on_from_another_has_no_tokens():
    """The longest that may have; one that asks for less may not."""
    without = {"lazyllm_prompt_tokens": 10.0, "lazyllm_kept_tokens/0": 10.0}
    without |= {"lazyllm_kept_tokens/1": 10.0}
    assert wrong(SENT, grown(lazyllm_reuses=1.0, **without)) == []
    exact = [Sent(100, 8, (("lazyllm_reuse", "exact"),), FINISHED, 8), *SENT[1:]]
    assert len(wrong(exact, grown(lazyllm_reuses=1.0, **without))) == 3
    off = [Sent(100, 8, (("lazyllm", "off"),), FINISHED, 8), *SENT[1:]]
    assert "lazyllm_requests false" in wrong(off, grown())


# The verdict.


def samples(minutes: float, host: float, gpu: float | None = 0.0) -> list[watch.Sample]:
    """Memory that grows by so many MiB an hour, but in the first fifth by a GiB."""
    seconds = np.arange(0, minutes * 60 + 1, 5)
    settling = np.minimum(seconds / (minutes * 12), 1) * 1024

    def values(growth):
        return [None] * len(seconds) if growth is None else settling + growth * seconds / 3600

    others = [0.0] * 7
    return [watch.Sample(at, h, g, *others)
            for at, h, g in zip(seconds, values(host), values(gpu))]  # fmt: skip


def test_slope():
    assert verdict.slope([0, 1800, 3600], [10, 15, 20]) == pytest.approx(10)
    assert verdict.slope([0, 1, 2, 3], [1, -1, -1, 1]) == pytest.approx(0)


@pytest.mark.parametrize(
    "minutes, host, gpu, expected",
    [
        (25, 0, 0, [True, True]),
        (25, verdict.MOST_HOST + 20, 0, [False, True]),
        (25, -500, verdict.MOST_GPU + 20, [True, False]),
        (25, 0, None, [True, None]),
        (2, 90_000, 90_000, [None, None]),
    ],
)
def test_memory(minutes, host, gpu, expected):
    found = verdict.memory(samples(minutes, host, gpu))
    assert [one.is_good for one in found] == expected


def test_latency():
    def judge(count: int, median: float, p99: float, minutes: int = 25) -> list[bool | None]:
        first = {"count": count, "median": 100.0, "p99": 300.0}
        last = {"count": count, "median": median, "p99": p99}
        ends = {"ttft": [first, last], "itl": [None, last]}
        return [one.is_good for one in verdict.latency(ends, minutes * 60)]

    assert judge(1000, 110.0, 350.0) == [True, None]
    assert judge(1000, 140.0, 350.0) == [False, None]
    assert judge(1000, 110.0, 900.0) == [False, None]
    assert judge(100, 110.0, 900.0) == [True, None]  # of a hundred, the worst one
    assert judge(10, 900.0, 900.0) == judge(1000, 900.0, 900.0, minutes=2) == [None, None]


def test_one_bad_finding_is_enough():
    good, open_, bad = verdict.nothing("a", []), verdict.memory([])[0], verdict.nothing("b", ["x"])
    assert verdict.is_good([good, open_]) and not verdict.is_good([good, bad])
    assert verdict.counters([]).is_good is False


def test_metrics_are_read():
    text = (
        "# TYPE vllm:request_success counter\n"
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 3.0\n'
        'vllm:request_success_total{engine="1",finished_reason="length",model_name="m"} 4.0\n'
        'vllm:request_success_created{engine="0",finished_reason="length",model_name="m"} 9.0\n'
        "# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{engine="0",model_name="m"} 2.0\n'
    )
    expected = {("request_success", "length"): 7.0, ("num_requests_running", None): 2.0}
    assert parse(text) == expected
