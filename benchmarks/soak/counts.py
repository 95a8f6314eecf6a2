"""What the server counted beside what its clients sent.

A request whose client went away, or that failed, may have got as far as it likes, and one that was
preempted counts again for its next prefill; so some counts have a least and a most. Without such
requests both are the same number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from benchmarks.soak.client import FINISHED, Sent
from benchmarks.soak.watch import Metrics
from lazyllm_vllm.plan.request_plan import RequestPlan
from lazyllm_vllm.plan.request_setting import DEEP
from lazyllm_vllm.plan.schedule import Schedule


@dataclass(frozen=True)
class Count:
    """``counted`` by the server; by what was sent it is from ``least`` to ``most``."""

    name: str
    counted: float
    least: float
    most: float

    @property
    def is_right(self) -> bool:
        return self.least <= self.counted <= self.most


def compare(sent: list[Sent], grown: Metrics, schedule: Schedule) -> list[Count]:
    """Args:
    sent: all requests, each of which is over.
    grown: how much the server's counters grew meanwhile.
    """
    finished = [one for one in sent if one.end == FINISHED]
    others = [one for one in sent if one.end != FINISHED]
    again = int(grown["num_preemptions", None])

    def count(name: str, of: Callable[[Sent], int], own: str | None = None) -> Count:
        """Of a counter that each request adds to once."""
        least = sum(map(of, finished))
        return Count(_named(name, own), grown[name, own], least, least + sum(map(of, others)))

    said = sum(one.max_tokens for one in finished)
    seen = sum(one.said for one in others)
    at_most = sum(one.max_tokens for one in others)
    tokens = grown["generation_tokens", None]
    return [
        count("request_success", lambda one: 1, "length"),
        *(Count(_named("request_success", r), grown["request_success", r], 0, 0) for r in _BAD),
        count("prompt_tokens", lambda one: one.num_prompt),
        Count("generation_tokens", tokens, said + seen, said + at_most),
        *_of_lazyllm(finished, others, again, grown, schedule),
    ]


def shown(grown: Metrics) -> dict[str, float]:
    """What else of the counters is of interest, and not 0."""
    return {
        _named(name, own): value
        for (name, own), value in sorted(grown.items(), key=str)
        if value and name.startswith(_SHOWN)
    }


_SHOWN = ("lazyllm_", "num_preemptions", "prefix_cache_", "prompt_tokens_cached")
_BAD = ("error", "stop", "repetition")


def _of_lazyllm(
    finished: list[Sent], others: list[Sent], again: int, grown: Metrics, schedule: Schedule
) -> list[Count]:
    """A request that went on from another is counted as a request, and its tokens are not. Which
    did the client is not told, so the longest that may have are left out of the least."""
    reuses = int(grown["lazyllm_reuses", None])
    plan = _plans(schedule)

    def count(name: str, of: Callable[[Sent], int], own: str | None, may_reuse: bool) -> Count:
        least, most = sum(map(of, finished)), sum(map(of, others))
        most += least + again * max(map(of, finished + others), default=0) * _GROWN
        if may_reuse:
            deep = (of(one) for one in finished if _may_reuse(one, schedule))
            least -= sum(sorted(deep, reverse=True)[:reuses])
        return Count(_named(name, own), grown[name, own], least, most)

    return [
        count("lazyllm_requests", lambda one: plan(one).is_pruned, "true", False),
        count("lazyllm_requests", lambda one: not plan(one).is_pruned, "false", False),
        count("lazyllm_prompt_tokens", lambda one: one.num_prompt, None, True),
        *(
            count("lazyllm_kept_tokens", lambda one, s=stage: plan(one).kept[s], str(stage), True)
            for stage in range(schedule.num_stages)
        ),
    ]


_GROWN = 2  # a preempted prompt is prefilled with what it has said: no more than twice its length


def _plans(schedule: Schedule) -> Callable[[Sent], RequestPlan]:
    @cache
    def plan(num_prompt: int, setting: tuple) -> RequestPlan:
        return schedule.plan(num_prompt, schedule.setting(dict(setting)))

    return lambda one: plan(one.num_prompt, one.setting)


def _may_reuse(one: Sent, schedule: Schedule) -> bool:
    return schedule.reuse(schedule.setting(dict(one.setting))) == DEEP


def _named(name: str, own: str | None) -> str:
    return name if own is None else f"{name} {own}"
