"""Questions after others: what is asked before, in which order, and what is told of it."""

import argparse
from itertools import pairwise
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from benchmarks.quality import answer, evaluate, reuse_report, run
from benchmarks.quality.evaluate import Cell, Evaluation, Model
from benchmarks.quality.methods import FULL, REUSES, Method
from benchmarks.quality.results import Row
from benchmarks.quality.sample import Sample, Task, Writer
from benchmarks.quality.tasks import AGAIN, TASKS
from benchmarks.results import write
from lazyllm_vllm.plan.config import LazyLLMConfig

LENGTH = 1300  # of two texts both are long enough to be pruned


@pytest.fixture(scope="module", params=("smollm2", "gemma3"))
def writer(request):
    return Writer(AutoTokenizer.from_pretrained(request.getfixturevalue(request.param)))


@pytest.mark.parametrize("name", AGAIN)
def test_samples_fill_their_length_and_can_be_answered(name, writer):
    samples = AGAIN[name].samples(range(3), writer, LENGTH)
    assert samples == AGAIN[name].samples(range(3), writer, LENGTH), "a seed is a sample"
    for sample in samples:
        assert 0.95 * LENGTH < len(sample.prompt) <= LENGTH
        text = writer.tokenizer.decode(sample.prompt)
        assert sample.answers[0] in text.rpartition("?")[0], "it is in the text, not in what asks"
        # A prompt goes on from one that is at least half as long, and pruned.
        assert all(run_of > evaluate.SHORTEST for run_of in map(len, sample.before))


@pytest.mark.parametrize("name", [name for name in AGAIN if "after others" in name])
def test_the_text_is_sent_alone_first(name, writer):
    for sample in AGAIN[name].samples(range(3), writer, LENGTH):
        alone, *others = sample.before
        assert len(others) == 3 and len({tuple(p) for p in (*others, sample.prompt)}) == 4
        for prompt in (*others, sample.prompt):
            assert prompt[: len(alone)] == alone
            asks = writer.tokenizer.decode(prompt[len(alone) :])
            assert asks.count("?") == 1 and asks.index("?") > 10, "the text alone asks nothing"


@pytest.mark.parametrize("name", [name for name in AGAIN if "in conversation" in name])
def test_a_conversation_goes_on_from_its_turns(name, writer):
    for sample in AGAIN[name].samples(range(3), writer, LENGTH):
        turns = [*sample.before, sample.prompt]
        assert len(turns) == 4
        for earlier, later in pairwise(turns):
            assert later[: len(earlier)] == earlier
            more = writer.tokenizer.decode(later[len(earlier) :])
            assert more.count("?") == 1, "an answer, and one more question"


@pytest.mark.parametrize("name", [name for name in AGAIN if "second text" in name])
def test_a_second_text_comes_with_its_question(name, writer):
    """The second turn is long enough to be a long turn, and short enough to be one."""
    for sample in AGAIN[name].samples(range(3), writer, LENGTH):
        (first,) = sample.before
        assert sample.prompt[: len(first)] == first
        own = sample.prompt[len(first) :]
        assert evaluate.SHORTEST <= len(own) <= len(first)
        asks = writer.tokenizer.decode(own)
        assert sample.answers[0] in asks and asks.count("?") == 1


def test_a_task_runs_at_the_lengths_that_it_has(monkeypatch):
    """At others it is left out, and if that leaves nothing it is said."""
    seen = []
    monkeypatch.setattr(run, "Jobs", lambda asked, setting: seen.append(setting.cells) or Nothing())
    monkeypatch.setattr(run, "_model", lambda args: None)
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    line = ["reuse", "--half", "choosing", "--samples", "1", "--tasks", *AGAIN]
    run.main(parser.parse_args([*line, "--lengths", "1000", "1300"]))
    ran = [(cell.task.name, cell.tokens) for cell in seen[0]]
    late = [name for name in AGAIN if "second text" in name]
    assert [name for name, tokens in ran if tokens == 1300] == list(AGAIN) and len(late) == 2
    assert [name for name, tokens in ran if tokens == 1000] == [n for n in AGAIN if n not in late]
    line = ["reuse", "--tasks", late[0], "--lengths", "1000"]
    with pytest.raises(SystemExit, match="--lengths: these tasks have prompts of 1300 tokens"):
        run.main(parser.parse_args(line))


class Nothing:
    """Jobs that none of are run."""

    def run(self, at_once: int) -> dict:
        return {}


