"""Several engines at once: rows as they come, in an order that does not depend on who was first."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import results
from benchmarks.quality import evaluate
from benchmarks.quality.evaluate import AGREEMENT, Cell, Evaluation, Expected, Model
from benchmarks.quality.methods import FULL, Method
from benchmarks.quality.results import Row, model_name
from benchmarks.quality.schedules import Schedule

COMPUTED = "share of the prompts computed"


@dataclass(frozen=True)
class Job:
    """What one engine is asked. A job without ``agreement`` answers the tasks alone."""

    part: str
    method: Method
    schedule: Schedule | None = None
    agreement: bool = True

    @property
    def label(self) -> str:
        return ", ".join(
            [f"{self.part}: {self.method.name}"] + ([self.schedule.name] if self.schedule else [])
        )


@dataclass(frozen=True)
class Setting:
    """What all jobs of a run share.

    Attributes:
        halves: of the seeds, by name: those of the texts to agree on.
        out: the results file; what it has of other jobs is kept.
        commit: None: what git says.
    """

    model: Model
    cells: list[Cell]
    lengths: list[int]
    halves: dict[str, range]
    out: Path
    commit: str | None = None


class Jobs:
    """Run once, by ``run``. A job with agreement needs one of the full model's before it."""

    def __init__(
        self,
        jobs: list[Job],
        setting: Setting,
        open_evaluation: Callable[..., Evaluation] = evaluate.open_evaluation,
    ) -> None:
        self.jobs, self.setting, self.open_evaluation = jobs, setting, open_evaluation
        self._before: list[Row] = results.read(setting.out, Row)
        self._found: list[list[Row]] = [[] for _ in jobs]
        self._lock = threading.Lock()
        self._expected: Future = Future()  # the full model's, by half and length
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(width=160),
        )

    def run(self, at_once: int) -> dict[str, Exception]:
        """Errors by label, of the jobs that failed; the others' rows are kept all the same."""
        failed: dict[str, Exception] = {}
        with self._progress, ThreadPoolExecutor(at_once) as pool:
            bar = self._progress.add_task("engines", total=len(self.jobs))

            def one(index: int) -> None:
                try:
                    self._run(index)
                except Exception as error:
                    failed[self.jobs[index].label] = error
                finally:
                    self._progress.advance(bar)

            list(pool.map(one, range(len(self.jobs))))
        return failed

    def _run(self, index: int) -> None:
        job, model = self.jobs[index], self.setting.model
        prune = job.schedule.prune_in(model.path) if job.schedule else None
        try:
            evaluation = self.open_evaluation(model, job.method, prune)
            try:
                mine = self._expectations(job, evaluation)  # first, since others wait for them
                cells = self.setting.cells
                for cell, scores in zip(cells, evaluation.scores(cells)):
                    self._add(index, evaluation, cell.task.name, cell.tokens, cell.half, scores)
                if (share := evaluation.share_computed()) is not None:
                    self._add(index, evaluation, COMPUTED, 0, "both", [share])
                self._agreement(index, evaluation, mine)
            finally:
                evaluation.close()
                self._write()
        except Exception as error:
            if _expects(job) and not self._expected.done():
                self._expected.set_exception(error)
            raise

    def _expectations(
        self, job: Job, evaluation: Evaluation
    ) -> dict[tuple[str, int], list[Expected]]:
        """By half and length; none for a job without agreement."""
        if not job.agreement:
            return {}
        halves = self.setting.halves
        places = [(half, tokens) for half in halves for tokens in self.setting.lengths]
        answers = evaluation.expectations([(tokens, halves[half]) for half, tokens in places])
        mine = dict(zip(places, answers))
        if _expects(job):
            self._expected.set_result(mine)
        return mine

    def _agreement(
        self, index: int, evaluation: Evaluation, mine: dict[tuple[str, int], list[Expected]]
    ) -> None:
        for (half, tokens), answers in mine.items():
            full = self._expected.result()[half, tokens]
            for name, values in evaluate.agreement(full, answers).items():
                self._add(index, evaluation, f"{AGREEMENT}: {name}", tokens, half, values)

    def _add(
        self,
        index: int,
        evaluation: Evaluation,
        task: str,
        tokens: int,
        half: str,
        values: list[float],
    ) -> None:
        job, setting = self.jobs[index], self.setting
        schedule = job.schedule
        is_count = task == COMPUTED  # not a sample: no error
        mean, error = (values[0], 0.0) if is_count else evaluate.mean_and_error(values)
        bound = None
        if schedule and not is_count:
            bound = schedule.flop_bound(setting.model.path, tokens)
        row = Row(
            model=model_name(setting.model.path),
            part=job.part,
            method=job.method.name,
            schedule=schedule.name if schedule else "",
            task=task,
            tokens=tokens,
            half=half,
            mean=mean,
            error=error,
            samples=len(values),
            values=[round(value, 4) for value in values],
            flop_bound=bound,
            environment=results.environment(evaluation.versions, setting.commit),
        )
        with self._lock:
            self._found[index].append(row)
        self._progress.console.print(
            f"{job.label:58} {task:32} {tokens:>6,} {mean:6.3f} +- {error:.3f}", highlight=False
        )

    def _write(self) -> None:
        """All rows so far, and of those before what none of them replaces."""
        with self._lock:
            new = [row for rows in self._found for row in rows]
            keys = {row.key for row in new}
            old = [row for row in self._before if row.key not in keys]
            results.write(self.setting.out, old + new)


def _expects(job: Job) -> bool:
    """Whether the other jobs' agreement is with this one."""
    return job.method is FULL and job.agreement
