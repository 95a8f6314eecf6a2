"""Worst tasks, what presets may be by them, and the tables of two models: on made-up rows."""

import argparse
import math
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.quality import frontier, report, run, tables
from benchmarks.quality.choice import candidates, choose
from benchmarks.quality.jobs import COMPUTED
from benchmarks.quality.methods import FULL, LAZYLLM
from benchmarks.quality.results import LONGER, Row
from benchmarks.quality.shares import Full
from benchmarks.quality.worst import preset_runs, preset_schedule, runs, worst
from lazyllm_vllm.plan.presets import DEFAULT, PRESETS

SMALL, OTHER = "Small 1B", "Other 2B"
SAMPLES = 100


def row(task, right, schedule="", method=LAZYLLM.name, part="sweep", **fields):
    """A cell with so many right answers of a hundred, the first ones."""
    values = [1.0] * right + [0.0] * (SAMPLES - right)
    of = {"tokens": 1000, "half": "choosing", "model": SMALL} | fields
    tokens, half = of.pop("tokens"), of.pop("half")
    mean = right / SAMPLES
    error = math.sqrt(mean * (1 - mean) / (SAMPLES - 1))
    return Row(part, method, schedule, task, tokens, half, mean, error, SAMPLES, values, **of)


def full_rows(scores, models=(SMALL, OTHER), tokens=(1000,)):
    """The full model's, the same on all models and in both halves."""
    return [
        row(task, right, "", FULL.name, "full", model=model, half=half, tokens=n)
        for task, right in scores.items()
        for model in models
        for half in ("choosing", "reporting")
        for n in tokens
    ]


def swept(schedule, bound, right, unless=(), models=(SMALL, OTHER), tasks=("a", "b")):
    """A schedule with so many right answers, but those of ``unless``, by (model, half, task)."""
    other = dict(unless)
    return [
        row(
            task,
            other.get((model, half, task), right),
            schedule,
            model=model,
            half=half,
            flop_bound=bound if isinstance(bound, float) else bound[model],
        )
        for model in models
        for half in ("choosing", "reporting")
        for task in tasks
    ]


def test_the_worst_task_is_of_all_its_lengths_together():
    """One noisy cell of a's, 60 of 100, does not decide: over both lengths a keeps 0.8, b 0.75."""
    rows = full_rows({"a": 100, "b": 100, "hard": 49}, (SMALL,), (1000, 2000))
    mine = [
        row("a", 60),
        row("a", 100, tokens=2000),
        row("b", 75),
        row("b", 75, tokens=2000),
        row("hard", 0),
        row("hard", 0, tokens=2000),
        row("b", 0, half="reporting"),
    ]
    found = worst(Full(rows), mine, "choosing")
    assert (found.task, found.share, found.counted) == ("b", 0.75, 2)
    # Both cells' errors are those of a share of 0.75 of certain answers.
    each = 0.75 * 0.25 / (SAMPLES - 1)
    assert found.error == pytest.approx(math.sqrt(each + each) / 2)
    assert found.under == ("b", "a"), "both under 97%, the worst first"
    assert worst(Full(rows), [row("hard", 0)], "choosing") is None


def choices(rows, **options):
    found, left_out = candidates(rows, Full(rows))
    chosen = {floor: choose(found, floor, **options) for floor in (0.99, 0.97, 0.9)}
    return {floor: best and best.schedule for floor, best in chosen.items()}, left_out


BASE = full_rows({"a": 100, "b": 100})
SWEPT = swept("mild", 1.5, 99) + swept("middle", 2.0, 97) + swept("fast", 3.0, 90)


def test_the_fastest_whose_worst_task_holds_is_chosen():
    slow = swept("slow", 1.2, 100)
    assert choices(BASE + SWEPT + slow) == ({0.99: "mild", 0.97: "middle", 0.9: "fast"}, 0)
    assert choices(BASE + swept("bad", 4.0, 89)) == ({0.99: None, 0.97: None, 0.9: None}, 0)


@pytest.mark.parametrize("model", (SMALL, OTHER))
@pytest.mark.parametrize("half", ("choosing", "reporting"))
@pytest.mark.parametrize("task", ("a", "b"))
def test_one_task_in_one_half_on_one_model_is_enough_to_fall(model, half, task):
    """Though the mean over the rest is perfect."""
    one_falls = swept("fastest", 4.0, 100, {(model, half, task): 89})
    assert choices(BASE + SWEPT + one_falls)[0] == {0.99: "mild", 0.97: "middle", 0.9: "fast"}
    found, _ = candidates(BASE + one_falls, Full(BASE))
    (place,) = {candidate.worst for candidate in found}
    assert (place.model, place.half, place.task, place.share) == (model, half, task, 0.89)


