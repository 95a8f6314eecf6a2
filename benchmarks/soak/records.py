"""All that is known of a run."""

from dataclasses import dataclass, field

from benchmarks.soak.client import Ledger
from benchmarks.soak.counts import Count
from benchmarks.soak.watch import Sample


@dataclass
class Records:
    """Attributes:
    counts: of the server beside the clients', and grown: others of its counters, both at the end.
    held: jobs that came while there were too many.
    """

    ledger: Ledger
    samples: list[Sample] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    grown: dict[str, float] = field(default_factory=dict)
    held: int = 0
