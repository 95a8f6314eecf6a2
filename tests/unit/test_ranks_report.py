"""The benchmark of several GPUs, without any."""

import pytest

from benchmarks.results import write
from benchmarks.speed import ranks_report
from benchmarks.speed.measure_ranks import kind_of
from benchmarks.speed.ranks import PLANS
from benchmarks.speed.results import Row
from benchmarks.speed.shapes import SHAPES

ENVIRONMENT = {"gpu": "G", "vllm": "v", "torch": "t", "triton": "3", "date": "d", "commit": "c"}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("ncclDevKernel_AllReduce_Max_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "scores"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "scores"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgs)", "reductions"),
        ("void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(...)", "reductions"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgs)", "gathers"),
        ("_dense_scores_kernel", "scores' kernels"),
        ("ncclDevKernel_SendRecv", "others"),
        ("void flash::prepare_varlen_num_blocks_kernel", None),
    ],
)
def test_kernels_by_name(kernel, kind):
    assert kind_of(kernel) == kind


def test_plans_fit_their_models():
    """Every rank has a query head, and a context that the model has."""
    for plan in PLANS.values():
        shape = SHAPES[plan.shape]
        assert shape["num_attention_heads"] % plan.options["tensor_parallel_size"] == 0
        assert plan.max_len <= shape["max_position_embeddings"]
        assert max(case.arguments["tokens"] for case in plan.cases) < plan.max_len


def test_the_tables(tmp_path):
    """A length that was not measured; costs of both engines side by side."""
    page, file = tmp_path / "benchmarks.md", tmp_path / "ranks.jsonl"
    page.write_text("before\n")
    ranks_report.main(page, file)
    assert page.read_text() == "before\n"
    rows = []
    for engine, value, ratio in (("stock", 100.0, 1.0), ("balanced", 40.0, 2.5)):
        common = {"shape": "Llama-3.1-8B, 2 GPUs", "engine": engine, "runs": 1}
        common |= {"environment": ENVIRONMENT, "ratio": ratio}
        figure = {"median": value, "least": value, "most": value, "unit": "ms"}
        bound = None if engine == "stock" else 2.0
        rows += [
            Row("ttft", tokens=4096, batch=1, flop_bound=bound, **figure, **common),
            Row("decode", tokens=8192, batch=16, **figure, **common),
            Row(
                "collectives",
                tokens=32768,
                batch=1,
                details={"scores": value / 100, "decode": value / 10, "decode_scores": 0.05},
                **figure,
                **common,
            ),
        ]
    write(file, rows)
    ranks_report.main(page, file)
    text = page.read_text()
    line = "| 100.0 → 40.0 (2.50x, 125%) | – | – | – | – | 100.0 → 40.0 | – |"
    assert f"| Llama-3.1-8B, 2 GPUs | balanced {line}" in text
    costs = "| 100.0 → 40.0 | 0.40 | 10.00 → 4.00 | 0.050 |"
    assert f"| Llama-3.1-8B, 2 GPUs | balanced {costs}" in text
