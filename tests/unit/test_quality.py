"""The quality harness: metrics by hand, tasks that can be answered, published files read."""

import argparse
import json
import math
import random
import threading
from collections import Counter

import pytest
from transformers import AutoTokenizer

from benchmarks.quality import evaluate, metrics, run, text
from benchmarks.quality.evaluate import AGREEMENT, Cell, Model
from benchmarks.quality.jobs import COMPUTED, Job, Jobs, Setting
from benchmarks.quality.methods import FULL, LAZYLLM, UNLIMITED, Method
from benchmarks.quality.results import Row
from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.schedules import COMPARED, CURVE, SWEEP, Schedule
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.published import longbench, ruler
from benchmarks.results import read


@pytest.fixture(scope="module")
def writer(smollm2):
    return Writer(AutoTokenizer.from_pretrained(smollm2))


@pytest.mark.parametrize(
    "metric, output, answers, expected",
    (
        (metrics.f1, "The red cat.", ["a red dog", "cat"], 2 / 3),
        (metrics.f1, "nothing", ["something else"], 0),
        (metrics.rouge_l, "the cat sat on the mat", ["the cat lay on a mat"], 4 / 6),
        (metrics.rouge_l, "", ["a"], 0),
        (metrics.all_found, "12 and 34", ["12", "56"], 0.5),
        (metrics.any_found, "In PARIS, I think", ["london", "Paris"], 1),
        (metrics.first_word, " blue\nItem", ["blue"], 1),
        (metrics.first_word, "light blue", ["blue"], 0),
        (metrics.edit_similarity, "```\n# a comment\nreturn x\nmore", ["return x"], 1),
        (metrics.edit_similarity, "abcd", ["abxd"], 0.75),
        (metrics.numbers, "Paragraph 15, or 3", ["Paragraph 15"], 0.5),
        (metrics.numbers, "none", ["7"], 0),
        (metrics.METRICS["first_line_f1"], "\nred\nQuestion: blue", ["red"], 1),
    ),
)
def test_metrics(metric, output, answers, expected):
    assert metric(output, answers) == pytest.approx(expected)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_as_long_as_asked_and_can_be_answered(name, writer):
    task = TASKS[name]
    metric = metrics.METRICS[task.metric]
    samples = task.samples(range(4), writer, 600)
    assert samples == task.samples(range(4), writer, 600), "a seed is a sample"
    assert len({tuple(sample.prompt) for sample in samples}) == 4
    for sample in samples:
        assert 0.75 * 600 < len(sample.prompt) < 1.15 * 600
        assert metric(" " + "; ".join(sample.answers), sample.answers) == 1
        assert metric("zzzz", sample.answers) < 0.3
        if task.metric != "edit_similarity":
            prompt = writer.tokenizer.decode(sample.prompt)
            assert all(answer in prompt for answer in sample.answers), "the answer is in the prompt"


def test_real_text_is_there():
    assert sum(map(len, text.paragraphs())) > 100_000
    assert all("\n\n" not in paragraph for paragraph in text.paragraphs())
    code = text.code(random.Random(0), 5000)
    assert 4000 < len(code) < 7000 and code.endswith("\n")


def test_the_seeds_of_choosing_and_reporting_are_apart():
    assert not set(evaluate.choosing(50)) & set(evaluate.reporting(50))
    assert len(evaluate.choosing(50)) == len(evaluate.reporting(50)) == 50


def test_divergence_is_that_of_the_distributions():
    full = {1: math.log(0.5), 2: math.log(0.3)}
    assert evaluate.divergence(full, full) == pytest.approx(0, abs=1e-9)
    other = {1: math.log(0.3), 2: math.log(0.5)}
    exact = 0.5 * math.log(0.5 / 0.3) + 0.3 * math.log(0.3 / 0.5)
    assert evaluate.divergence(full, other) == pytest.approx(exact)


def test_agreement_by_hand():
    full = [({1: -0.1, 2: -3.0}, [1, 2, 3, 4]), ({1: -0.1, 2: -3.0}, [5, 6])]
    other = [({1: -0.1, 2: -3.0}, [1, 2, 9, 4]), ({1: -3.0, 2: -0.1}, [5, 6])]
    agreement = evaluate.agreement(full, other)
    assert agreement["top 1"] == [1, 0] and agreement["continuation"] == [0.5, 1]
    assert agreement["KL"][0] == pytest.approx(0, abs=1e-9) and agreement["KL"][1] > 1


