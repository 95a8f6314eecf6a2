"""What a run leaves: one results file, rewritten every minute, a plot, and lines on the screen."""

import json
import sys
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Console

from benchmarks import results
from benchmarks.soak import plot
from benchmarks.soak.client import FAILED, FINISHED, LEFT
from benchmarks.soak.records import Records
from benchmarks.soak.verdict import Finding, is_good
from benchmarks.soak.watch import Sample, gpu_name
from lazyllm_vllm.cli.whole_file import write_whole

_MARKS = {True: "[green]good[/]", False: "[red]bad[/]", None: "[dim]-[/]"}


class Report:
    """Args:
    file: the results file; arguments: of the run; commit: as in ``results.environment``.
    """

    def __init__(self, file: Path, arguments: dict, commit: str | None) -> None:
        self.file, self.arguments = file, arguments
        self.console = Console(width=150, highlight=False)
        import vllm

        versions = {"gpu": gpu_name(), "vllm": vllm.__version__, "python": sys.version.split()[0]}
        self.environment = results.environment(versions, commit)

    def line(self, records: Records, minutes: float) -> None:
        """One line of how it goes."""
        ended, last = records.ledger.ended, records.samples[-1] if records.samples else None
        text = f"{minutes:5.1f} min  " + ", ".join(f"{ended[e]:,} {e}" for e in _ENDS)
        if last is not None:
            gpu = "no GPU" if last.gpu is None else f"{last.gpu:,.0f} MiB GPU"
            text += f"  {last.running:.0f} running, {last.waiting:.0f} waiting, "
            text += f"{last.kv_cache:.0%} of the KV cache, {last.host:,.0f} MiB host, {gpu}"
        self.console.print(text)

    def show(self, findings: list[Finding]) -> None:
        for one in findings:
            self.console.print(f"{_MARKS[one.is_good]:18} {one.name}: ", end="")
            self.console.print(one.why, markup=False)
        self.console.print(f"{'good' if is_good(findings) else 'bad'}: {self.file}")

    def write(self, records: Records, minutes: float, findings: list[Finding]) -> None:
        """Args:
        minutes: of load so far.
        """
        ledger = records.ledger
        columns = [field.name for field in fields(Sample)]
        told = {
            "environment": self.environment,
            "arguments": self.arguments,
            "minutes_run": round(minutes, 2),
            "is_good": is_good(findings),
            "findings": [asdict(one) for one in findings],
            "sums": _sums(records),
            "requests": {f"{kind}, {end}": n for (kind, end), n in sorted(ledger.kinds.items())},
            "errors": dict(ledger.errors),
            "counters": [asdict(one) for one in records.counts],
            "grown": records.grown,
            "first and last fifth": ledger.latencies.first_and_last(),
            "minutes": ledger.latencies.by_bin(),
            "samples": {
                "columns": columns,
                "rows": [[getattr(one, name) for name in columns] for one in records.samples],
            },
        }
        try:
            write_whole(self.file, _dump(told))
        except OSError as error:  # the load goes on, and the next minute may have room
            self.console.print(f"{self.file} is not written: {error.strerror}")

    def draw(self) -> None:
        """The plot, from the results file."""
        try:
            plot.draw(json.loads(self.file.read_text()), self.file.with_name(plot.PLOT))
        except ImportError:
            self.console.print("no plot: matplotlib is not installed")


_ENDS = (FINISHED, LEFT, FAILED)


def _sums(records: Records) -> dict:
    """Of the whole run. Tokens are those that clients sent and saw."""
    sent, samples = records.ledger.sent, records.samples
    settings = Counter(json.dumps(dict(one.setting)) for one in sent)
    busy = [one.running for one in samples]
    return {
        "requests": len(sent),
        **{end: records.ledger.ended[end] for end in _ENDS},
        "prompt_tokens": sum(one.num_prompt for one in sent),
        "generation_tokens": sum(one.said for one in sent),
        "held_back": records.held,
        "running_mean": round(sum(busy) / len(busy), 1) if busy else 0.0,
        "preemptions": int(samples[-1].preemptions - samples[0].preemptions) if samples else 0,
        "settings": dict(settings),
    }


def _dump(told: dict) -> str:
    """JSON with a line for each sample, minute and finding."""
    lines = []
    for name, value in told.items():
        if isinstance(value, list):
            value = ",\n  ".join(map(json.dumps, value))
            lines.append(f'"{name}": [\n  {value}\n]')
        elif name == "samples":
            rows = ",\n  ".join(map(json.dumps, value["rows"]))
            columns = json.dumps(value["columns"])
            lines.append(f'"{name}": {{"columns": {columns}, "rows": [\n  {rows}\n]}}')
        else:
            lines.append(f'"{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"
