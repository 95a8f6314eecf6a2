"""What is told of the quality results, by hand and of the committed file."""

import math

import pytest

from benchmarks.quality import evaluate, report
from benchmarks.quality.methods import FULL, LAZYLLM
from benchmarks.quality.results import FILE, Row
from benchmarks.quality.schedules import SWEEP
from benchmarks.quality.shares import Full, mean_of, same_samples
from benchmarks.results import read
from lazyllm_vllm.plan.presets import PRESETS, preset_cuts


def test_shares_of_the_full_model_by_hand():
    """The error is that of the differences: samples that both get wrong make none."""

    def row(part, values, task="easy", tokens=10):
        return Row(
            part,
            FULL.name if part == "full" else "LazyLLM",
            "",
            task,
            tokens,
            "choosing",
            sum(values) / len(values),
            0.0,
            len(values),
            values,
        )

    rows = [
        row("full", [1, 1, 1, 0]),
        row("full", [0, 0, 0, 0], "hard"),
        row("sweep", [1, 1, 1, 0]),
        row("sweep", [1, 1, 1, 1], "hard"),
    ]
    full = Full(rows)
    assert full.share(rows[2:], "choosing") == (1, 0), "what the full model cannot do is left out"
    assert all(math.isnan(x) for x in full.share(rows[2:], "choosing", "hard"))
    worse, error = full.share([row("sweep", [1, 0, 1, 0])], "choosing")
    assert worse == pytest.approx(2 / 3)
    differences = [1 / 3, -2 / 3, 1 / 3, 0]
    variance = sum(d * d for d in differences) / 3
    assert error == pytest.approx(math.sqrt(variance / 4) / 0.75)


def test_rows_are_compared_over_the_same_samples():
    def row(values):
        mean, error = evaluate.mean_and_error(values)
        return Row("sweep", "x", "", "easy", 10, "choosing", mean, error, len(values), values)

    few, many = same_samples([row([1, 0]), row([1, 1, 0, 0])])
    assert (few.mean, few.samples) == (0.5, 2)
    assert (many.mean, many.error, many.samples, many.values) == (1, 0, 2, [1, 1])
    mean, error = mean_of([row([1, 0]), row([1, 1, 0, 0])], "choosing", "easy")
    assert mean == 0.5 and error == pytest.approx(math.sqrt(0.5**2 + (1 / 3) / 4) / 2)


def test_presets_are_the_fastest_that_keep_what_they_promise():
    """By the committed results, on the samples for choosing and on those for reporting."""
    rows = read(FILE, Row)
    full, by_schedule = Full(rows), report.groups([row for row in rows if row.part == "sweep"])
    speeds, kept = {}, {}
    for schedule in SWEEP:
        mine = by_schedule[LAZYLLM.name, schedule.name]
        cuts = tuple((cut["layer"], cut["keep"]) for cut in schedule.prune(30))
        speeds[cuts] = sum(row.flop_bound for row in mine) / len(mine)
        kept[cuts] = min(full.share(mine, half)[0] for half in ("choosing", "reporting"))
    for preset, bar in (("conservative", 0.99), ("balanced", 0.97), ("aggressive", 0.9)):
        cuts = preset_cuts(preset, 30)
        assert kept[cuts] >= bar
        faster = [other for other, speed in speeds.items() if speed > speeds[cuts]]
        assert all(kept[other] < bar for other in faster)


def test_the_report_is_made_from_the_committed_results(tmp_path):
    """All parts that docs/quality.md shows are in the results file, with a row for each preset."""
    file = tmp_path / "quality.jsonl"
    file.write_text(FILE.read_text())
    page = tmp_path / "quality.md"
    page.write_text("before\n<!-- quality: begin -->\nold\n<!-- quality: end -->\nafter\n")
    report.main(page, file)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert all(f"| `{preset}` |" in text for preset in PRESETS) and "nan" not in text
    assert "<svg" in (tmp_path / "sweep.svg").read_text()
