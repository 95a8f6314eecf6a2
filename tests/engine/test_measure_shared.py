"""The speed benchmark's measurements of shared prefixes and arriving prompts, on engines that are
too small to time."""

import pytest
from harness.tiny import TINY_SHAPE

from benchmarks.engine import Engine
from benchmarks.speed.shared import PLAN
from benchmarks.speed.start import start

SHAPE = TINY_SHAPE | {"head_dim": 32}  # the least that stock vLLM has on a CPU
CONFIG = {"prune": [{"layer": 2, "keep": 0.5}], "min_prompt_tokens": 256, "reuse": "deep"}


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
    engine.is_deep = request.param is not None
    yield engine
    engine.close()


def test_second_turns(engine):
    found = engine.run("second_turn", tokens=600, answer=9, more=40)
    assert (found["cold_tokens"], found["shared"], found["tokens"]) == (600, 609, 649)
    assert found["cold"] > 0 < found["value"]
    # The last token of the answer never ran; whole blocks of 32.
    assert found["cached"] == 608
    assert found["reused"] == (608 if engine.is_deep else 0)


@pytest.mark.parametrize("tokens, reused", ((120, 0), (220, 224)))
def test_second_turns_of_short_conversations(engine, tokens, reused):
    """The first turn is not pruned. Nor is the second, if it is short, or goes on: from the whole
    blocks of 228 tokens."""
    found = engine.run("second_turn", tokens=tokens, answer=9, more=40)
    assert found["cached"] == (tokens + 8) // 32 * 32
    assert found["reused"] == (reused if engine.is_deep else 0)


def test_second_questions(engine):
    for _ in range(2):  # other documents each time, or the second's first question would hit
        found = engine.run("second_question", tokens=640, more=24)
        assert (found["cold_tokens"], found["shared"], found["tokens"]) == (664, 640, 664)
        assert found["cached"] == 640 and found["reused"] == 0


def test_questions_about_a_document(engine):
    found = engine.run("question_about_document", tokens=640, more=24)
    assert (found["cold_tokens"], found["shared"], found["tokens"]) == (640, 640, 664)
    assert found["cached"] == 640 and found["reused"] == (640 if engine.is_deep else 0)


def test_questions_that_come_at_once(engine):
    found = engine.run("questions_at_once", tokens=640, more=24, batch=3)
    assert 0 < found["value"] <= found["longest"]


def test_arrivals(engine):
    for _ in range(2):
        found = engine.run("arrival", tokens=900, batch=3, decoded=60)
        assert found["value"] > 0 and found["ttft"] > 0 and found["usual"] > 0


def test_extensions_among_decodes(engine):
    for _ in range(2):
        found = engine.run("extension", tokens=600, answer=9, more=40, batch=3, decoded=60)
        assert found["value"] > 0 and found["ttft"] > 0 and found["usual"] > 0
        assert found["cached"] == 608 and found["reused"] == (608 if engine.is_deep else 0)


def test_throughput(engine):
    alone = engine.run("throughput", requests=3, tokens=400, max_tokens=4)
    assert alone["value"] > 0 and alone["cached"] == 0
    shared = engine.run("throughput", requests=3, tokens=400, max_tokens=4, shared=320)
    assert shared["value"] > 0 and shared["cached"] == 320


def test_what_was_not_reused_is_told(engine):
    """The last test, since it ends the engine. More than twice as long as what was pruned, a prompt
    is pruned anew."""
    if engine.is_deep:
        with pytest.raises(RuntimeError, match="went on from 0 tokens, and shares 309"):
            engine.run("second_turn", tokens=300, answer=9, more=400)
