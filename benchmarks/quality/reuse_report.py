"""The table of deep reuse's answers in docs/quality.md, from its results file alone."""

from pathlib import Path

from benchmarks.quality import tables
from benchmarks.quality.methods import REUSES
from benchmarks.quality.report import by_model
from benchmarks.quality.results import REUSE_FILE, Row
from benchmarks.quality.shares import Full, mean_of
from benchmarks.quality.worst import runs
from benchmarks.results import places, read, replace_section, table

_HALVES = ("choosing", "reporting")


def main(page: Path, file: Path = REUSE_FILE) -> None:
    """Rewrite the page's section, which is added at its end if it has none. Nothing is done where
    there is no results file."""
    rows = read(file, Row)
    if rows:
        replace_section(page, "reuse", section(rows), "Answers after others")


def section(rows: list[Row]) -> str:
    """Markdown: a table a model, with a line for each task and half that counts."""
    full, parts = Full(rows), []
    for model, by_part in by_model(rows).items():
        measured = {run.method: run.rows for run in runs(by_part.get("reuse", []))}
        names = [method.name for method in REUSES if method.name in measured]
        lines = []
        for half in _HALVES:
            shares = {name: full.by_task(measured[name], half) for name in names}
            for task in dict.fromkeys(task for of in shares.values() for task in of):
                score = mean_of(by_part["full"], half, task)[0]
                cells = (tables.percent(shares[name][task]) for name in names)
                lines.append((task, half, f"{score:.2f}", *cells))
            means = (tables.percent(full.share(measured[name], half)) for name in names)
            if any(shares.values()):
                lines.append(("all", half, "", *means))
        place = places(by_part["reuse"], "{gpu} ({date}, commit {commit})", " and ")
        parts += [
            f"{model} on {place}, {tables.samples(by_part['reuse'])}:",
            table(("", "samples for", "full model", *(f"`{name}`" for name in names)), lines),
        ]
    return "\n\n".join(
        (
            "Shares of the full model's score, ± the standard error over samples. Asked after "
            "others is the last of four questions about one text, which was sent alone first; in "
            "conversation, the fourth turn of one that began with the text. With `reuse off` an "
            "answer is that of the prompt asked alone. `python -m benchmarks quality reuse` "
            "measures this.",
            *parts,
        )
    )
