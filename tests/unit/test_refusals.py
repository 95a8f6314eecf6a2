"""What cannot work is refused before weights load, in one line that names the flag."""

import inspect
from types import SimpleNamespace

import pytest
from harness.tiny import tiny_model

from vllm import EngineArgs

from lazyllm_vllm.hooks.attention_backend import LazyAttentionBackend
from lazyllm_vllm.hooks.engine_config import block_needs, block_size, schedule_of
from lazyllm_vllm.hooks.refusals import check_attention
from lazyllm_vllm.hooks.requests import RequestChecks, RequestError
from lazyllm_vllm.observe.stats import request_stats
from lazyllm_vllm.plan.blocks import BlockNeeds
from lazyllm_vllm.plan.config import ConfigError
from lazyllm_vllm.plan.presets import preset_cuts

PRUNED = {"lazyllm": {"preset": "aggressive"}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def _create(model, config=PRUNED, **flags):
    flags = {"max_model_len": 1024, "dtype": "float32", "skip_tokenizer_init": True} | flags
    return EngineArgs(model=str(model), additional_config=config, **flags).create_engine_config()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"tensor_parallel_size": 4, "enable_expert_parallel": True}, "--enable-expert-parallel"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "--speculative-config or --spec-method",
        ),
        ({"spec_method": "ngram", "spec_tokens": 2}, "--speculative-config or --spec-method"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype: use auto or fp8"),
        (
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
            "--kv-cache-dtype-skip-layers",
        ),
        ({"enable_return_routed_experts": True}, "--enable-return-routed-experts"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config",
        ),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"attention_backend": "CPU_ATTN"}, "--attention-backend"),
        ({"attention_config": {"backend": "CPU_ATTN"}}, "--attention-config.backend"),
        ({"runner": "pooling"}, "--runner"),
        ({"scheduler_reserve_full_isl": False}, "--scheduler-reserve-full-isl: leave it on"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "--worker-cls"),
        ({"model_impl": "transformers"}, "--model-impl"),
        ({"hf_overrides": {"architectures": ["MambaForCausalLM"]}}, '"allow_untested_model": true'),
    ],
)
def test_flags(tiny, flags, says):
    with pytest.raises(ConfigError) as error:
        _create(tiny, **flags)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_page_smaller_than_a_hidden_state(tmp_path):
    """Before weights load; a page holds block_size tokens of one KV head of 32."""
    model = tiny_model(tmp_path, hidden_size=1600, num_attention_heads=50, num_key_value_heads=1)
    with pytest.raises(ConfigError, match="raise --block-size to 32 or more"):
        _create(model, block_size=16)
    assert _create(model, block_size=32)


@pytest.mark.parametrize(
    "asked_for, vllms, expected", ((16, 16, 16), (None, 16, 64), (None, 128, 128))
)
def test_tokens_a_block(asked_for, vllms, expected):
    """As many as the user says; else 64, or what vLLM takes if that is more. What vLLM is told at
    start is the same."""
    cache = SimpleNamespace(block_size=vllms, user_specified_block_size=asked_for is not None)
    assert block_size(SimpleNamespace(cache_config=cache)) == expected
    if asked_for is None:
        assert LazyAttentionBackend.get_preferred_block_size(vllms) == expected


def test_a_kv_cache_of_the_models_own_type_is_no_reason(tiny):
    assert _create(tiny, dtype="bfloat16", kv_cache_dtype="bfloat16")


