"""Results files: JSON lines, one for each figure, with all that it depends on."""

import json
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from lazyllm_vllm.cli.whole_file import write_whole

PLACE = "{gpu}, vLLM {vllm}, torch {torch}, Triton {triton}; {date}, commit {commit}."


def environment(versions: dict, commit: str | None) -> dict:
    """Versions, date and commit, for every row of a run."""
    return {**versions, "date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit or _commit()}


@cache
def _commit() -> str:
    """Asked once a run: writing the results file changes the tree."""
    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    answer = subprocess.run(asked, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def places(rows: list, form: str = f"One {PLACE}", between: str = " ") -> str:
    """Where and when rows were measured, each place once.

    Args:
        form: of a place, with names of a row's environment.
    """
    return between.join(dict.fromkeys(form.format(**row.environment) for row in rows))


def write(path: Path, rows: list) -> None:
    """Rows are dataclasses. If it fails the file is as before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows))


def read(path: Path, kind: type) -> list:
    """Rows of the dataclass ``kind``; none if there is no file."""
    if not path.exists():
        return []
    return [kind(**json.loads(line)) for line in path.read_text().splitlines()]


def replace_section(page: Path, name: str, text: str, heading: str | None = None) -> None:
    """Put the text between the page's marks for ``name``; without marks, given a heading, at the
    page's end under it."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = page.read_text()
    if heading and begin not in old:
        old += f"\n## {heading}\n\n{begin}\n{end}\n"
    before, rest = old.split(begin)
    after = rest.split(end)[1]
    write_whole(page, f"{before}{begin}\n{text}\n{end}{after}")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(title: str):
    """A small plot's figure and axes; saved, it is the same file every time."""
    plot, (axes,) = _plot(title, (6.4, 3.6))
    axes.set_title(title, fontsize=10)
    return plot, axes


def panels(title: str, count: int):
    """The same with several axes side by side."""
    plot, axes = _plot(title, (3.6 * count, 3.6), ncols=count)
    plot.suptitle(title, fontsize=10)
    return plot, axes


def stack(title: str, count: int):
    """The same with several axes one above the other, with one x axis; the title is not shown."""
    return _plot(title, (7, 1.8 * count), nrows=count, sharex=True)


def _plot(title: str, size: tuple[float, float], **places):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = title
    from matplotlib.figure import Figure

    plot = Figure(figsize=size, layout="constrained")
    axes = plot.subplots(squeeze=False, **places).ravel()
    for each in axes:
        for side in ("top", "right"):
            each.spines[side].set_visible(False)
    return plot, axes