def test_mean_and_error_by_hand():
    assert evaluate.mean_and_error([0, 1, 1, 0]) == (0.5, pytest.approx(math.sqrt(1 / 3) / 2))


def test_published_files_are_read(tmp_path, writer):
    line = {"input": "Who wrote it?", "context": "Anna wrote it. " * 400, "answers": ["Anna"]}
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "lcc.jsonl").write_text(
        json.dumps({"input": "", "context": "x = 1\n", "answers": ["y = 2"]}) + "\n"
    )
    tasks = {task.name: task for task in longbench(tmp_path)}
    assert set(tasks) == {"LongBench hotpotqa", "LongBench lcc"}
    question = tasks["LongBench hotpotqa"]
    assert (question.metric, question.max_tokens) == ("f1", 32)
    (asked,) = question.samples(evaluate.choosing(3), writer, 500)
    assert len(asked.prompt) == 500 and asked.answers == ["Anna"]
    assert "Who wrote it?" in writer.tokenizer.decode(asked.prompt)
    assert not question.samples(evaluate.reporting(3), writer, 500), "there is but one line"
    (code,) = tasks["LongBench lcc"].samples(range(1), writer, 500)
    assert writer.tokenizer.decode(code.prompt) == "x = 1\n" and code.answers == ["y = 2"]

    (tmp_path / "niah_single_1").mkdir()
    lines = [{"index": 0, "input": "Find 77.", "outputs": ["77"], "length": 9}]
    (tmp_path / "niah_single_1/validation.jsonl").write_text(json.dumps(lines[0]) + "\n")
    (task,) = ruler(tmp_path)
    assert task.name == "RULER niah_single_1" and task.metric == "all_found"
    (sample,) = task.samples(range(1), writer, 500)
    assert sample.answers == ["77"] and writer.tokenizer.decode(sample.prompt) == "Find 77."

    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps({"input": "?"}) + "\n")
    with pytest.raises(ValueError, match="hotpotqa.jsonl, line 1: no field context, answers"):
        list(longbench(tmp_path))


class FakeEvaluation:
    """Answers without an engine; two of them must be open at once before either goes on."""

    versions = {"gpu": "none"}
    both = threading.Barrier(2, timeout=20)

    def __init__(self, model, method, prune):
        self.model, self.method = model, method
        if method.name in ("LazyLLM", "broken"):
            self.both.wait()
        if method.name == "broken":
            raise RuntimeError("no engine")

    def expectations(self, texts):
        return [[({1: -0.1, 2: -3.0}, [1, 2]) for _ in seeds] for _, seeds in texts]

    def scores(self, cells):
        return [[1.0 for _ in self.model.samples(cell)] for cell in cells]

    def share_computed(self):
        return None if self.method is FULL else 0.5

    def close(self):
        pass


@pytest.fixture
def setting(smollm2, tmp_path):
    lengths = []

    def make(source, writer, num_tokens):
        lengths.append(num_tokens)
        return Sample([1], ["1"])

    seeds = evaluate.choosing(3)
    cells = [Cell(Task("counted", make, "f1", 1), tokens, seeds) for tokens in (10, 20)]
    model = Model(smollm2, None, {})
    halves = {"choosing": seeds}
    return Setting(model, cells, [10, 20], halves, tmp_path / "rows", "abc"), lengths


def test_jobs_at_once_keep_all_rows_and_tell_of_those_that_fail(setting):
    setting, lengths = setting
    other = Row("sweep", "other", "", "counted", 10, "choosing", 0.5, 0.1, 3)
    stale = Row("full", FULL.name, "", "counted", 10, "choosing", 0.5, 0.1, 3)
    setting.out.write_text("".join(json.dumps(vars(row)) + "\n" for row in (other, stale)))
    jobs = [
        Job("full", FULL),
        Job("sweep", LAZYLLM, SWEEP[0]),
        Job("sweep", Method("broken", {}), SWEEP[0]),
        Job("abilities", FULL, agreement=False),
    ]
    failed = Jobs(jobs, setting, FakeEvaluation).run(3)
    assert {label: str(error) for label, error in failed.items()} == {jobs[2].label: "no engine"}

    rows = read(setting.out, Row)
    assert rows[0] == other and len({row.key for row in rows}) == len(rows)
    parts = [row.part for row in rows[1:]]
    # Two lengths; three figures of agreement, where there are any, and one task.
    # LazyLLM also tells how much it computed.
    assert parts == ["full"] * 8 + ["sweep"] * 9 + ["abilities"] * 2, "in the order of the jobs"
    assert {row.task for row in rows if AGREEMENT in row.task and row.mean == 1} == {
        f"{AGREEMENT}: top 1",
        f"{AGREEMENT}: continuation",
    }
    assert all(row.mean == 1 for row in rows[1:] if row.task == "counted")
    (computed,) = (row for row in rows if row.task == COMPUTED)
    assert computed.mean == 0.5 and computed.part == "sweep"
    for row in rows[1:]:
        assert bool(row.flop_bound) == (row.part == "sweep" and row is not computed)
    assert lengths == [10] * 3 + [20] * 3, "a cell's samples are made once"