def test_blocks_by_the_type_of_the_kv_cache(tiny):
    """In FP8 a hidden state has half the bytes, and fewer positions' state fits in its slot."""
    whole, half = (_create(tiny, dtype="bfloat16", **f) for f in ({}, {"kv_cache_dtype": "fp8"}))
    whole, half = block_needs(whole), block_needs(half)
    assert whole.vector_size == 64 * 2 and half.vector_size == 64
    assert whole.page_size == 2 * half.page_size == whole.block_size * 2 * 2 * 32 * 2
    assert whole.schedule == half.schedule


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"lazyllm": {"prune": [{"layer": 30, "keep": 0.5}]}}, "outside the model"),
        ({"lazyllm": {"no_such_field": 1}}, "no_such_field: unknown field"),
        ({"lazyllm": {"reuse": "always"}}, "reuse: Input should be 'off', 'exact' or 'deep'"),
        ({"lazy_llm": {"preset": "balanced"}}, "has the key 'lazy_llm'; use 'lazyllm'"),
        ({"LazyLLM": "balanced"}, "has the key 'LazyLLM'; use 'lazyllm'"),
        ({"lazylm": "balanced"}, "has the key 'lazylm'; use 'lazyllm'"),
    ],
)
def test_configurations(tiny, config, says):
    with pytest.raises(ConfigError, match=says):
        _create(tiny, config)


def test_deep_reuse_without_a_prefix_cache(tiny):
    config = {"lazyllm": {"preset": "balanced", "reuse": "deep"}}
    with pytest.raises(ConfigError, match="leave out --no-enable-prefix-caching"):
        _create(tiny, config, enable_prefix_caching=False)
    assert _create(tiny, config)


def test_other_keys_of_additional_config_are_left_alone(tiny):
    config = _create(tiny, {"ascend": {"lazy": True}, "kda_prefill_backend": "auto"})
    assert config.model_config.architectures == ["LlamaForCausalLM"]


def test_model_runner_v1(tiny, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ConfigError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        _create(tiny)


OFF = {"enable_prefix_caching": False, "enable_chunked_prefill": False}


@pytest.mark.parametrize("longest", [1024, None, -1])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        OFF | {"max_num_batched_tokens": 8192},
        {"max_num_batched_tokens": 512},  # less than the longest prompt
        {"max_num_scheduled_tokens": 100, "max_num_batched_tokens": 512},
        {"long_prefill_token_threshold": 100},
    ],
)
def test_prefixes_chunks_and_budgets_are_the_users(tiny, longest, flags):
    """As in stock vLLM, whether a prompt of the greatest length fits in a step or not."""
    mine, stock = (_create(tiny, c, max_model_len=longest, **flags) for c in (PRUNED, {}))
    assert mine.cache_config.enable_prefix_caching == stock.cache_config.enable_prefix_caching
    assert mine.cache_config.enable_prefix_caching == flags.get("enable_prefix_caching", True)
    chunked = mine.scheduler_config.enable_chunked_prefill
    assert chunked == flags.get("enable_chunked_prefill", True)
    assert mine.scheduler_config == stock.scheduler_config
    assert mine.scheduler_config.scheduler_reserve_full_isl
    for field in ("max_num_batched_tokens", "long_prefill_token_threshold"):
        assert getattr(mine.scheduler_config, field) == flags.get(
            field, getattr(stock.scheduler_config, field)
        )
    off = mine.additional_config["lazyllm_switched_off"]
    assert not any(word in what for what in off for word in ("prefix", "chunk", "token"))


def test_what_is_switched_off(tiny):
    """Of a model, torch.compile alone; nothing where nobody asked for it."""
    assert _create(tiny, enforce_eager=True).additional_config["lazyllm_switched_off"] == []
    compiled = _create(tiny, compilation_config={"mode": 3})
    assert "torch.compile of the model" in compiled.additional_config["lazyllm_switched_off"]


@pytest.mark.parametrize("block_size", [16, 64])
def test_a_presets_cuts_go_by_the_pages_of_hidden_states(tmp_path, block_size):
    """Whatever the block size: 2 * 2 * 32 numbers of keys and values a token and layer, so that a
    hidden state of 320 takes three pages."""
    model = tiny_model(tmp_path, hidden_size=320, num_attention_heads=10, num_hidden_layers=32)
    config = _create(model, block_size=block_size)
    cuts = preset_cuts("aggressive", 32, parked_pages=3)
    assert cuts != preset_cuts("aggressive", 32), "a weak test"
    schedule = schedule_of(config)
    assert schedule.starts == (0, *(layer for layer, _ in cuts), 32)
    page, vector = block_size * 128 * 4, 320 * 4
    assert BlockNeeds(schedule, block_size, page, vector).parked_pages == 3


