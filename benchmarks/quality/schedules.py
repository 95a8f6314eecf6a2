"""The schedules of the sweep: where to prune, as shares of a model's depth, and what to keep."""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.shapes import flop_bound


@dataclass(frozen=True)
class Schedule:
    """Attributes:
    cuts: ``(depth, keep)``: after this share of the layers, that share of the prompt.
    """

    cuts: tuple[tuple[float, float], ...]

    @property
    def name(self) -> str:
        return ", ".join(f"{keep:g} after {depth:.2f}" for depth, keep in self.cuts)

    def prune(self, num_layers: int) -> list[dict]:
        """As in LazyLLM's configuration."""
        return [{"layer": round(d * num_layers), "keep": keep} for d, keep in self.cuts]

    def flop_bound(self, model: Path, num_tokens: int) -> float:
        """How many times fewer operations than the full model a prefill takes."""
        shape = json.loads((model / "config.json").read_text())
        cuts = self.prune(shape["num_hidden_layers"])
        return flop_bound(shape, tuple((c["layer"], c["keep"]) for c in cuts), num_tokens)


def _schedules(*cuts: tuple[tuple[float, float], ...]) -> tuple[Schedule, ...]:
    return tuple(Schedule(each) for each in cuts)


# Those that every method is run at, from the mildest.
CURVE = _schedules(
    ((2 / 3, 0.3),),
    ((1 / 2, 0.3),),
    ((1 / 3, 0.5),),
    ((1 / 3, 0.3),),
    ((1 / 3, 0.3), (2 / 3, 0.1)),
    ((1 / 5, 0.3), (1 / 2, 0.1)),
)
COMPARED = CURVE[4]  # where methods and options are compared
# Those that LazyLLM is run at: one, two and three cuts.
SWEEP = CURVE + _schedules(
    ((1 / 2, 0.7), (2 / 3, 0.4)),
    ((1 / 3, 0.7), (2 / 3, 0.5)),
    ((1 / 3, 0.7), (2 / 3, 0.3)),
    ((1 / 2, 0.5), (2 / 3, 0.2)),
    ((1 / 2, 0.1),),
    ((1 / 3, 0.5), (2 / 3, 0.2)),
    ((1 / 3, 0.5), (1 / 2, 0.25)),
    ((1 / 5, 0.7), (1 / 3, 0.5), (2 / 3, 0.2)),
    ((1 / 3, 0.4), (2 / 3, 0.05)),
    ((1 / 3, 0.2),),
    ((1 / 3, 0.3), (1 / 2, 0.15)),
    ((1 / 3, 0.3), (2 / 3, 0.05)),
    ((1 / 5, 0.7), (1 / 3, 0.4), (2 / 3, 0.1)),
    ((1 / 3, 0.2), (2 / 3, 0.1)),
    ((1 / 5, 0.5), (1 / 3, 0.4), (2 / 3, 0.1)),
    ((1 / 5, 0.7), (1 / 3, 0.3), (2 / 3, 0.1)),
    ((1 / 5, 0.5), (1 / 3, 0.3), (2 / 3, 0.1)),
    ((1 / 5, 0.4), (1 / 3, 0.3), (2 / 3, 0.1)),
    ((1 / 5, 0.5), (1 / 3, 0.2), (2 / 3, 0.1)),
    ((1 / 5, 0.5), (1 / 3, 0.2), (2 / 3, 0.05)),
    ((1 / 5, 0.4), (1 / 3, 0.2), (2 / 3, 0.05)),
    ((1 / 5, 0.3), (1 / 3, 0.2), (2 / 3, 0.1)),
    ((1 / 5, 0.3), (1 / 3, 0.15), (2 / 3, 0.05)),
    ((1 / 6, 0.7), (1 / 3, 0.4), (2 / 3, 0.1)),
    ((1 / 6, 0.7), (1 / 3, 0.3), (2 / 3, 0.1)),
    ((1 / 6, 0.7), (1 / 3, 0.2), (2 / 3, 0.1)),
    ((1 / 6, 0.5), (1 / 3, 0.4), (2 / 3, 0.1)),
    ((1 / 6, 0.5), (1 / 3, 0.3), (2 / 3, 0.1)),
    ((1 / 6, 0.5), (1 / 3, 0.2), (2 / 3, 0.1)),
    ((1 / 6, 0.5), (1 / 3, 0.2), (2 / 3, 0.05)),
    ((1 / 6, 0.4), (1 / 3, 0.2), (2 / 3, 0.1)),
    ((1 / 6, 0.4), (1 / 3, 0.2), (2 / 3, 0.05)),
)
