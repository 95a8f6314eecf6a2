"""The schedules of the sweep: where to prune, as shares of a model's depth, and what to keep."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lazyllm_vllm.plan.operations import flops, full_layers


@dataclass(frozen=True)
class Schedule:
    """Attributes:
    cuts: ``(depth, keep)``: after this share of the layers, that share of the prompt.
    """

    cuts: tuple[tuple[float, float], ...]

    @property
    def name(self) -> str:
        return ", ".join(f"{keep:g} after {depth:.2f}" for depth, keep in self.cuts)

    def prune(self, num_layers: int, places: tuple[int, ...] | None = None) -> list[dict]:
        """As in LazyLLM's configuration.

        Args:
            places: layers after which a cut may be, of which each takes the nearest; of two on one
                the later one counts. None: any.
        """
        cuts = {}
        for depth, keep in self.cuts:
            layer = round(depth * num_layers)
            if places is not None:
                layer = min(places, key=lambda place: abs(place - depth * num_layers))
            cuts[layer] = keep
        return [{"layer": layer, "keep": keep} for layer, keep in cuts.items()]

    def prune_in(self, model: Path) -> list[dict]:
        """The same for the model in a folder, whose layers with a sliding window end no stage."""
        shape = _shape(model)
        layers, full = shape["num_hidden_layers"], full_layers(shape)
        return self.prune(layers, full and tuple(n for n in full if n < layers))

    def operations(self, model: Path, num_tokens: int) -> float:
        """Floating-point operations of a prefill."""
        shape, cuts = _shape(model), self.prune_in(model)
        return flops(shape, tuple((c["layer"], c["keep"]) for c in cuts), num_tokens)

    def flop_bound(self, model: Path, num_tokens: int) -> float | None:
        """How many times fewer operations than the full model a prefill takes; None: that depends
        on the prompt."""
        return flops(_shape(model), (), num_tokens) / self.operations(model, num_tokens)


@dataclass(frozen=True)
class ByMass(Schedule):
    """Keeps are the most; how much it is follows each prompt (``keep_mass``)."""

    @property
    def name(self) -> str:
        return "by mass, at most " + super().name

    def flop_bound(self, model: Path, num_tokens: int) -> None:
        return None


@dataclass(frozen=True)
class Anew(Schedule):
    """``keep`` of the prompt is chosen after ``depth`` of the layers, and all layers run on that
    alone, from the first; what chooses before the first layer costs nothing. One cut."""

    @property
    def name(self) -> str:
        ((depth, keep),) = self.cuts
        return f"{keep:g} anew after {depth:.2f}"

    def prune(self, num_layers: int, places: tuple[int, ...] | None = None) -> list[dict]:
        """The engine drops nothing."""
        return []

    def operations(self, model: Path, num_tokens: int) -> float:
        shape = _shape(model)
        ((depth, keep),) = self.cuts
        chosen_after = round(depth * shape["num_hidden_layers"])
        chosen = flops(shape, ((chosen_after, 0.0),), num_tokens)
        return chosen + flops(shape, (), keep * num_tokens) - flops(shape, (), 0)  # one head


def at_equal_operations(
    make: Callable[[float], Schedule],
    like: Schedule,
    model: Path,
    lengths: list[int],
    least: int = 0,
) -> Schedule | None:
    """``make(keep)`` with the keep at which prompts of these lengths take as many operations, all
    together, as by ``like``. None: there is none, even if all but ``least`` tokens are dropped, or
    no token is.

    Args:
        make: operations rise with its keep.
    """

    def operations(schedule: Schedule) -> float:
        return sum(schedule.operations(model, n) for n in lengths)

    wanted = operations(like)
    low, high = least / min(lengths), 1.0
    if not operations(make(low)) <= wanted <= operations(make(high)):
        return None
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if operations(make(middle)) <= wanted else (low, middle)
    return make(high)


def _shape(model: Path) -> dict:
    return json.loads((model / "config.json").read_text())


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
# What is kept at most where that follows the prompt.
MOST = (
    ByMass(((1 / 3, 0.7), (2 / 3, 0.5))),
    ByMass(((1 / 6, 0.8), (1 / 3, 0.5), (2 / 3, 0.3))),
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
    ((1 / 2, 0.2),),
)
