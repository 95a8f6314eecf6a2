"""Whether a run is good, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.soak.counts import Count
from benchmarks.soak.watch import Sample

# MiB an hour by which memory may grow, after the first fifth.
MOST_HOST, MOST_GPU = 400, 200
# How much slower the last fifth may be than the first.
MOST_MEDIAN, MOST_P99 = 1.25, 1.6
# In a shorter run nothing is said of either; with fewer values in a fifth of it nothing of latency,
# or of a 99th percentile; with fewer samples nothing of memory.
_LEAST_SECONDS, _LEAST_VALUES, _LEAST_FOR_P99, _LEAST_SAMPLES = 600, 50, 500, 20


@dataclass(frozen=True)
class Finding:
    """Attributes:
    is_good: None: there is too little to say.
    """

    name: str
    is_good: bool | None
    why: str


def slope(at: Sequence[float], values: Sequence[float]) -> float:
    """Growth an hour of what was measured at so many seconds, by least squares."""
    return float(np.polyfit(np.asarray(at) / 3600, values, 1)[0])


def memory(samples: list[Sample]) -> list[Finding]:
    """Of the samples after the first fifth of the time."""
    span = samples[-1].at if samples else 0.0
    late = [one for one in samples if one.at >= span / 5]
    found = []
    for what, limit in (("host", MOST_HOST), ("gpu", MOST_GPU)):
        values = [getattr(one, what) for one in late]
        if None in values:
            found.append(Finding(f"{what} memory", None, "there is none"))
            continue
        if len(values) < 2:
            found.append(Finding(f"{what} memory", None, "no samples"))
            continue
        grows = slope([one.at for one in late], values)
        why = f"{grows:+.1f} MiB an hour, from {values[0]:,.0f} to {values[-1]:,.0f} MiB"
        enough = len(values) >= _LEAST_SAMPLES and span >= _LEAST_SECONDS
        why += "" if enough else "; too short a run to judge"
        found.append(Finding(f"{what} memory", grows <= limit if enough else None, why))
    return found


def latency(ends: dict[str, list[dict | None]], seconds: float) -> list[Finding]:
    """Args:
    ends: ``Latencies.first_and_last``; seconds: of the run.
    """
    found = []
    for what in ("ttft", "itl"):
        first, last = ends[what]
        count = min(one["count"] if one else 0 for one in (first, last))
        if count < _LEAST_VALUES or seconds < _LEAST_SECONDS:
            found.append(Finding(what, None, f"{count} values in a fifth of {seconds:.0f} s"))
            continue
        limits = {"median": MOST_MEDIAN} | ({"p99": MOST_P99} if count >= _LEAST_FOR_P99 else {})
        is_good = all(last[of] <= first[of] * most for of, most in limits.items())
        why = ", ".join(f"{of} {first[of]} then {last[of]} ms" for of in ("median", "p99"))
        found.append(Finding(what, is_good, why))
    return found


def counters(counts: list[Count]) -> Finding:
    wrong = [one for one in counts if not one.is_right]
    why = f"{len(counts)} counters agree with what was sent"
    if wrong:
        why = "; ".join(f"{c.name} {c.counted:g}, not {c.least:g} .. {c.most:g}" for c in wrong)
    return Finding("counters", bool(counts) and not wrong, why if counts else "not read")


def nothing(name: str, found: Sequence[str]) -> Finding:
    """Good if nothing of this was found."""
    why = "none" if not found else f"{len(found)}: " + "; ".join(found[:5])
    return Finding(name, not found, why)


def is_good(findings: list[Finding]) -> bool:
    return all(one.is_good is not False for one in findings)