def test_the_same_arguments_make_the_same_engine_twice(tiny):
    args = EngineArgs(
        model=str(tiny),
        additional_config=PRUNED,
        max_model_len=1024,
        dtype="float32",
        max_num_batched_tokens=512,
        skip_tokenizer_init=True,
    )
    first, second = args.create_engine_config(), args.create_engine_config()
    assert first.additional_config == second.additional_config
    assert first.model_config.architectures == second.model_config.architectures
    assert first.scheduler_config == second.scheduler_config


@pytest.mark.parametrize(
    ("attribute", "value", "says"),
    [
        ("sliding_window", 128, "windows that config.json does not tell of"),
        ("head_size_v", 64, "values of another size"),
        ("kv_sharing_target_layer_name", "layers.1", "keys shared between layers"),
        ("impl", SimpleNamespace(scale=1, logits_soft_cap=30.0), "soft-capped"),
        ("impl", SimpleNamespace(scale=1, alibi_slopes=[1.0]), "ALiBi"),
    ],
)
def test_attention_that_does_more(attribute, value, says):
    plain = {
        "layer_name": "layers.0",
        "attn_type": "decoder",
        "sliding_window": None,
        "head_size": 128,
        "head_size_v": 128,
        "kv_sharing_target_layer_name": None,
        "impl": SimpleNamespace(scale=1, alibi_slopes=None),
    }
    check_attention(SimpleNamespace(**plain), is_full=True)
    with pytest.raises(ConfigError, match=says):
        check_attention(SimpleNamespace(**plain | {attribute: value}), is_full=True)


