"""A measured figure of quality."""

from dataclasses import dataclass, field
from pathlib import Path

FILE = Path(__file__).parent / "results" / "quality.jsonl"


@dataclass
class Row:
    """The mean of a task's metric.

    Attributes:
        part: of the benchmark: ``full``, ``sweep``, ``options``, ``revival`` or ``abilities``.
        half: of the seeds: ``choosing`` or ``reporting``.
        mean, error: over ``samples`` samples, and its standard error.
        values: one a sample, in the order of their seeds.
        flop_bound: how many times fewer operations than the full model the prefill takes.
    """

    part: str
    method: str
    schedule: str
    task: str
    tokens: int
    half: str
    mean: float
    error: float
    samples: int
    values: list[float] = field(default_factory=list)
    flop_bound: float | None = None
    environment: dict = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """What no two rows of a file share."""
        return self.part, self.method, self.schedule, self.task, self.tokens, self.half
