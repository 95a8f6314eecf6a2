"""Engines that start, and those that are told at once why they do not."""

import pytest
from harness.tiny import tiny_model

CONFIG = {"prune": [{"layer": 2, "keep": 0.3}], "min_prompt_tokens": 100}
OPTIONS = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "block_size": 16,
    "num_gpu_blocks_override": 100,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"spec_method": "ngram", "spec_tokens": 2}, "speculative decoding does not work"),
        ({"kv_offloading_size": 1}, "a KV connector or KV offloading does not work"),
        ({"attention_config": {"backend": "CPU_ATTN"}}, "leave it out, LazyLLM brings its own"),
    ],
)
def test_flags_that_arrive_by_another_road(tiny, open_engine, options, says):
    engine = open_engine(tiny, CONFIG, **OPTIONS | options)
    with pytest.raises(RuntimeError, match=says):
        engine.run("facts")
    assert "Loading model" not in engine.log, "before weights load"


class Extension:
    """Such as training frameworks bring."""

    def framework_says(self) -> str:
        return f"hello from rank {self.rank}"


def test_a_worker_extension_beside_ours(tiny, open_engine):
    extension = f"{__name__}.{Extension.__name__}"
    engine = open_engine(tiny, CONFIG, **OPTIONS, worker_extension_cls=extension)
    result = engine.generate([[7] * 120], 2)
    assert result["stats"][0]["kept"] == [120, 36]
    assert engine.run("call_worker", method="framework_says") == ["hello from rank 0"]