def test_experts_in_data_parallel_replicas(tmp_path):
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    model = tiny_model(tmp_path, **config, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(ConfigError, match="--data-parallel-size: set it to 1"):
        _create(model, data_parallel_size=2)


def test_heads_that_ranks_cannot_share(tmp_path):
    """vLLM itself sees to query heads; of KV heads it notes nothing before its workers stumble."""
    model = tiny_model(tmp_path, hidden_size=96, num_attention_heads=12, num_key_value_heads=4)
    with pytest.raises(ConfigError, match="--tensor-parallel-size: choose another"):
        _create(model, tensor_parallel_size=6)
    _create(model, tensor_parallel_size=12)


def _request(num_prompt, resumable=False, **params):
    fields = {"prompt_logprobs": None, "prompt_logprob_token_ids": None, "max_tokens": 5}
    fields["extra_args"] = None
    return SimpleNamespace(
        prompt_token_ids=[1] * num_prompt,
        sampling_params=SimpleNamespace(**fields | params),
        resumable=resumable,
    )


def test_requests(tiny):
    checks = RequestChecks(_create(tiny, max_model_len=2048))
    checks.check(_request(1500))
    checks.check(_request(1000, prompt_logprobs=0))
    with pytest.raises(RequestError, match="prompt_logprobs .* min_prompt_tokens, now 1024"):
        checks.check(_request(1024, prompt_logprobs=0))
    with pytest.raises(RequestError, match="prompt_logprob_token_ids"):
        checks.check(_request(1500, prompt_logprob_token_ids=[[1]]))
    with pytest.raises(RequestError, match="comes in parts"):
        checks.check(_request(3, resumable=True))
    assert issubclass(RequestError, ValueError)


def test_requests_that_do_not_fit(tiny):
    """30 blocks of 16 tokens, one kept back by vLLM. Until prompts are pruned each token takes a
    slot in each of 3 stages of two layers, and one more for the page where its hidden state is
    parked, which makes stage 0 two groups."""
    prune = {"prune": [{"layer": 2, "keep": 0.1}, {"layer": 4, "keep": 0.1}]}
    config = {"lazyllm": prune | {"min_prompt_tokens": 200}}
    flags = {"max_model_len": 256, "num_gpu_blocks_override": 30, "block_size": 16}
    checks = RequestChecks(_create(tiny, config, **flags))
    fits = 29 // 4 * 16
    checks.check(_request(fits - 4))
    checks.check(_request(200))
    for num_prompt, max_tokens in ((fits - 3, 5), (150, 1), (10, 150)):
        with pytest.raises(RequestError, match="lower max_tokens, lower min_prompt_tokens"):
            checks.check(_request(num_prompt, max_tokens=max_tokens))
    enough = _create(tiny, config, **flags | {"num_gpu_blocks_override": 80})
    RequestChecks(enough).check(_request(150, max_tokens=100))


@pytest.mark.parametrize(
    ("flags", "engines"),
    (
        ({}, 4),
        ({"data_parallel_hybrid_lb": True, "data_parallel_size_local": 2}, 2),
    ),
)
def test_own_settings_by_one_engines_blocks(tiny, flags, engines):
    """``num_gpu_blocks`` is of all engines that a front end sends to; vLLM sets it when they are
    up. A prompt of 64 whole tokens takes 4 blocks in each of 4 groups."""
    prune = {"prune": [{"layer": 2, "keep": 0.1}, {"layer": 4, "keep": 0.1}]}
    lazyllm = {"lazyllm": prune | {"min_prompt_tokens": 50}}
    config = _create(tiny, lazyllm, block_size=16, data_parallel_size=4, **flags)
    checks = RequestChecks(config)
    whole = _request(64, extra_args={"lazyllm": "off"})
    config.cache_config.num_gpu_blocks = engines * (16 + 1)
    checks.check(whole)
    config.cache_config.num_gpu_blocks -= 1
    with pytest.raises(RequestError, match="needs 16 blocks .* there are 15"):
        checks.check(whole)


def test_without_a_config_nothing_changes(tiny):
    config = _create(tiny, {}, enable_prefix_caching=True, enable_chunked_prefill=True)
    assert config.model_config.architectures == ["LlamaForCausalLM"]
    assert config.cache_config.enable_prefix_caching
    assert not config.parallel_config.worker_extension_cls


def test_a_worker_extension_is_the_users(tiny):
    config = _create(tiny, worker_extension_cls="some.Extension")
    assert config.parallel_config.worker_extension_cls == "some.Extension"


def test_stats_of_a_stock_engine_are_refused():
    stock = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    with pytest.raises(RuntimeError, match="runs without LazyLLM"):
        request_stats(SimpleNamespace(llm_engine=stock))


def test_another_vllm_is_refused(monkeypatch):
    import vllm

    from lazyllm_vllm.hooks import plugin

    monkeypatch.setattr(vllm, "__version__", "0.34.1")
    with pytest.raises(RuntimeError, match=r"works with vLLM 0\.32 and 0\.33, this is vLLM 0\.34"):
        plugin.register()


def test_a_changed_vllm_is_noticed(monkeypatch):
    from lazyllm_vllm.hooks import patches

    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self: None)
    with pytest.raises(RuntimeError, match="create_engine_config is not the one that LazyLLM"):
        patches.install()


def test_a_patch_says_why_and_when_it_ends():
    from lazyllm_vllm.hooks import patches

    source = inspect.getsource(patches)
    wrapped = source.count("_wrap(") - 1  # its definition
    assert wrapped >= 5 and source.count("Ends\n# when") + source.count("Ends when") >= 5


def test_the_older_model_runner_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ConfigError, match="Model Runner V2; remove .* set TRITON_INTERPRET=1$"):
        _create(tiny)
