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


# One, two and three cuts, from the mildest: in SmolLM2's shape at 2,000 tokens a prefill takes 1.2
# to 3.1 times fewer operations than the full model's.
SWEEP = tuple(
    Schedule(cuts)
    for cuts in (
        ((0.75, 0.5),),
        ((0.67, 0.5),),
        ((0.5, 0.7), (0.75, 0.5)),
        ((0.5, 0.5),),
        ((0.5, 0.5), (0.75, 0.25)),
        ((0.5, 0.3),),
        ((0.27, 0.5),),
        ((0.27, 0.7), (0.5, 0.5), (0.75, 0.3)),
        ((0.5, 0.3), (0.75, 0.1)),
        ((0.27, 0.6), (0.5, 0.4)),
        ((0.33, 0.3),),
        ((0.27, 0.5), (0.5, 0.25)),
        ((0.27, 0.5), (0.5, 0.3), (0.75, 0.15)),
        ((0.27, 0.3),),
        ((0.27, 0.3), (0.5, 0.1)),
        ((0.27, 0.1),),
    )
)
