"""Presets: after which share of a model's layers, which share of the prompt is kept."""

import itertools
import math
import operator
from functools import cache

from lazyllm_vllm.plan.grouping import layers_per_group

# Of the schedules measured, the one whose worst task keeps most, the fastest with the fewest tasks
# under 97% of the full model's score, and the fastest with a mean of 95% (docs/quality.md).
PRESETS: dict[str, tuple[tuple[float, float], ...]] = {
    "conservative": ((1 / 2, 0.5), (2 / 3, 0.2)),
    "balanced": ((1 / 3, 0.5), (2 / 3, 0.2)),
    "aggressive": ((1 / 6, 0.7), (1 / 3, 0.2), (2 / 3, 0.1)),
}
DEFAULT = "conservative"
# In shares of the depth: how far a cut may move; how far it is worth moving to save a KV cache
# group, each of which costs every step time; and how far for as much room in the KV cache as a
# prompt takes, which groups that are not full waste in part.
_FARTHEST, _PER_GROUP, _UNUSED = 0.1, 0.003, 0.2


@cache
def preset_cuts(
    preset: str,
    num_layers: int,
    places: tuple[int, ...] | None = None,
    parked_pages: int = 0,
) -> tuple[tuple[int, float], ...]:
    """``(layer, keep)`` of a preset in a model of ``num_layers`` decoder layers: the cuts near its
    depths that best suit vLLM's KV cache groups. Of cuts on one layer the last one counts.

    Args:
        places: layers after which a cut may be; None: any but the last.
        parked_pages: of hidden states, which take part in stage 0's groups like layers.
    """
    depths, keeps = zip(*PRESETS[preset])

    def near(depth: float) -> list[int]:
        inside = range(1, num_layers) if places is None else places
        layers = [n for n in inside if abs(n / num_layers - depth) <= _FARTHEST]
        return layers or sorted(inside, key=lambda n: abs(n / num_layers - depth))[:1]

    def cost(layers: tuple[int, ...]) -> float:
        moved = max(abs(n / num_layers - depth) for n, depth in zip(layers, depths))
        cuts = dict(zip(layers, keeps))
        stages = [b - a for a, b in itertools.pairwise([0, *cuts, num_layers])]
        stages[0] += parked_pages
        size = layers_per_group(stages)
        groups = [math.ceil(stage / size) for stage in stages]
        shares = (1, *cuts.values())
        taken, used = (sum(map(operator.mul, shares, n)) for n in (groups, stages))
        return moved + _PER_GROUP * sum(groups) + _UNUSED * (taken * size / used - 1)

    choices = itertools.product(*map(near, depths))
    rising = [layers for layers in choices if list(layers) == sorted(layers)]
    return tuple(dict(zip(min(rising, key=cost), keeps)).items()) if rising else ()