class FakeLLM:
    """Says 7, 8, 9; ``asked``: by call, the prompts and how many tokens each may have."""

    def __init__(self) -> None:
        self.asked = []

    def generate(self, prompts, params, use_tqdm):
        all_params = params if isinstance(params, list) else [params] * len(prompts)
        ids = [p["prompt_token_ids"] for p in prompts]
        self.asked.append(([*ids], [p.max_tokens for p in all_params]))
        said = [SimpleNamespace(token_ids=[7, 8, 9][: p.max_tokens]) for p in all_params]
        return [SimpleNamespace(outputs=[one]) for one in said]


def test_what_comes_before_is_asked_before(monkeypatch):
    monkeypatch.setattr(answer, "_at_once", lambda llm, prompts: 2)
    llm, prompts = FakeLLM(), [[1], [2], [3]]
    before = [[[10], [11]], [[20]], [[30]]]
    said = answer.answers(llm, prompts, [3, 2, 3], [9], before)
    assert said == [[7, 8], [7, 8], [7, 8]]
    assert llm.asked == [
        ([[10], [20]], [1, 1]),
        ([[11]], [1]),
        ([[1], [2]], [3, 2]),
        ([[30]], [1]),
        ([[3]], [3]),
    ]
    llm.asked.clear()
    answer.answers(llm, prompts, [3, 2, 3], [9])
    assert llm.asked == [(prompts, [3, 2, 3])], "all at once"


@pytest.mark.parametrize(
    "method, reuses, is_right",
    [
        (REUSES[2], 2, True),
        (REUSES[2], 1, False),
        (REUSES[1], 0, True),
        (REUSES[1], 1, False),
        (FULL, 0, True),
    ],
)
def test_that_prompts_went_on_is_checked(method, reuses, is_right, smollm2):
    """Two samples come after others."""
    evaluation = object.__new__(Evaluation)
    evaluation.model = Model(smollm2, AutoTokenizer.from_pretrained(smollm2), {})
    evaluation.method = method
    answers = {"answers": [[7], [7]], "reuses": reuses}
    evaluation.engine = SimpleNamespace(run=lambda function, **_: answers[function])
    task = Task("any", lambda *_: Sample([1], ["1"], [[2]]), "all_found", 1)
    cells = [Cell(task, 10, range(2))]
    if is_right:
        assert len(evaluation.scores(cells)[0]) == 2
    else:
        with pytest.raises(RuntimeError, match=f"{reuses} requests went on from others; 2 came"):
            evaluation.scores(cells)


def test_reuse_has_tasks_and_a_file_of_its_own():
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)

    def of(line: str) -> argparse.Namespace:
        return parser.parse_args(line.split())

    args = of("reuse")
    assert [task.name for task in run.tasks(args)] == list(AGAIN) and not set(AGAIN) & set(TASKS)
    assert [(job.part, job.method) for job in run.jobs(args)] == [
        ("full", FULL),
        *(("reuse", method) for method in REUSES),
    ]
    assert [LazyLLMConfig(**m.config).reuse for m in REUSES] == ["off", "exact", "deep"]
    assert not any(job.agreement for job in run.jobs(args))
    assert "reuse" not in {job.part for job in run.jobs(of(""))}
    with pytest.raises(SystemExit, match="ask for it alone"):
        run.jobs(of("reuse presets"))


def _row(method: Method, values: list[float], half: str = "reporting") -> Row:
    part = "full" if method is FULL else "reuse"
    mean, error = evaluate.mean_and_error(values)
    place = {"gpu": "G", "date": "d", "commit": "c"}
    of = part, method.name, "", next(iter(AGAIN)), 700, half
    return Row(*of, mean, error, len(values), values, environment=place)


def test_the_report_by_hand(tmp_path):
    file, page = tmp_path / "reuse.jsonl", tmp_path / "quality.md"
    page.write_text("before\n")
    reuse_report.main(page, file)
    assert page.read_text() == "before\n", "no results yet"
    off, exact, deep = REUSES
    rows = [_row(FULL, [1, 1, 1, 0]), _row(off, [1, 1, 1, 0]), _row(deep, [1, 1, 0, 0])]
    rows[-1].environment = rows[-1].environment | {"gpu": "H"}
    write(file, rows)
    for _ in range(2):  # the second finds the section there
        reuse_report.main(page, file)
    text = page.read_text()
    assert text.startswith("before\n") and text.count("reuse: begin") == 1
    # As in test_quality_results: a third of what the full model has is lost, with this error.
    cells = "100.0% ± 0.0% | 66.7% ± 31.4%"
    assert "|  | samples for | full model | `reuse off` | `reuse deep` |" in text
    assert f"| numbers, after others | reporting | 0.75 | {cells} |" in text
    assert f"| all | reporting |  | {cells} |" in text and "choosing |" not in text
    assert " on G (d, commit c) and H (d, commit c), " in text
