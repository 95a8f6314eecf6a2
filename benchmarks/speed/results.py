"""A measured figure of speed."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

FILE = Path(__file__).parent / "results" / "speed.jsonl"


@dataclass
class Row:
    """One figure.

    Attributes:
        benchmark: ``ttft``, ``decode``, ``memory``, ``throughput``, or one of ``shared``'s.
        engine: ``stock``, or the name of a pruning.
        tokens: prompt length; batch: requests.
        median, least, most: of ``runs`` runs, in ``unit``.
        ratio: how many times better than stock, from the same run of the benchmark.
        flop_bound: how many times fewer operations than stock a prefill takes.
        details: further figures.
    """

    benchmark: str
    shape: str
    engine: str
    tokens: int
    batch: int
    unit: str
    median: float
    least: float
    most: float
    runs: int
    ratio: float | None = None
    flop_bound: float | None = None
    details: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """What no two rows of a file share."""
        return self.benchmark, self.shape, self.engine, self.tokens, self.batch

    @classmethod
    def of(cls, results: list[dict], **fields) -> "Row":
        """Of the dicts that a measurement returns."""
        values = [result["value"] for result in results]
        details = {
            name: statistics.median(result[name] for result in results)
            for name in results[0]
            if name != "value"
        }
        return cls(
            median=statistics.median(values),
            least=min(values),
            most=max(values),
            runs=len(values),
            details=details,
            **fields,
        )
