"""The speed benchmark's measurements of shared prefixes and arriving prompts, on engines that are
too small to time."""

import pytest
from harness.tiny import TINY_SHAPE

from benchmarks.engine import Engine
from benchmarks.speed.shared import PLAN
from benchmarks.speed.start import start

SHAPE = TINY_SHAPE | {"head_dim": 32}  # the least that stock vLLM has on a CPU
CONFIG = {"prune": [{"layer": 2, "keep": 0.5}], "min_prompt_tokens": 256}


@pytest.fixture(scope="module", params=(None, CONFIG), ids=("stock", "lazyllm"))
def engine(request, tmp_path_factory):
    options = {
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "enforce_eager": True,
        "block_size": 32,
        "num_gpu_blocks_override": 1024,
    }
    arguments = {"shape": SHAPE, "config": request.param, "options": options}
    engine = Engine(start, arguments, PLAN.functions, tmp_path_factory.mktemp("engine") / "log")
    engine.ready()
    yield engine
    engine.close()


def test_second_turns(engine):
    found = engine.run("second_turn", tokens=600, answer=9, more=40)
    assert (found["cold_tokens"], found["shared"], found["tokens"]) == (600, 609, 649)
    assert found["cold"] > 0 < found["value"]
    # The last token of the answer never ran; whole blocks of 32.
    assert found["cached"] == 608


def test_second_questions(engine):
    for _ in range(2):  # other documents each time, or the second's first question would hit
        found = engine.run("second_question", tokens=640, more=24)
        assert (found["cold_tokens"], found["shared"], found["tokens"]) == (664, 640, 664)
        assert found["cached"] == 640


def test_arrivals(engine):
    for _ in range(2):
        found = engine.run("arrival", tokens=900, batch=3, decoded=60)
        assert found["value"] > 0 and found["ttft"] > 0 and found["usual"] > 0


def test_throughput(engine):
    alone = engine.run("throughput", requests=3, tokens=400, max_tokens=4)
    assert alone["value"] > 0 and alone["cached"] == 0
    shared = engine.run("throughput", requests=3, tokens=400, max_tokens=4, shared=320)
    assert shared["value"] > 0 and shared["cached"] == 320
