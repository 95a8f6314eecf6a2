"""A measured point: one engine under one load at one rate."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "results" / "loads.jsonl"


@dataclass
class Times:
    """What clients saw.

    Attributes:
        ttfts: seconds to the first token of each request.
        gaps: seconds between one event of a stream and the next, of all requests.
        tokens: that were generated, within so many ``seconds``.
    """

    ttfts: list[float]
    gaps: list[float]
    tokens: int
    seconds: float


@dataclass
class Row:
    """One point.

    Attributes:
        engine: ``stock``, or the name of a pruning.
        rate: what arrives a second: prompts, conversations or questions.
        seconds: for how long they arrived.
        requests: that were answered.
        reuses: requests that went on from others (``reuse: deep``).
        ttft, ttft_p99: mean and 99th percentile of the time to first token, ms.
        gap_p99: of the time between tokens, ms.
        speed: output tokens a second.
    """

    load: str
    shape: str
    engine: str
    rate: float
    seconds: float
    requests: int
    reuses: int
    ttft: float
    ttft_p99: float
    gap_p99: float
    speed: float
    environment: dict = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """What no two rows of a file share."""
        return self.load, self.shape, self.engine, self.rate

    @classmethod
    def of(cls, times: Times, **fields) -> "Row":
        return cls(
            requests=len(times.ttfts),
            ttft=1000 * statistics.mean(times.ttfts),
            ttft_p99=1000 * float(np.percentile(times.ttfts, 99)),
            gap_p99=1000 * float(np.percentile(times.gaps, 99)),
            speed=times.tokens / times.seconds,
            **fields,
        )
