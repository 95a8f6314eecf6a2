"""Samples through one method at one schedule: answers, their scores, agreement with the full model.

Seeds are even for choosing defaults, odd for reporting, so that what is reported was not chosen by.
"""

import math
import random
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.engine import Engine
from benchmarks.quality import text
from benchmarks.quality.methods import FULL, Method
from benchmarks.quality.metrics import METRICS
from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.start import start

AGREEMENT = "agreement on text"
LIKELIEST = 20  # next tokens that vLLM tells of at most, by default
SHORTEST = 512  # tokens of a prompt that is pruned: less than by default, for more tasks
CONTINUED = 16  # tokens of a greedy continuation


@dataclass(frozen=True)
class Cell:
    """A task at a length, the seeds of its samples and which half of all seeds they are of."""

    task: Task
    tokens: int
    seeds: range
    half: str = "choosing"


@dataclass(frozen=True)
class Model:
    """A checkpoint's folder, its tokenizer and depth, how its engine is started.

    What it is asked is made once, however many engines of it are asked.
    """

    path: Path
    tokenizer: object
    num_layers: int
    options: dict
    _made: dict = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def samples(self, cell: Cell) -> list[Sample]:
        return self._once(
            cell, lambda: cell.task.samples(cell.seeds, Writer(self.tokenizer), cell.tokens)
        )

    def texts(self, tokens: int, seeds: range) -> list[list[int]]:
        return self._once((tokens, seeds), lambda: texts(Writer(self.tokenizer), tokens, seeds))

    def _once(self, key, make: Callable):
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]


class Evaluation:
    """One engine, open as long as it is asked.

    Args:
        prune: the schedule, as in LazyLLM's configuration; None: that of ``method``, or a preset.
    """

    def __init__(self, model: Model, method: Method, prune: list[dict] | None, log: Path) -> None:
        self.model, self.method = model, method
        config = method.config
        if config is not None:
            config = {"min_prompt_tokens": SHORTEST} | config
            if prune is not None:
                config |= {"prune": prune}
        arguments = {
            "model": str(model.path), "config": config, "scores": method.scores,
            "options": model.options,
        }  # fmt: skip
        self.engine = Engine(start, arguments, "benchmarks.quality.answer", log)
        self.versions = self.engine.ready()

    def scores(self, cell: Cell) -> list[float]:
        """One a seed, 0 to 1."""
        samples = self.model.samples(cell)
        found = self.engine.run(
            "answers", prompts=[s.prompt for s in samples], max_tokens=cell.task.max_tokens,
            stop=list(self.model.tokenizer.all_special_ids),
        )  # fmt: skip
        metric = METRICS[cell.task.metric]
        return [
            metric(self.model.tokenizer.decode(tokens), sample.answers)
            for tokens, sample in zip(found, samples)
        ]

    def expectations(self, tokens: int, seeds: range) -> dict[str, list]:
        """What it expects after real text, and how it goes on."""
        prompts = self.model.texts(tokens, seeds)
        return {
            "next": self.engine.run("next_tokens", prompts=prompts, most=LIKELIEST),
            "goes on": self.engine.run(
                "answers", prompts=prompts, max_tokens=CONTINUED, stop=[]
            ),
        }  # fmt: skip

    def share_computed(self) -> float | None:
        """Of all prompts so far; None for the full model."""
        return self.engine.run("share_computed")

    def close(self) -> None:
        self.engine.close()


def texts(writer: Writer, tokens: int, seeds: Iterable[int]) -> list[list[int]]:
    """Prose and code in turn, cut to so many tokens."""
    prompts = []
    for seed in seeds:
        source = random.Random(f"text {seed} {tokens}")
        if seed // 2 % 2:
            found = text.code(source, 6 * tokens)
        else:
            found = "\n\n".join(text.prose(source, 8 * tokens))
        prompts.append(writer.plain(found)[:tokens])
    return prompts


def agreement(full: dict[str, list], other: dict[str, list]) -> dict[str, list[float]]:
    """By sample: whether the likeliest next token is the full model's, the KL divergence from it
    in nats, and the share of the full model's continuation that is matched before a difference."""

    def best(expected: dict[int, float]) -> int:
        return max(expected, key=expected.__getitem__)

    def matched(a: list[int], b: list[int]) -> float:
        same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        return same / max(len(a), 1)

    pairs = list(zip(full["next"], other["next"]))
    return {
        "top 1": [float(best(a) == best(b)) for a, b in pairs],
        "KL": [divergence(a, b) for a, b in pairs],
        "continuation": [matched(a, b) for a, b in zip(full["goes on"], other["goes on"])],
    }


def divergence(full: dict[int, float], other: dict[int, float]) -> float:
    """KL divergence of the next token's distribution from the full model's, in nats, over the
    full model's likeliest tokens and all the rest as one. What ``other`` does not list is taken
    to be as likely as the least that it lists, so that this bounds the divergence from below."""
    least = min(other.values())
    rest_full = max(1 - sum(map(math.exp, full.values())), 1e-9)
    rest_other = max(1 - sum(math.exp(other.get(t, least)) for t in full), 1e-9)
    listed = sum(math.exp(p) * (p - other.get(t, least)) for t, p in full.items())
    return max(listed + rest_full * math.log(rest_full / rest_other), 0.0)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def choosing(count: int) -> range:
    """Seeds for choosing defaults."""
    return range(0, 2 * count, 2)


def reporting(count: int) -> range:
    """Seeds for reporting them."""
    return range(1, 2 * count, 2)


def open_evaluation(model: Model, method: Method = FULL, prune=None) -> Evaluation:
    """An evaluation with a log of its own in the temporary folder, kept for a look afterwards."""
    return Evaluation(model, method, prune, Path(tempfile.mkstemp(suffix=".log")[1]))
