"""The benchmarks' own arithmetic and machinery, which run without a GPU."""

import argparse
from dataclasses import replace

import pytest
import torch
from harness.tiny import TINY_SHAPE

from benchmarks import headline
from benchmarks.results import read, write
from benchmarks.speed import cases, families, families_report, report, run_families
from benchmarks.speed.results import Row
from benchmarks.speed.shapes import AGGRESSIVE, MEASURED, SHAPES
from lazyllm_vllm.plan.operations import extension_flops, flop_bound, flops, full_layers
from lazyllm_vllm.plan.presets import preset_cuts


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


def test_flops_of_heads_of_another_size():
    """Queries of 4 * 32, though the hidden size is 64."""
    weights = 2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128
    pairs = 1000 * 1000 / 2
    by_hand = 4 * (2 * 1000 * weights + 4 * 128 * pairs) + 2 * 64 * 30000
    assert flops(TINY_SHAPE | {"head_dim": 32}, (), 1000) == pytest.approx(by_hand)


@pytest.mark.parametrize("name", ("num_experts", "num_local_experts"))
def test_flops_of_experts(name):
    """Of eight experts two count, and the router."""
    shape = TINY_SHAPE | {name: 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    dense = 3 * 64 * 128
    routed = 2 * 3 * 64 * 96 + 64 * 8
    more = 4 * 2 * 1000 * (routed - dense)
    assert flops(shape, (), 1000) - flops(TINY_SHAPE, (), 1000) == pytest.approx(more)
    del shape["moe_intermediate_size"]
    more = 4 * 2 * 1000 * (2 * dense + 64 * 8 - dense)
    assert flops(shape, (), 1000) - flops(TINY_SHAPE, (), 1000) == pytest.approx(more)


def test_flops_of_shared_experts_behind_a_dense_layer():
    """GLM-4-MoE: all tokens meet the shared expert too, and none in the first layer."""
    shape = TINY_SHAPE | {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
    shape |= {"moe_intermediate_size": 96, "first_k_dense_replace": 1}
    more = 3 * 2 * 1000 * (3 * 3 * 64 * 96 + 64 * 8 - 3 * 64 * 128)
    assert flops(shape, (), 1000) - flops(TINY_SHAPE, (), 1000) == pytest.approx(more)


def test_flops_of_sliding_windows():
    """Layers 2 and 4 attend to all tokens, 1 and 3 to the last hundred; the prune follows 2."""
    kinds = ["sliding_attention", "full_attention"] * 2
    shape = TINY_SHAPE | {"sliding_window": 100, "layer_types": kinds}
    all_pairs, near = 1000 * 1000 / 2, 100 * 1000 - 100 * 100 / 2
    less = 2 * 4 * 64 * (all_pairs - near)
    assert flops(TINY_SHAPE, (), 1000) - flops(shape, (), 1000) == pytest.approx(less)
    # Of the half that is kept, a window holds 50.
    all_pairs, near_half = 500 * 500 / 2, 50 * 500 - 50 * 50 / 2
    less = 4 * 64 * (1000 * 1000 / 2 - near + all_pairs - near_half)
    cut = ((2, 0.5),)
    assert flops(TINY_SHAPE, cut, 1000) - flops(shape, cut, 1000) == pytest.approx(less)
    assert flops(shape, (), 80) == flops(TINY_SHAPE, (), 80)
    assert full_layers(shape) == (2, 4) and full_layers(shape | {"sliding_window": None}) is None


def test_flops_of_what_goes_on_by_hand():
    """A hundred tokens after 900, of which the first two layers have all and the others a third.
    Where all layers have all, it is a cached prefix."""
    weights = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    pairs = [sum(have + i + 1 for i in range(100)) for have in (900, 300)]
    exact = sum(2 * (2 * 100 * weights + 4 * 64 * seen) for seen in pairs) + 2 * 64 * 30000
    found = extension_flops(TINY_SHAPE, ((2, 1 / 3),), 900, 100)
    assert found == pytest.approx(exact, rel=2e-3)
    assert extension_flops(TINY_SHAPE, (), 900, 100) == flops(TINY_SHAPE, (), 1000, 900)
    # Of 900 tokens layers 1 and 2 have 900 more, the others a third of both: a whole prompt less
    # what the first half took.
    whole, half = (flops(TINY_SHAPE, ((2, 1 / 3),), n) for n in (1800, 900))
    dropped = extension_flops(TINY_SHAPE, ((2, 1 / 3),), 900, 900, drops=True)
    assert dropped == pytest.approx(whole - half + 2 * 64 * 30000, rel=1e-3)
    windows = TINY_SHAPE | {"sliding_window": 90, "layer_types": ["sliding_attention"] * 4}
    less = 2 * 4 * 64 * (pairs[0] - 90 * 100) + 2 * 4 * 64 * (pairs[1] - 30 * 100)
    found -= extension_flops(windows, ((2, 1 / 3),), 900, 100)
    assert found == pytest.approx(less, rel=2e-3)


def test_flop_bounds_of_the_shapes():
    """Those of Llama as they were before other families came."""
    for name, tokens, bound in (
        ("Llama-3.1-8B", 4096, 2.7529441366053327),
        ("Llama-3.1-8B", 131072, 3.498030907136634),
        ("Llama-2-7B", 4096, 2.75771132819305),
    ):
        cuts = ((5, 0.7), (10, 0.2), (22, 0.1))
        assert flop_bound(SHAPES[name], cuts, tokens) == pytest.approx(bound, rel=1e-12)
    for name, plan in families.PLANS.items():
        shape = SHAPES[plan.shape]
        full = full_layers(shape) or range(1, shape["num_hidden_layers"])
        cuts = MEASURED.cuts(shape)
        assert len(cuts) == 2 and all(layer in full for layer, _ in cuts), name
        assert 1.4 < flop_bound(shape, cuts, families.SHORT) < 1.6, name


def test_cuts_go_by_the_pages_of_hidden_states():
    """As in an engine: two pages for Llama 3.1, one for Llama 2, whose hidden state is half as
    large as its keys and values."""
    for name, pages in (("Llama-3.1-8B", 2), ("Llama-2-7B", 1)):
        assert AGGRESSIVE.cuts(SHAPES[name]) == preset_cuts("aggressive", 32, None, pages)
        assert AGGRESSIVE.cuts(SHAPES[name]) != preset_cuts("aggressive", 32)


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


def _rows(shape: str = "Llama-3.1-8B") -> list[Row]:
    place = {"gpu": "G", "vllm": "v", "torch": "t", "triton": "3", "date": "d", "commit": "c"}
    rows = []
    for benchmark, unit, tokens, batch, stock, lazy in (
        ("ttft", "ms", 4096, 1, 100.0, 50.0),
        ("ttft", "ms", 16384, 1, 500.0, 200.0),
        ("decode", "ms", 8192, 1, 5.0, 5.5),
        ("memory", "requests", 32768, 1, 26.0, 45.0),
        ("throughput", "tokens/s", 16384, 64, 100.0, 250.0),
    ):
        for engine, value in (("stock", stock), (MEASURED.name, lazy)):
            row = Row.of(
                [{"value": value}],
                benchmark=benchmark,
                shape=shape,
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
    assert "| 16,384 | 500.0 | 200.0 | 2.50x | 119% |" in text
    assert "| 8,192 | 1 | 5.00 | 5.50 | 1.100 |" in text
    assert "| 26 | 45 | 1.73x |" in text and "| 100 | 250 | 2.50x |" in text
    assert "<svg" in (tmp_path / "ttft.svg").read_text()
    assert "<svg" in (tmp_path / "room.svg").read_text()


def test_older_results_name_their_engine(tmp_path):
    """Before the default preset was measured everything was with another one."""
    file, page = tmp_path / "speed.jsonl", tmp_path / "benchmarks.md"
    old = [replace(r, engine="aggressive") if r.engine != "stock" else r for r in _rows()]
    page.write_text("<!-- speed: begin -->\n<!-- speed: end -->\n")
    for rows, share in ((old, "`aggressive`"), (old + _rows(), f"`{MEASURED.name}`")):
        write(file, rows)
        report.main(page, file)
        assert f"| {share}, ms | speed-up | share of the bound |" in page.read_text()
        assert "| 26 | 45 | 1.73x |" in page.read_text()
    assert "The preset `aggressive` beside" in families_report.section(old)


def test_what_was_measured_elsewhere_is_said():
    rows = _rows()
    here = "One G, vLLM v, torch t, Triton 3; d, commit c."
    assert report.section(rows).count(here) == 1
    for row in rows:
        if row.benchmark == "decode":
            row.environment = row.environment | {"gpu": "another", "commit": "e"}
    text = report.section(rows)
    assert text.startswith(here + " bf16")
    assert "as in stock vLLM. One another, vLLM v, torch t, Triton 3; d, commit e.\n" in text


def test_the_readme_names_the_place_of_speed_and_of_room():
    rows = _rows()
    here = "shape on one G, stock vLLM v at its defaults (d). Answers"
    assert here in headline.section(rows, [])
    for row in rows:
        if row.benchmark == "memory":
            row.environment = row.environment | {"gpu": "another"}
    text = headline.section(rows, [])
    assert "on one G, stock vLLM v at its defaults (d), the room on one another, stock" in text


def test_first_tokens_by_length(tmp_path):
    """A prompt that is not pruned, a preset that was measured on one length only, two shapes."""
    rows = [row for row in _rows() if row.benchmark == "ttft"]
    rows += [replace(row, tokens=512, flop_bound=None) for row in rows[:2]]
    rows.append(replace(rows[1], engine="balanced", median=80.0, ratio=1.25))
    lines = report.section(rows + _rows("Llama-2-7B")).splitlines()
    assert "| 4,096 | 100.0 | 50.0 | 2.00x | 95% | 80.0 | 1.25x |" in lines
    assert "| 16,384 | 500.0 | 200.0 | 2.50x | 119% | – | – |" in lines
    assert "| 512 | 100.0 | 50.0 | 2.00x | not pruned | – | – |" in lines
    assert "| 4,096 | 100.0 | 50.0 | 2.00x | 95% |" in lines
    assert sum(line.startswith(("| Llama-3.1-8B: ", "| Llama-2-7B: ")) for line in lines) == 2
    # Lengths too near each other for labels have points, and no labels.
    near = [replace(row, tokens=5000) for row in rows[:2]]
    report.draw_ttft(rows[:2] + near + rows[2:4], tmp_path / "ttft.svg")
    plot = (tmp_path / "ttft.svg").read_text()
    assert "<!-- 4,096 -->" in plot and "<!-- 16,384 -->" in plot and "<!-- 5,000 -->" not in plot


def test_the_report_of_families(tmp_path):
    """A length that was not measured, and a model that has no rows."""
    file, page = tmp_path / "families.jsonl", tmp_path / "benchmarks.md"
    page.write_text("before\n")
    families_report.main(page, file)
    assert page.read_text() == "before\n"
    write(file, _rows("Gemma-3-4B"))
    for _ in range(2):  # the second finds the section there
        families_report.main(page, file)
        text = page.read_text()
        assert text.startswith("before\n") and text.count("families: begin") == 1
        line = "| 100.0 → 50.0 | 2.00x | 2.10x | 95% | – | – | – | – | 1.10x | 1.73x |"
        assert f"| Gemma-3-4B {line}" in text and "Qwen3" not in text


def test_families_by_name(tmp_path, monkeypatch):
    """Of others the rows stay; one that fails is told at the end."""
    file = tmp_path / "families.jsonl"
    write(file, _rows("Mistral-7B"))

    def run(plan, report, show):
        if plan.name == "Qwen3-8B":
            raise RuntimeError("no [room]")
        for row in _rows(plan.name):
            report(row)

    monkeypatch.setattr(cases, "run", run)
    args = argparse.Namespace(
        only=["Qwen3-8B", "Gemma-3-4B"], out=file, commit="c", plans=families.PLANS
    )
    with pytest.raises(SystemExit, match="failed: Qwen3-8B$"):
        run_families.main(args)
    assert {row.shape for row in read(file, Row)} == {"Mistral-7B", "Gemma-3-4B"}
    args.only = ["Qwen9"]
    with pytest.raises(SystemExit, match="no such model: Qwen9; there are Qwen3-8B, "):
        run_families.main(args)


def test_random_weights():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm

    from benchmarks.weights import randomize

    def part(**parameters) -> torch.nn.Module:
        module = torch.nn.Module()
        for name, shape in parameters.items():
            weight = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
            module.register_parameter(name, weight)
        return module

    def spread(weight: torch.Tensor) -> float:
        return weight.std().item()

    model = part()
    model.embed_tokens, model.lm_head = part(weight=(500, 64)), part(weight=(500, 64))
    model.qkv_proj, model.experts = part(weight=(256, 64)), part(w2_weight=(8, 64, 256))
    model.mlp = part()
    model.mlp.gate = part(weight=(512, 64))
    model.q_norm, model.input_layernorm = part(weight=(64,)), part(weight=(64,))
    model.attn = part(sinks=(64,), bias=(64,))
    with set_current_vllm_config(VllmConfig()):
        model.post_norm, model.k_norm = GemmaRMSNorm(64), GemmaRMSNorm(64)
    # As vLLM has it after loading: transposed, and one scale.
    model.fp8 = part(weight_scale=(1,))
    stored = torch.zeros(128, 1024).to(torch.float8_e4m3fn).t()
    model.fp8.weight = torch.nn.Parameter(stored, requires_grad=False)
    model.fp8.input_size_per_partition = 1024
    # With one scale a block of 128 x 128.
    model.fp8_blocks = part(weight_scale_inv=(8, 1))
    stored = torch.zeros(1024, 128).to(torch.float8_e4m3fn)
    model.fp8_blocks.weight = torch.nn.Parameter(stored, requires_grad=False)
    randomize(model)
    assert spread(model.embed_tokens.weight) == pytest.approx(1, rel=0.05)
    assert spread(model.lm_head.weight) == pytest.approx(1 / 8, rel=0.05)
    assert spread(model.qkv_proj.weight) == pytest.approx(1.5 / 8, rel=0.05)
    assert spread(model.mlp.gate.weight) == pytest.approx(2 / 8, rel=0.05)
    assert spread(model.experts.w2_weight) == pytest.approx(1 / 16, rel=0.05)
    for norm, weight in (
        ("q_norm", 1.5),
        ("input_layernorm", 1),
        ("post_norm", 0),
        ("k_norm", 0.5),
    ):
        assert (model.get_submodule(norm).weight == weight).all(), norm
    assert 0 < spread(model.attn.bias) < 0.1 and spread(model.attn.sinks) > 1
    real = model.fp8.weight.float() * model.fp8.weight_scale
    assert spread(real) == pytest.approx(1 / 32, rel=0.05)
    assert model.fp8.weight.stride() == (1, 1024)
    scale = model.fp8_blocks.weight_scale_inv.repeat_interleave(128, 0)
    assert spread(model.fp8_blocks.weight.float() * scale) == pytest.approx(128**-0.5, rel=0.05)
    model.lm_head.weight = model.embed_tokens.weight
    randomize(model)
    assert spread(model.lm_head.weight) == pytest.approx(1 / 8, rel=0.05)
