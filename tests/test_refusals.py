"""What cannot work is refused before weights load, in one line that names the flag."""

from types import SimpleNamespace

import pytest

from vllm import EngineArgs

from lazyllm_vllm.checks import check_attention
from lazyllm_vllm.config import ConfigError
from lazyllm_vllm.stats import request_stats

BALANCED = {"lazyllm": {"preset": "balanced"}}


def _create(model, config=BALANCED, **flags):
    flags = {"max_model_len": 1024, "dtype": "float32"} | flags
    return EngineArgs(model=str(model), additional_config=config, **flags).create_engine_config()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "--speculative-config",
        ),
        ({"enable_lora": True}, "--enable-lora"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"kv_transfer_config": {"kv_connector": "x", "kv_role": "kv_both"}}, "--kv-transfer"),
        ({"attention_backend": "CPU_ATTN"}, "--attention-backend"),
        ({"runner": "pooling"}, "--runner pooling"),
        ({"hf_overrides": {"architectures": ["MambaForCausalLM"]}}, "supported: LlamaForCausalLM"),
    ],
)
def test_flags(smollm2, flags, says):
    with pytest.raises(ConfigError) as error:
        _create(smollm2, **flags)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"prune": [{"layer": 30, "keep": 0.5}]}, "outside the model"),
        ({"no_such_field": 1}, "no_such_field: unknown field"),
    ],
)
def test_configurations(smollm2, config, says):
    with pytest.raises(ConfigError, match=says):
        _create(smollm2, {"lazyllm": config})


def test_model_runner_v1(smollm2, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ConfigError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        _create(smollm2)


def test_what_is_switched_off(smollm2):
    """A token budget that holds no whole prompt is replaced, one that does is kept."""
    small = _create(smollm2, max_num_batched_tokens=512)
    assert small.scheduler_config.max_num_batched_tokens >= 1024
    off = small.additional_config["lazyllm_switched_off"]
    assert {"prefix caching", "chunked prefill", "max_num_batched_tokens=512"} <= set(off)
    assert not small.cache_config.enable_prefix_caching
    assert not small.scheduler_config.enable_chunked_prefill
    large = _create(smollm2, max_num_batched_tokens=4096)
    assert large.scheduler_config.max_num_batched_tokens == 4096
    # Less than a prompt a step would leave it waiting for ever.
    few = _create(smollm2, max_num_scheduled_tokens=512)
    assert few.scheduler_config.max_num_scheduled_tokens is None
    assert "max_num_scheduled_tokens=512" in few.additional_config["lazyllm_switched_off"]


def test_the_same_arguments_make_the_same_engine_twice(smollm2):
    args = EngineArgs(
        model=str(smollm2), additional_config=BALANCED, max_model_len=1024, dtype="float32"
    )
    first, second = args.create_engine_config(), args.create_engine_config()
    assert first.additional_config == second.additional_config
    assert first.model_config.architectures == second.model_config.architectures
    assert first.scheduler_config == second.scheduler_config


@pytest.mark.parametrize(
    ("attribute", "value", "says"),
    [
        ("sliding_window", 128, "sliding window"),
        ("kv_cache_dtype", "fp8", "a fp8 KV cache"),
        ("impl", SimpleNamespace(scale=1, logits_soft_cap=30.0), "soft-capped"),
        ("impl", SimpleNamespace(scale=1, alibi_slopes=[1.0]), "ALiBi"),
    ],
)
def test_attention_that_does_more(attribute, value, says):
    plain = {
        "layer_name": "layers.0", "attn_type": "decoder", "sliding_window": None,
        "kv_cache_dtype": "auto", "impl": SimpleNamespace(scale=1, alibi_slopes=None),
    }  # fmt: skip
    check_attention(SimpleNamespace(**plain))
    with pytest.raises(ConfigError, match=says):
        check_attention(SimpleNamespace(**plain | {attribute: value}))


def test_without_a_config_nothing_changes(smollm2):
    config = _create(smollm2, {}, enable_prefix_caching=True, enable_chunked_prefill=True)
    assert config.model_config.architectures == ["LlamaForCausalLM"]
    assert config.cache_config.enable_prefix_caching
    assert not config.parallel_config.worker_extension_cls


def test_stats_of_a_stock_engine_are_refused():
    stock = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    with pytest.raises(RuntimeError, match="runs without LazyLLM"):
        request_stats(SimpleNamespace(llm_engine=stock))


def test_another_vllm_is_refused(monkeypatch):
    import vllm

    from lazyllm_vllm import plugin

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(RuntimeError, match=r"works with vLLM 0\.32, this is vLLM 0\.33\.1"):
        plugin.register()


def test_a_changed_vllm_is_noticed(monkeypatch):
    from lazyllm_vllm import patches

    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self: None)
    with pytest.raises(RuntimeError, match="create_engine_config is not the one of vLLM 0.32"):
        patches.install()