def test_of_equal_bounds_the_more_exact_is_chosen():
    """Equal as printed; of the models the lowest bound counts."""
    exact = swept("exact", 2.996, 95)
    assert choices(BASE + SWEPT + exact)[0][0.9] == "exact"
    assert choices(BASE + exact + SWEPT)[0][0.9] == "exact", "whichever comes first"
    exact = swept("exact", {SMALL: 9.0, OTHER: 2.9}, 95)
    assert choices(BASE + SWEPT + exact)[0][0.9] == "fast"


def test_what_was_not_measured_everywhere_is_no_candidate():
    one_model = swept("one model", 5.0, 100, models=(SMALL,))
    one_task = swept("one task", 5.0, 100, tasks=("a",))
    chosen, left_out = choices(BASE + SWEPT + one_model + one_task)
    assert chosen[0.9] == "fast" and left_out == 2
    one_half = [r for r in BASE + SWEPT if r.half == "choosing"]
    assert choices(one_half) == ({0.99: None, 0.97: None, 0.9: None}, 3)
    uncounted = swept("fast", 3.0, 0, tasks=("hard",))
    rows = BASE + full_rows({"hard": 49}) + SWEPT + uncounted
    assert choices(rows)[0][0.9] == "fast", "what the full model cannot do decides nothing"


def test_standard_errors_in_its_favour_let_more_through():
    """Of 100 answers 87 right have an error of 0.034: two of them reach 0.9, not 0.97."""
    rows = BASE + SWEPT + swept("lucky", 4.0, 87)
    assert choices(rows)[0][0.9] == "fast"
    assert choices(rows, errors=2)[0][0.9] == "lucky"
    assert choices(rows, errors=2)[0][0.97] != "lucky"


def test_bounds_that_follow_the_prompt_are_told_by_what_was_computed():
    computed = row(COMPUTED, 40, half="both", tokens=0)
    (mass,) = runs([row("a", 100, flop_bound=None), computed])
    assert mass.is_estimate and mass.bound == pytest.approx(2.5)
    (known,) = runs(
        [row("a", 100, flop_bound=2.0), row("a", 9, flop_bound=3.0, tokens=5), computed]
    )
    assert (known.is_estimate, known.bound, known.share_computed) == (False, 2.5, 0.4)
    (unknown,) = runs([row("a", 100)])
    assert math.isnan(unknown.bound)
    assert tables.kept([mass]) == tables.table(
        ("", "keeps", "a tenth of the prompts less than", "median", "a tenth more than"),
        [(LAZYLLM.name, "", "0%", "0%", "100%")],
    )
    computed.values = [0.4]
    assert tables.kept(runs([row("a", 100), computed])) is None, "one figure has no spread"


def test_others_stand_beside_those_that_take_as_many_operations():
    def one(method, schedule, bound):
        return row("a", 90, schedule, method, "rivals", flop_bound=bound)

    rows = [
        one(LAZYLLM.name, "x", 1.6),
        one(LAZYLLM.name, "y", 1.7),
        one("static", "y", 1.62),  # by its schedule
        one("GemFilter", "z", 1.61),
        one("UniPrefill, 0.99", "by mass", None),
    ]
    groups = tables.at_equal_operations(runs(rows))
    assert [[each.method for each in group] for _, group in groups] == [
        [LAZYLLM.name, "GemFilter"],
        [LAZYLLM.name, "static"],
        ["UniPrefill, 0.99"],
    ]
    assert groups[0][0] == "At 1.60 times fewer operations (x)"
    ((title, alone),) = tables.at_equal_operations(runs(rows[3:]))
    assert title == "As measured" and len(alone) == 2


