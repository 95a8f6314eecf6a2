"""Times to the first token and between tokens, by when they were measured."""

from array import array
from collections import defaultdict

import numpy as np

BINS = 25  # of a run, one a minute of 25 minutes
FIFTH = BINS // 5


class Latencies:
    """Of a run of ``span`` seconds; what comes after it is in the last bin."""

    def __init__(self, span: float) -> None:
        self.span = span
        self._first: dict[str, list[array]] = defaultdict(_bins)
        self._next = _bins()

    def first_token(self, kind: str, at: float, seconds: float) -> None:
        self._first[kind][self._bin(at)].append(seconds)

    def next_tokens(self, at: float, seconds: float, num_tokens: int) -> None:
        """So many tokens that came together, so long after the one before."""
        self._next[self._bin(at)].extend([seconds / num_tokens] * num_tokens)

    def _bin(self, at: float) -> int:
        return min(max(int(at / self.span * BINS), 0), BINS - 1)

    def by_bin(self) -> list[dict]:
        """For each bin its end, in minutes, and the ``summary`` of both times."""
        return [
            {
                "minutes": round(self.span / 60 * (i + 1) / BINS, 2),
                "ttft": summary(self._of_first(i, i + 1)),
                "itl": summary(self._next[i]),
            }
            for i in range(BINS)
        ]

    def first_and_last(self) -> dict[str, list[dict | None]]:
        """Summaries of the first fifth and of the last: of times to the first token over all kinds,
        and of each kind, and of times between tokens."""
        ends = (0, FIFTH), (BINS - FIFTH, BINS)
        found = {"ttft": [summary(self._of_first(*end)) for end in ends]}
        found["itl"] = [summary(_together(self._next[slice(*end)])) for end in ends]
        for kind in sorted(self._first):
            found[f"ttft, {kind}"] = [summary(self._of_first(*end, kind)) for end in ends]
        return found

    def _of_first(self, begin: int, end: int, kind: str | None = None) -> np.ndarray:
        kinds = self._first if kind is None else (kind,)
        return _together([part for each in kinds for part in self._first[each][begin:end]])


def _bins() -> list[array]:
    return [array("f") for _ in range(BINS)]


def _together(parts: list[array]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=float) for part in parts] or [[]])


def summary(seconds) -> dict | None:
    """How many, and their median and 99th percentile in ms; None: there are none."""
    if not len(seconds):
        return None
    median, p99 = np.percentile(np.asarray(seconds, dtype=float), (50, 99)) * 1000
    return {"count": len(seconds), "median": round(median, 2), "p99": round(p99, 2)}
