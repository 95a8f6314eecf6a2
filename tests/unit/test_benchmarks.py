"""The benchmarks' own arithmetic and machinery, which run without a GPU."""

import pytest
from harness.tiny import TINY_SHAPE

from benchmarks.results import read, write
from benchmarks.speed import cases, report
from benchmarks.speed.results import Row
from benchmarks.speed.shapes import BALANCED, SHAPES, flop_bound, flops


def test_flops_by_hand():
    """One layer's linear weights: q and o 64 * 64, k and v 64 * 32, the MLP 3 * 64 * 128."""
    weights = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    pairs = sum(i + 1 for i in range(1000))
    attention = pairs * 4 * (2 * 16 + 2 * 16)  # 4 heads of 16, logits and values
    head = 2 * 64 * 30000
    exact = 4 * (2 * 1000 * weights + attention) + head
    assert flops(TINY_SHAPE, (), 1000) == pytest.approx(exact, rel=2e-3)
    halved = 2 * (2 * 500 * weights + sum(i + 1 for i in range(500)) * 256)
    exact_pruned = 2 * (2 * 1000 * weights + attention) + halved + head
    assert flops(TINY_SHAPE, ((2, 0.5),), 1000) == pytest.approx(exact_pruned, rel=2e-3)


def test_flop_bounds():
    llama_2 = SHAPES["Llama-2-7B"]
    tenth = (4, 0.3), (16, 0.1)
    assert flop_bound(llama_2, tenth, 4000) == pytest.approx(3.6, abs=0.05)
    assert flop_bound(llama_2, (), 4000) == 1
    # Attention grows with the square of the length, and is cut by the square of what is kept.
    halves = (8, 0.5), (16, 0.25), (24, 0.125)
    bounds = [flop_bound(SHAPES["Llama-3.1-8B"], halves, n) for n in (4096, 32768, 131072)]
    assert bounds == sorted(bounds) and 32 / 15 < bounds[0] < bounds[2] < 64 / 21.25


def test_plans_keep_their_numbers():
    """Whichever benchmarks are asked for."""
    everything = cases.plans(set(cases.BENCHMARKS))
    assert [plan.shape for plan in everything][-1] == "Llama-2-7B"
    (one,) = cases.plans({"ttft", "memory"}, [len(everything) - 1])
    assert one.shape == "Llama-2-7B" and {c.benchmark for c in one.cases} == {"ttft"}
    assert cases.plans({"memory"}, [len(everything) - 1]) == []
    with pytest.raises(IndexError):
        cases.plans({"memory"}, [len(everything)])


def _rows() -> list[Row]:
    place = {"gpu": "G", "vllm": "v", "torch": "t", "triton": "3", "date": "d", "commit": "c"}
    rows = []
    for benchmark, unit, tokens, batch, stock, lazy in (
        ("ttft", "ms", 4096, 1, 100.0, 50.0),
        ("ttft", "ms", 16384, 1, 500.0, 200.0),
        ("decode", "ms", 8192, 1, 5.0, 5.5),
        ("memory", "requests", 32768, 1, 26.0, 45.0),
        ("throughput", "tokens/s", 16384, 64, 100.0, 250.0),
    ):
        for engine, value in (("stock", stock), (BALANCED.name, lazy)):
            row = Row.of(
                [{"value": value}],
                benchmark=benchmark,
                shape="Llama-3.1-8B",
                engine=engine,
                tokens=tokens,
                batch=batch,
                unit=unit,
            )
            row.ratio = stock / value if unit == "ms" else value / stock
            row.flop_bound = 2.1 if benchmark == "ttft" and engine != "stock" else None
            row.environment = place
            rows.append(row)
    return rows


def test_the_report_is_made_from_the_results_alone(tmp_path):
    file = tmp_path / "speed.jsonl"
    write(file, _rows())
    assert read(file, Row) == _rows()
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- speed: begin -->\nold\n<!-- speed: end -->\nafter\n")
    report.main(page, file)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 16,384 | 500.0 | 200.0 | 2.50x | 2.10x |" in text
    assert "| 8,192 | 1 | 5.00 | 5.50 | 1.100 |" in text
    assert "| 26 | 45 | 1.73x |" in text and "| 100 | 250 | 2.50x |" in text
    assert "<svg" in (tmp_path / "ttft.svg").read_text()
    assert "<svg" in (tmp_path / "room.svg").read_text()
