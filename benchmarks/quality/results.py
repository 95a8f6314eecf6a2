"""A measured figure of quality."""

from dataclasses import dataclass, field
from pathlib import Path

FILE = Path(__file__).parent / "results" / "quality.jsonl"
REUSE_FILE = FILE.with_name("reuse.jsonl")
LONGER = "longer"  # a part that has the full model's rows, too
SMOLLM2 = "SmolLM2-135M-Instruct"
# Of the checkpoints that ``checkpoints`` makes: folders without the package's version.
_MODELS = {"smollm2-135m-instruct": SMOLLM2, "gemma-3-270m": "Gemma 3 270M"}


@dataclass
class Row:
    """The mean of a task's metric.

    Attributes:
        part: of the benchmark: ``full`` or one of ``run.PARTS``.
        half: of the seeds: ``choosing`` or ``reporting``.
        mean, error: over ``samples`` samples, and its standard error.
        values: one a sample, in the order of their seeds.
        flop_bound: how many times fewer operations than the full model the prefill takes; None:
            that depends on the prompt.
        model: see ``model_name``.
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
    model: str = SMOLLM2  # rows from before there were others do not say

    @property
    def key(self) -> tuple:
        """What no two rows of a file share."""
        of = self.model, self.part, self.method, self.schedule
        return *of, self.task, self.tokens, self.half


def model_name(folder: Path) -> str:
    """What rows call the checkpoint in a folder: by the folder, or as the model is known."""
    name = folder.resolve().name
    return _MODELS.get(name.rpartition("-")[0], name)
