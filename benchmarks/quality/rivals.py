"""Others that drop prompt tokens, each with cuts of its own, at as many operations as LazyLLM."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.compression import Compression
from benchmarks.quality.methods import METHODS, NO_REVIVAL, Method
from benchmarks.quality.schedules import (
    COMPARED,
    CURVE,
    Anew,
    ByMass,
    Schedule,
    at_equal_operations,
)

FASTKV_DEPTH = 1 / 2
GEMFILTER_DEPTH = 13 / 32


@dataclass(frozen=True)
class Rival:
    """Attributes:
    method, schedule: by the share that is kept.
    least: tokens of a prompt that are always kept.
    """

    method: Callable[[float], Method]
    schedule: Callable[[float], Schedule]
    least: int


FASTKV = Method(
    "FastKV",
    NO_REVIVAL | {"score_window": 8, "first_tokens": 0, "last_tokens": 8, "score_pool": 1},
    "FastKV",
)
UNIPREFILL = NO_REVIVAL | {
    "score_window": 128,
    "first_tokens": 128,
    "last_tokens": 128,
    "score_pool": 1,
}


def _fastkv_schedule(keep: float) -> Schedule:
    return Schedule(((FASTKV_DEPTH, keep),))


def _compression(name: str, rule: str, first: int, last: int, depth: float = 0.0) -> Rival:
    return Rival(
        lambda keep: Method(name, None, Compression(rule, keep, first, last, depth)),
        lambda keep: Anew(((depth, keep),)),
        first + last,
    )


RIVALS = (
    Rival(lambda keep: FASTKV, _fastkv_schedule, 8),
    # As in its code, which keeps neither end for sure; and with LazyLLM's.
    _compression("GemFilter", "last query", 0, 0, GEMFILTER_DEPTH),
    _compression("GemFilter, ends kept", "last query", 4, 16, GEMFILTER_DEPTH),
    # The last tokens are those of the question and of a chat template.
    _compression("prompt compression", "surprise", 4, 64),
)
# At the last of them FastKV's first half alone takes more; the second is FastKV's own.
LIKE = (CURVE[2], _fastkv_schedule(0.2), COMPARED)
# Methods of LazyLLM's schedule.
AT_LIKE = tuple(
    method
    for method in METHODS
    if method.name in ("LazyLLM", "as in the paper", "LazyLLM, no revival", "static", "random")
)


def uniprefill() -> list[tuple[Method, Schedule]]:
    """By shares of the attention mass."""
    # Layers 8, 12, ... 28 of 32.
    schedule = ByMass(tuple((n / 8, 0.99) for n in range(2, 8)))
    return [
        (
            Method(f"UniPrefill, {mass}", UNIPREFILL | {"keep_mass": mass}, "UniPrefill"),
            schedule,
        )
        for mass in (0.99, 0.95, 0.9)
    ]


def rivals(
    like: Sequence[Schedule], model: Path, lengths: list[int]
) -> Iterator[tuple[Method, Schedule | None]]:
    """What to run, each at as many operations as ``like``, in turn; schedule None: it cannot be."""
    for schedule in like:
        for method in AT_LIKE:
            yield method, schedule
        for rival in RIVALS:
            equal = at_equal_operations(rival.schedule, schedule, model, lengths, rival.least)
            yield rival.method(equal.cuts[0][1] if equal else 1.0), equal
    yield from uniprefill()
