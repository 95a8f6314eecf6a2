"""What is told of the quality results, by hand and of the committed file."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import pytest

from benchmarks.quality import evaluate, report
from benchmarks.quality.methods import FULL, LAZYLLM
from benchmarks.quality.results import FILE, Row, model_name
from benchmarks.quality.shares import Full, mean_of, same_samples
from benchmarks.quality.worst import preset_schedule, runs, worst
from benchmarks.results import read
from lazyllm_vllm.plan.presets import DEFAULT, PRESETS


def row(part, values, task="easy", tokens=10, half="choosing", **fields):
    method = FULL.name if part == "full" else LAZYLLM.name
    mean, error = evaluate.mean_and_error(values)
    return Row(part, method, "", task, tokens, half, mean, error, len(values), values, **fields)


def test_shares_of_the_full_model_by_hand():
    """The error is that of the differences: samples that both get wrong make none."""
    rows = [
        row("full", [1, 1, 1, 0]),
        row("full", [1, 0, 0, 0], "hard"),
        row("sweep", [1, 1, 1, 0]),
        row("sweep", [1, 1, 1, 1], "hard"),
    ]
    full = Full(rows)
    assert full.share(rows[2:], "choosing") == (1, 0), "what the full model cannot do is left out"
    assert all(math.isnan(x) for x in full.share(rows[2:], "choosing", "hard"))
    assert Full(rows, least=0.2).share(rows[2:], "choosing", "hard")[0] == 4
    worse, error = full.share([row("sweep", [1, 0, 1, 0])], "choosing")
    assert worse == pytest.approx(2 / 3)
    differences = [1 / 3, -2 / 3, 1 / 3, 0]
    variance = sum(d * d for d in differences) / 3
    assert error == pytest.approx(math.sqrt(variance / 4) / 0.75)


def test_a_cell_counts_by_both_halves_of_its_own_model():
    """Half of it right in one half and a quarter in the other: under a half together."""
    rows = [
        row("full", [1, 1, 0, 0], half="choosing"),
        row("full", [1, 0, 0, 0], half="reporting"),
        row("full", [1, 1, 0, 0], half="choosing", tokens=20),
        row("full", [1, 1, 1, 0], half="reporting", tokens=20),
    ]
    full = Full(rows)
    assert [full.counts(r) for r in rows] == [False, False, True, True]
    assert not full.counts(replace(rows[2], model="another"))
    assert not full.counts(row("sweep", [1], tokens=20)), "one sample has no standard error"


def test_shares_are_over_the_samples_that_both_have():
    """Whichever of them has more."""
    full = Full([row("full", [1, 0, 1, 1])])
    assert full.share([row("sweep", [1, 0])], "choosing") == (1, 0)
    assert full.share([row("sweep", [1, 0, 1, 1, 0, 0])], "choosing") == (1, 0)


def test_a_task_is_not_another_whose_name_contains_its_own():
    rows = [row("full", [1, 1], "needle"), row("full", [1, 1], "one needle")]
    mine = [row("sweep", [1, 1], "needle"), row("sweep", [0, 0], "one needle")]
    assert Full(rows).share(mine, "choosing", "needle") == (1, 0)


def test_rows_are_compared_over_the_same_samples():
    few, many, other = same_samples(
        [row("sweep", [1, 0]), row("sweep", [1, 1, 0, 0]), row("sweep", [1, 1, 1], tokens=20)]
    )
    assert (few.mean, few.samples) == (0.5, 2)
    assert (many.mean, many.error, many.samples, many.values) == (1, 0, 2, [1, 1])
    assert other.samples == 3, "each cell by itself"
    mean, error = mean_of([row("x", [1, 0]), row("x", [1, 1, 0, 0])], "choosing", "easy")
    assert mean == 0.5 and error == pytest.approx(math.sqrt(0.5**2 + (1 / 3) / 4) / 2)


def test_rows_of_two_models_are_kept_apart(smollm2, gemma3, tmp_path):
    assert model_name(smollm2) == row("full", [1]).model == "SmolLM2-135M-Instruct"
    assert model_name(gemma3) == "Gemma 3 270M"
    (tmp_path / "Qwen3-8B").mkdir()
    assert model_name(tmp_path / "Qwen3-8B") == "Qwen3-8B"
    assert row("full", [1]).key != row("full", [1], model="Gemma 3 270M").key


class _Measured(NamedTuple):
    """A schedule on a model, on the samples for choosing: how many times fewer operations it takes,
    the mean over tasks, the worst task's share and how many tasks fall."""

    bound: float
    mean: float
    worst: float
    under: int


@pytest.fixture(scope="module")
def on_both() -> dict[str, list[_Measured]]:
    """The schedules of the committed results that both models were asked with."""
    rows = read(FILE, Row)
    full, found = Full(rows), defaultdict(list)
    for parts in report.by_model(rows).values():
        for run in runs([r for r in parts["sweep"] if r.method == LAZYLLM.name]):
            mean, _ = full.share(run.rows, "choosing")
            lowest = worst(full, run.rows, "choosing")
            measured = _Measured(run.bound, mean, lowest.share, len(lowest.under))
            found[run.schedule].append(measured)
    both = {name: of for name, of in found.items() if len(of) == 2}
    assert len(both) > 3
    return both


def _fastest(names: Iterable[str], measured: dict[str, list[_Measured]]) -> str:
    return max(names, key=lambda name: min(of.bound for of in measured[name]))


def test_the_defaults_worst_task_keeps_most(on_both):
    best = max(on_both, key=lambda name: min(of.worst for of in on_both[name]))
    assert best == preset_schedule(DEFAULT)


def test_balanced_is_the_fastest_with_which_fewest_tasks_fall(on_both):
    fall = {name: sum(of.under for of in both) for name, both in on_both.items()}
    fewest = [name for name, count in fall.items() if count == min(fall.values())]
    assert _fastest(fewest, on_both) == preset_schedule("balanced")


def test_aggressive_is_the_fastest_that_keeps_its_mean(on_both):
    holding = [name for name, both in on_both.items() if all(of.mean >= 0.95 for of in both)]
    assert _fastest(holding, on_both) == preset_schedule("aggressive")


def test_the_report_is_made_from_the_committed_results(tmp_path, capsys):
    """All parts that docs/quality.md shows are in the results file, with a row for each preset."""
    file = tmp_path / "quality.jsonl"
    file.write_text(FILE.read_text())
    page = tmp_path / "quality.md"
    page.write_text("before\n<!-- quality: begin -->\nstale text\n<!-- quality: end -->\nafter\n")
    report.main(page, file)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale text" not in text
    assert all(f"| `{preset}` |" in text for preset in PRESETS) and "nan" not in text
    plots = list(tmp_path.glob("*.svg"))
    assert len(plots) == 2 * len({r.model for r in read(FILE, Row)})
    assert all("<svg" in plot.read_text() and plot.name in text for plot in plots)
    printed = capsys.readouterr().out
    assert all(f", {preset}: worst task, " in printed for preset in PRESETS)
