"""Samples through one method at one schedule: answers, their scores, agreement with the full model.

Seeds are even for choosing defaults, odd for reporting, so that what is reported was not chosen by.

An engine is given all of its prompts at once, and enough rows a step that every request may revive
what it could alone: the answers are those of a request by itself, however many there are.
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
from benchmarks.quality.tasks.published import Published
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.request_setting import DEEP

AGREEMENT = "agreement on text"
LIKELIEST = 20  # next tokens that vLLM tells of at most, by default
SHORTEST = 512  # tokens of a prompt that is pruned: less than by default, for more tasks
CONTINUED = 16  # tokens of a greedy continuation
REVIVED_ROWS = 16384  # most rows that a step sets aside in a stage

# Of one text: its likeliest next tokens with their log-probabilities, and how it goes on.
Expected = tuple[dict[int, float], list[int]]


@dataclass(frozen=True)
class Cell:
    """A task at a length, the seeds of its samples and which half of all seeds they are of."""

    task: Task | Published
    tokens: int
    seeds: range
    half: str = "choosing"


@dataclass(frozen=True)
class Model:
    """A checkpoint's folder, its tokenizer, how its engine is started.

    What it is asked is made once, however many engines of it are asked.
    """

    path: Path
    tokenizer: object
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
        config, options = method.config, model.options
        if config is not None:
            config = {"min_prompt_tokens": SHORTEST} | config
            if prune is not None:
                config |= {"prune": prune}
            config, options = as_if_alone(config, options)
        arguments = {
            "model": str(model.path),
            "config": config,
            "scorer": method.scorer,
            "options": options,
        }
        self.engine = Engine(start, arguments, "benchmarks.quality.answer", log)
        self.versions = self.engine.ready()

    def scores(self, cells: list[Cell]) -> list[list[float]]:
        """Of each cell, one a seed, 0 to 1."""
        asked = [(cell.task, sample) for cell in cells for sample in self.model.samples(cell)]
        before = [sample.before for _, sample in asked]
        answers = self.engine.run(
            "answers",
            prompts=[sample.prompt for _, sample in asked],
            max_tokens=[task.max_tokens for task, _ in asked],
            stop=list(self.model.tokenizer.all_special_ids),
            before=before if any(before) else None,
        )
        if any(before):
            self._check_reuse(sum(map(bool, before)))
        scores = iter(
            METRICS[task.metric](self.model.tokenizer.decode(tokens), sample.answers)
            for tokens, (task, sample) in zip(answers, asked)
        )
        return [[next(scores) for _ in self.model.samples(cell)] for cell in cells]

    def _check_reuse(self, least: int) -> None:
        """Raises RuntimeError if fewer requests went on from others than those that came after
        some, or any did though the method does without."""
        found = self.engine.run("reuses")
        is_deep = (self.method.config or {}).get("reuse") == DEEP
        if found < least if is_deep else found:
            raise RuntimeError(f"{found} requests went on from others; {least} came after some")

    def expectations(self, texts: list[tuple[int, range]]) -> list[list[Expected]]:
        """What it expects after real text, by (length, seeds)."""
        prompts = [self.model.texts(*of) for of in texts]
        results = iter(
            self.engine.run(
                "expectations",
                prompts=[p for some in prompts for p in some],
                likeliest=LIKELIEST,
                continued=CONTINUED,
            )
        )
        return [[next(results) for _ in some] for some in prompts]

    def share_computed(self) -> float | None:
        """Of all prompts so far; None for the full model."""
        return self.engine.run("share_computed")

    def close(self) -> None:
        self.engine.close()


def as_if_alone(config: dict, options: dict) -> tuple[dict, dict]:
    """LazyLLM's configuration and vLLM's options with which each request of a batch may revive as
    much as it could alone, for which fewer run at once if need be."""
    fields = LazyLLMConfig(**config)
    at_most = min(fields.revive_budget, options["max_model_len"])
    alone = min(at_most, fields.revive_per_request)
    at_once = max(1, min(options["max_num_seqs"], REVIVED_ROWS // max(alone, 1)))
    budget = max(alone * at_once, min(at_most, fields.revive_per_turn))  # which a turn has whole
    config = config | {"revive_budget": budget, "revive_per_request": max(alone, 1)}
    return config, options | {"max_num_seqs": at_once}


def texts(writer: Writer, tokens: int, seeds: Iterable[int]) -> list[list[int]]:
    """Prose and code in turn, cut to so many tokens."""
    prompts = []
    for seed in seeds:
        source = random.Random(f"text {seed} {tokens}")
        if seed // 2 % 2:
            passage = text.code(source, 6 * tokens)
        else:
            passage = "\n\n".join(text.prose(source, 8 * tokens))
        prompts.append(writer.plain(passage)[:tokens])
    return prompts


def agreement(full: list[Expected], other: list[Expected]) -> dict[str, list[float]]:
    """By sample: whether the likeliest next token is the full model's, the KL divergence from it
    in nats, and the share of the full model's continuation that is matched before a difference."""

    def best(expected: dict[int, float]) -> int:
        return max(expected, key=expected.__getitem__)

    def matched(a: list[int], b: list[int]) -> float:
        same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        return same / max(len(a), 1)

    pairs = list(zip(full, other))
    return {
        "top 1": [float(best(a) == best(b)) for (a, _), (b, _) in pairs],
        "KL": [divergence(a, b) for (a, _), (b, _) in pairs],
        "continuation": [matched(a, b) for (_, a), (_, b) in pairs],
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
