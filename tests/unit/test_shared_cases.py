"""The benchmark of shared prefixes and arriving prompts, without an engine."""

import argparse
from dataclasses import replace

import pytest
from harness.tiny import TINY_SHAPE

from benchmarks.results import read, write
from benchmarks.speed import cases, run_shared, shared_report
from benchmarks.speed.results import Row
from benchmarks.speed.shapes import AGGRESSIVE, DEEP, MEASURED, SHAPES, parked_pages
from benchmarks.speed.shared import (
    ABOUT,
    ARRIVAL,
    BENCHMARKS,
    PLAN,
    QUESTION,
    SHARED_PREFIX,
    THROUGHPUT,
    TURN,
)
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.operations import extension_flops, flops

_OLD = {"stock": "stock", MEASURED.name: "aggressive"}
WARM = {"cold": 200.0, "cold_tokens": 16384, "tokens": 16704, "shared": 16448, "cached": 16448}


def test_flops_of_a_cached_prefix_by_hand():
    """Of 1,000 tokens the first stage runs the last hundred, the second its half."""
    weights = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    pairs = sum(i + 1 for i in range(900, 1000))
    first = 2 * (2 * 100 * weights + 4 * 64 * pairs)
    second = 2 * (2 * 500 * weights + 4 * 64 * sum(i + 1 for i in range(500)))
    exact = first + second + 2 * 64 * 30000
    assert flops(TINY_SHAPE, ((2, 0.5),), 1000, 900) == pytest.approx(exact, rel=2e-3)
    whole = flops(TINY_SHAPE, (), 1000) - flops(TINY_SHAPE, (), 900)
    assert flops(TINY_SHAPE, (), 1000, 900) == pytest.approx(whole + 2 * 64 * 30000)


def test_cuts_are_the_engine_s():
    """Llama-3.1-8B parks 4,096 numbers in pages of 2,048 a token, Llama-2-7B in one of 8,192."""
    assert [parked_pages(SHAPES[name]) for name in ("Llama-3.1-8B", "Llama-2-7B")] == [2, 1]
    assert AGGRESSIVE.cuts(SHAPES["Llama-3.1-8B"]) == ((6, 0.7), (10, 0.2), (22, 0.1))


def test_the_deep_engine_is_the_measured_one_but_for_reuse():
    exact, deep = (LazyLLMConfig(**each.config) for each in (MEASURED, DEEP))
    assert (exact.reuse, deep.reuse) == ("exact", "deep")
    assert deep.model_dump() | {"reuse": "exact"} == exact.model_dump()
    assert exact.boundaries(32) == LazyLLMConfig().boundaries(32)


def _results(config: dict | None) -> dict[str, dict]:
    """What each case measures: LazyLLM takes half of stock vLLM's time, a quarter where it goes
    on."""
    value = 50.0 if config else 100.0
    reused, again = (16447, 25.0) if config == DEEP.config else (0, value)
    arrival = {"value": value, "ttft": 10 * value, "usual": 9.0}
    return {
        "second_turn": WARM | {"value": again, "reused": reused},
        "second_question": WARM | {"value": value, "shared": 16000, "reused": 0},
        "question_about_document": WARM | {"value": again, "reused": reused},
        "questions_at_once": {"value": again, "longest": 3 * again},
        "arrival": arrival,
        "extension": arrival | {"ttft": again, "cached": 16432, "reused": reused},
        "throughput": {"value": 100000 / value, "peak_running": 64, "cached": 0},
    }


@pytest.fixture
def engines(monkeypatch):
    """Stands for real ones; the configurations of those that were opened."""
    opened = []

    class Engine:
        def __init__(self, start, arguments, functions, log, has_workers):
            assert functions == "benchmarks.speed.measure_shared"
            assert arguments["options"]["max_num_batched_tokens"] == 8192
            opened.append(arguments["config"])

        def ready(self) -> dict:
            return {"gpu": "G", "vllm": "v", "torch": "t", "triton": "3"}

        def run(self, function: str, **arguments) -> dict:
            return _results(opened[-1])[function]

        def close(self) -> None:
            pass

    monkeypatch.setattr(cases, "Engine", Engine)
    return opened


