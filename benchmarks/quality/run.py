"""Run the quality benchmarks and write their results file."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks import results
from benchmarks.cpu import use_cpu_settings
from benchmarks.quality import evaluate
from benchmarks.quality.evaluate import AGREEMENT, Cell, Evaluation, Model
from benchmarks.quality.methods import FULL, LAZYLLM, METHODS, Method
from benchmarks.quality.results import FILE, Row
from benchmarks.quality.schedules import SWEEP, Schedule
from benchmarks.quality.tasks import TASKS

PARTS = ("abilities", "methods", "sweep", "revival", "presets")
HALVES = {"choosing": evaluate.choosing, "reporting": evaluate.reporting}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="all if none")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder; SmolLM2-135M if none")
    parser.add_argument("--samples", type=int, default=100, help="of each task at each length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--half", choices=HALVES, default="choosing", help="which seeds")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=FILE, help="the results file")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")


def main(args: argparse.Namespace) -> None:
    """Raises SystemExit for a part that there is not."""
    if unknown := set(args.parts) - set(PARTS):
        raise SystemExit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    use_cpu_settings()  # for the engines' processes, before anything imports Triton there
    bench = Bench(args)
    for part in args.parts or PARTS:
        getattr(bench, part)()


class Bench:
    """One run: a model, the cells of its tasks, rows as they come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = _model(args)
        seeds = HALVES[args.half](args.samples)
        self.cells = [Cell(TASKS[t], n, seeds) for t in args.tasks for n in args.lengths]
        self.rows: list[Row] = results.read(args.out, Row)
        self.console = Console(width=140)
        self._expected: dict[int, dict] = {}

    def abilities(self) -> None:
        """The full model alone, up to lengths where it breaks."""
        self._evaluate("abilities", FULL, None)

    def methods(self) -> None:
        """Every method at one schedule."""
        self._baseline()
        for method in METHODS[1:]:
            self._evaluate("methods", method, SWEEP[len(SWEEP) // 2])

    def sweep(self) -> None:
        """LazyLLM and the other ways at every schedule."""
        self._baseline()
        for schedule in SWEEP:
            for method in METHODS[1:]:
                if method is LAZYLLM or method.scores != "attention":
                    self._evaluate("sweep", method, schedule)

    def revival(self) -> None:
        """What revival buys."""
        self._baseline()
        for budget in (0, 16, 64, 4096):
            config = {"revive_budget": budget, "revive_per_request": max(budget, 1)}
            if budget == 4096:
                config["revive_reserve"] = 1.0
            method = Method(f"revive_budget {budget}", config)
            self._evaluate("revival", method, SWEEP[len(SWEEP) // 2])

    def presets(self) -> None:
        """The presets as they are."""
        self._baseline()
        for preset in ("conservative", "balanced", "aggressive"):
            self._evaluate("presets", Method(preset, {"preset": preset}), None)

    def _baseline(self) -> None:
        if not self._expected:
            self._evaluate("full", FULL, None)

    def _evaluate(self, part: str, method: Method, schedule: Schedule | None) -> None:
        layers = self.model.num_layers
        prune = schedule.prune(layers) if schedule else None
        evaluation = evaluate.open_evaluation(self.model, method, prune)
        label = f"{part}: {method.name}" + (f", {schedule.name}" if schedule else "")
        try:
            for cell in track(self.cells, description=label, console=self.console):
                scores = evaluation.scores(cell)
                self._add(part, method, schedule, evaluation, cell.task.name, cell.tokens, scores)
            if part != "abilities":
                self._agreement(part, method, schedule, evaluation)
        finally:
            evaluation.close()

    def _agreement(self, part, method, schedule, evaluation) -> None:
        seeds = HALVES[self.args.half](self.args.samples)
        for tokens in self.args.lengths:
            expected = evaluation.expectations(tokens, seeds)
            if method is FULL:
                self._expected[tokens] = expected
            found = evaluate.agreement(self._expected[tokens], expected)
            for name, values in found.items():
                task = f"{AGREEMENT}: {name}"
                self._add(part, method, schedule, evaluation, task, tokens, values)

    def _add(
        self, part: str, method: Method, schedule: Schedule | None, evaluation: Evaluation,
        task: str, tokens: int, values: list[float],
    ) -> None:  # fmt: skip
        mean, error = evaluate.mean_and_error(values)
        row = Row(
            part=part, method=method.name, schedule=schedule.name if schedule else "",
            task=task, tokens=tokens, half=self.args.half, mean=mean, error=error,
            samples=len(values),
            flop_bound=schedule.flop_bound(self.model.path, tokens) if schedule else None,
            environment=results.environment(evaluation.versions, self.args.commit),
        )  # fmt: skip
        self.rows = [old for old in self.rows if old.key != row.key] + [row]
        results.write(self.args.out, self.rows)
        self.console.print(f"{task:36} {tokens:>6,} {mean:6.3f} +- {error:.3f}")


def _model(args: argparse.Namespace) -> Model:
    from transformers import AutoConfig, AutoTokenizer

    from benchmarks.smollm2 import checkpoint

    path = args.model or checkpoint()
    longest = int(1.2 * max(args.lengths)) + 64
    options = {
        "dtype": args.dtype, "max_model_len": longest, "max_num_seqs": 64,
        "enforce_eager": True, "max_logprobs": evaluate.LIKELIEST,
    }  # fmt: skip
    layers = AutoConfig.from_pretrained(path).num_hidden_layers
    return Model(path, AutoTokenizer.from_pretrained(path), layers, options)