def test_curves_are_of_methods_and_their_frontier_of_what_none_outdoes():
    rows = [
        row("a", 90, "x", flop_bound=2.0),
        row("a", 80, "y", flop_bound=1.5),
        row("a", 100, "z", flop_bound=1.2),
        row("a", 50, "m", "UniPrefill, 0.99", flop_bound=1.1),
        row("a", 40, "m", "UniPrefill, 0.9", flop_bound=1.4),
        row("hard", 40, "m", "nothing counts", flop_bound=1.4),
    ]
    full = Full(full_rows({"a": 100, "hard": 10}))
    found = frontier.curves(runs(rows), lambda each: full.share(each.rows, "choosing"))
    assert {name: [p[:2] for p in points] for name, points in found.items()} == {
        LAZYLLM.name: [(1.2, 1.0), (1.5, 0.8), (2.0, 0.9)],
        "UniPrefill": [(1.1, 0.5), (1.4, 0.4)],
    }
    assert [p[0] for p in frontier.not_outdone(found[LAZYLLM.name])] == [1.2, 2.0]


def test_presets_are_found_as_they_are_or_by_their_schedule():
    by_schedule = swept(preset_schedule("balanced"), 2.5, 95)
    (found,) = preset_runs({"sweep": by_schedule}).items()
    assert found[0] == "balanced" and found[1].rows == by_schedule
    itself = [row("a", 90, "", "balanced", "presets")]
    found = preset_runs({"sweep": by_schedule, "presets": itself})
    assert found["balanced"].rows == itself and len(found) == 1
    assert not preset_runs({"sweep": swept("another", 2.5, 95)})


def test_a_report_of_two_models_tells_of_each(tmp_path):
    """A run of few parts and one half on the second, as one's own model is checked."""
    schedule = preset_schedule("balanced")
    rows = BASE + swept(schedule, 2.5, 95, {(OTHER, "reporting", "b"): 80})
    rows = [r for r in rows if r.model == SMALL or r.half == "reporting"]
    text = report.section(rows, Full(rows), "plots")
    small, other = text.split("### ")[1:]
    assert small.startswith(SMALL) and other.startswith(OTHER)
    assert "| b | 80.0% ± 4.0% | 2 of 2 |" in other and "| 95.0% ± 2.2% | 2 of 2 |" in small
    assert "plots/worst-other-2b.svg" in other and "nan" not in text
    lines = report.summary(rows, Full(rows))
    assert lines[1].startswith(
        f"{OTHER}, balanced: worst task, choosing: none counts; reporting: b 80.0%"
    )
    for model, parts in report.by_model(rows).items():
        frontier.draw(runs(parts["sweep"]), preset_runs(parts), Full(rows), tmp_path, model)
    assert "<svg" in (tmp_path / "worst-other-2b.svg").read_text()


def test_longer_prompts_are_told_by_length_beside_their_own_full_model():
    """At 8,000 the full model gets too little of ``b`` for it to count."""
    at = {"part": LONGER, "half": "reporting"}
    rows = [row("a", 80, method=FULL.name, tokens=4000, **at)]
    rows += [row("b", 60, method=FULL.name, tokens=4000, **at)]
    rows += [row("a", 60, method=FULL.name, tokens=8000, **at)]
    rows += [row("b", 40, method=FULL.name, tokens=8000, **at)]
    schedule = preset_schedule(DEFAULT)
    for task, right, tokens in (("a", 72, 4000), ("b", 60, 4000), ("a", 60, 8000), ("b", 0, 8000)):
        rows.append(row(task, right, schedule, tokens=tokens, **at))
    lines = [re.split(r" *\| *", line)[1:-1] for line in tables.longer(rows).splitlines()[2:]]
    told = [[cell.split(" ± ")[0] for cell in line] for line in lines]
    assert told == [
        ["4,000", f"`{DEFAULT}`", "a", "90.0%", "1 of 2", "94.3%"],
        ["8,000", f"`{DEFAULT}`", "a", "100.0%", "0 of 1", "100.0%"],
    ]
    assert tables.longer(rows) in report.section(rows, Full(rows))


def test_the_documented_check_of_a_model_runs_its_presets():
    """The command of docs/quality.md: the full model and the three presets' schedules."""
    page = (Path(__file__).parents[2] / "docs/quality.md").read_text()
    (command,) = re.findall(r"^python -m benchmarks quality (.+?)\n(?=python)", page, re.M | re.S)
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    args = parser.parse_args(shlex.split(command.replace("\\\n", "")))
    assert run.tasks(args) and args.half == ["reporting"]
    full, *others = run.jobs(args)
    assert full.method is FULL and {job.method.name for job in others} == {LAZYLLM.name}
    assert [job.schedule.name for job in others] == list(map(preset_schedule, PRESETS))
    prompts = len(args.tasks) * len(args.lengths) * args.samples
    assert f"{prompts} prompts each" in page
