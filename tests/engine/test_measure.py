"""The speed benchmark's measurements, on an engine that is too small to time."""

import pytest
from harness.tiny import TINY_SHAPE

from benchmarks.engine import Engine
from benchmarks.speed.start import start


@pytest.fixture
def engine(tmp_path):
    options = {
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "block_size": 128,
        "num_gpu_blocks_override": 64,
    }
    config = {"prune": [{"layer": 2, "keep": 0.5}], "min_prompt_tokens": 512}
    config |= {"revive_min_score": 0}  # random weights look at nothing in particular
    arguments = {"shape": TINY_SHAPE, "config": config, "options": options}
    engine = Engine(start, arguments, "benchmarks.speed.measure", tmp_path / "log")
    yield engine
    engine.close()


def test_an_engine_is_measured(engine):
    assert engine.ready()["vllm"].startswith("0.3")
    assert engine.run("ttft", tokens=600)["value"] > 0
    decoded = engine.run("decode", tokens=1000, batch=2, steps=6)
    assert decoded["value"] > 0 and 0 < decoded["revived"] <= 15
    # 63 blocks of two pages, 128 slots each. A prompt of 1,000 takes 8 in each of the two groups of
    # stage 0, which are two layers and a page of hidden states, 5 in stage 1 (500 and a tenth of
    # the rest), and 1 of its own: 24 bytes of state a position.
    assert engine.run("room", tokens=1000)["value"] == 63 // 22
    through = engine.run("throughput", requests=3, tokens=600, max_tokens=4)
    assert through["value"] > 0 and through["peak_running"] == 3