def test_the_report_is_made_from_what_was_measured(engines, tmp_path):
    file, page = tmp_path / "shared.jsonl", tmp_path / "benchmarks.md"
    page.write_text("before\n")
    shared_report.main(page, file)
    assert page.read_text() == "before\n", "no results yet"
    run_shared.main(argparse.Namespace(only=None, out=file, commit="c"))
    assert engines == [None, MEASURED.config, DEEP.config]
    rows = read(file, Row)
    not_deep = [case for case in PLAN.cases if case.benchmark in (ARRIVAL, THROUGHPUT)]
    assert len(rows) == 3 * len(PLAN.cases) - len(not_deep) == len({row.key for row in rows})
    for _ in range(2):  # the second finds the section there
        shared_report.main(page, file)
        text = page.read_text()
        assert text.startswith("before\n") and text.count("shared: begin") == 1
    line = "| a prompt of 32,768, beside 16 requests | `conservative` | 100 | 50 | 0.50 | 1,000 |"
    assert f"{line} 500 | 0.50 |" in text
    line = "| 200 tokens after 16,384 + 64, beside 32 of 8,192 | `conservative, deep` | 100 | 50 |"
    assert f"{line} 0.50 | 100 | 25 | 0.25 |" in text
    line = "| 8 questions of 128 tokens about a document of 32,768 | `conservative, deep` | 100.0"
    assert f"{line} | 25.0 (75.0) | 0.25 |" in text
    line = "| 64 requests of 8,192 tokens, 128 out | `conservative` | 1,000 | 2,000 | 2.00x |"
    assert line in text and "sharing 6,144" in text
    shape, cuts = SHAPES[PLAN.shape], MEASURED.cuts(SHAPES[PLAN.shape])
    exact, deep = flops(shape, cuts, 16704, 16448), extension_flops(shape, cuts, 16448, 256)
    assert deep < exact / 8
    for engine, operations, took in ((MEASURED, exact, 50.0), (DEEP, deep, 25.0)):
        turn = next(r for r in rows if r.benchmark == TURN and r.engine == engine.name)
        bound = 200 * operations / flops(shape, cuts, 16384)
        assert turn.details["bound"] == pytest.approx(bound)
        line = f"| 100.0 | 200.0 | {took} | {bound:,.1f} | {took / bound:.2f} "
        line = f"| `{engine.name}` {line}| {took / 100:.2f} |"
        assert f"| second turn, 64 + 256 tokens after 16,384 {line}" in text
    # Where the first question came with the document, the deep engine has the exact one's bound.
    bounds = {
        (r.benchmark, r.engine): r.details["bound"]
        for r in rows
        if r.benchmark in (QUESTION, ABOUT)
    }
    assert bounds[QUESTION, DEEP.name] == bounds[QUESTION, MEASURED.name]
    assert bounds[ABOUT, DEEP.name] < bounds[ABOUT, MEASURED.name]
    for name in ("again.svg", "arrival.svg"):
        assert "<svg" in (tmp_path / name).read_text()


def test_the_bound_of_a_short_conversation():
    """A prompt under 1,024 tokens runs its new tokens in all layers; one that is longer does so if
    it goes on from a short one, and else is pruned."""
    shape, cuts = SHAPES[PLAN.shape], MEASURED.cuts(SHAPES[PLAN.shape])
    for tokens, reused, operations in (
        (832, 0, flops(shape, (), 832, 576)),
        (1088, 0, flops(shape, cuts, 1088, 576)),
        (1088, 512, flops(shape, (), 1088, 576)),
    ):
        details = {"tokens": tokens, "reused": reused, "cold_tokens": 512}
        bound = cases._warm_bound(shape, cuts, details | {"shared": 576, "cold": 15.0})
        assert bound == pytest.approx(15 * operations / flops(shape, (), 512))


def test_some_by_name(engines, tmp_path):
    """Rows of others stay; a part of the file makes a report too."""
    file, page = tmp_path / "shared.jsonl", tmp_path / "benchmarks.md"
    page.write_text("")
    for name in (QUESTION, SHARED_PREFIX):
        run_shared.main(argparse.Namespace(only=[name], out=file, commit="c"))
    assert {row.benchmark for row in read(file, Row)} == {QUESTION, SHARED_PREFIX}
    shared_report.main(page, file)
    assert "second question, 128 tokens after a document of 32,768" in page.read_text()
    assert DEEP.name in page.read_text()
    # As older results are: of one configuration, whatever it was called.
    older = [row for row in read(file, Row) if row.engine != DEEP.name]
    write(tmp_path / "older.jsonl", [replace(row, engine=_OLD[row.engine]) for row in older])
    shared_report.main(page, tmp_path / "older.jsonl")
    assert "`aggressive`" in page.read_text() and DEEP.name not in page.read_text()
    with pytest.raises(SystemExit, match="no such benchmark: third turn; there are "):
        run_shared.main(argparse.Namespace(only=["third turn"], out=file, commit="c"))
    write(file, [row for row in read(file, Row) if row.benchmark == SHARED_PREFIX])
    shared_report.main(page, file)
    assert "second question" not in page.read_text()
    assert {TURN, QUESTION, ARRIVAL, SHARED_PREFIX} < set(BENCHMARKS)