def test_a_full_model_that_fails_costs_the_agreement_alone(setting):
    setting, _ = setting
    jobs = [Job("full", FULL), Job("sweep", Method("static", {}), SWEEP[0])]

    def open_evaluation(model, method, prune):
        if method is FULL:
            raise RuntimeError("no engine")
        return FakeEvaluation(model, method, prune)

    failed = Jobs(jobs, setting, open_evaluation).run(2)
    assert set(failed) == {job.label for job in jobs}
    rows = read(setting.out, Row)
    assert [row.task for row in rows] == ["counted", "counted", COMPUTED]


def test_parts_methods_and_schedules_are_chosen():
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)

    def jobs(line):
        return run.jobs(parser.parse_args(line.split()))

    assert [job.part for job in jobs("abilities --lengths 500 8000")] == ["abilities"]
    chosen = jobs("sweep options --methods random static --schedules 0 3")
    assert [(job.part, job.method.name, job.schedule) for job in chosen] == [
        ("full", FULL.name, None),
        ("sweep", "static", SWEEP[0]),
        ("sweep", "static", SWEEP[3]),
        ("sweep", "random", SWEEP[0]),
        ("sweep", "random", SWEEP[3]),
    ]
    swept = Counter(job.method.name for job in jobs("sweep"))
    assert swept.pop(FULL.name) == 1 and swept.pop(LAZYLLM.name) == len(SWEEP)
    assert set(swept.values()) == {len(CURVE)} and len(swept) == 6, "every other method"
    assert {job.schedule for job in jobs("options revival")[1:]} == {COMPARED}
    for line, message in (("swep", "no such part: swep"), ("sweep --methods x", "method: x")):
        with pytest.raises(SystemExit, match=message):
            jobs(line)


def test_each_request_may_revive_what_it_could_alone():
    def of(config):
        options = {"max_model_len": 2000, "max_num_seqs": 256, "other": 1}
        config, options = evaluate.as_if_alone(config, options)
        assert options["other"] == 1
        return config["revive_budget"], config["revive_per_request"], options["max_num_seqs"]

    assert of({}) == (15 * 256, 15, 256)
    assert of({"revive_budget": 0}) == (0, 1, 256)
    assert of({"revive_budget": 64, "revive_per_request": 64}) == (64 * 256, 64, 256)
    assert of(UNLIMITED) == (2000 * 8, 2000, 8)


def test_tasks_are_chosen_and_read_from_folders(tmp_path):
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)

    def names(*line):
        return [task.name for task in run.tasks(parser.parse_args(line))]

    assert names() == list(TASKS)
    assert names("--tasks", "code completion") == ["code completion"]
    with pytest.raises(SystemExit, match="no such task: LongBench lcc"):
        names("--tasks", "LongBench lcc")
    with pytest.raises(SystemExit, match="--longbench: .* has none of its files"):
        names("--longbench", str(tmp_path))
    line = {"input": "", "context": "x = 1\n", "answers": ["y = 2"]}
    (tmp_path / "lcc.jsonl").write_text(json.dumps(line) + "\n")
    assert names("--longbench", str(tmp_path)) == [*TASKS, "LongBench lcc"]
    assert names("--longbench", str(tmp_path), "--tasks", "LongBench lcc") == ["LongBench lcc"]


def test_cuts_move_to_layers_that_see_all_tokens():
    """By hand, for a model of 18 layers of which 6, 12 and 18 do."""
    schedule = Schedule(((1 / 6, 0.7), (1 / 3, 0.2), (2 / 3, 0.1)))
    assert [tuple(c.values()) for c in schedule.prune(18)] == [(3, 0.7), (6, 0.2), (12, 0.1)]
    moved = [tuple(c.values()) for c in schedule.prune(18, (6, 12))]
    assert moved == [(6, 0.2), (12, 0.1)], "of two on one layer the later counts"
