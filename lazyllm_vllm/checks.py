"""What cannot work with LazyLLM, refused before weights load; what is switched off, said."""

import torch

from vllm.config import VllmConfig
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.transformers_utils.config import get_config
from vllm.v1.attention.backend import AttentionType

from lazyllm_vllm.config import ConfigError, LazyLLMConfig
from lazyllm_vllm.trace import Trace

# Architectures that work, and the staged model for each.
STAGED_MODELS = {"LlamaForCausalLM": "LazyLlamaForCausalLM"}
WORKER_EXTENSION = "lazyllm_vllm.stats.WorkerExtension"


def check_engine_args(args: EngineArgs) -> None:
    """Raises ConfigError naming the first flag that LazyLLM does not work with yet."""
    refused = [
        (args.pipeline_parallel_size > 1, "--pipeline-parallel-size", "set it to 1"),
        (args.tensor_parallel_size > 1, "--tensor-parallel-size", "set it to 1"),
        (args.decode_context_parallel_size > 1, "--decode-context-parallel-size", "set it to 1"),
        (args.prefill_context_parallel_size > 1, "--prefill-context-parallel-size", "set it to 1"),
        (bool(args.speculative_config), "--speculative-config", "leave it out"),
        (bool(args.enable_lora), "--enable-lora", "leave it out"),
        (bool(args.kv_transfer_config), "--kv-transfer-config", "leave it out"),
        (bool(args.enable_prompt_embeds), "--enable-prompt-embeds", "leave it out"),
        (args.kv_cache_dtype != "auto", "--kv-cache-dtype", "use auto"),
        (args.runner == "pooling", "--runner pooling", "use generate"),
        (bool(args.enable_dbo), "--enable-dbo", "leave it out"),
        (
            bool(args.disable_hybrid_kv_cache_manager),
            "--disable-hybrid-kv-cache-manager",
            "leave it out",
        ),
        (
            args.worker_extension_cls not in ("", WORKER_EXTENSION),
            "--worker-extension-cls",
            "leave it out",
        ),
        (args.attention_backend is not None, "--attention-backend", "leave it out"),
    ]  # fmt: skip
    for is_set, flag, fix in refused:
        if is_set:
            raise ConfigError(f"lazyllm: {flag} does not work with LazyLLM yet; {fix}")


def adapt_engine_args(args: EngineArgs) -> list[str]:
    """Set what LazyLLM needs of the engine; returns what was switched off, for the log. Changes
    nothing more when called again."""
    off = list(args.additional_config.get("lazyllm_switched_off", []))
    if args.enable_prefix_caching is not False:
        off.append("prefix caching")
    args.enable_prefix_caching = False
    if args.enable_chunked_prefill is not False:
        off.append("chunked prefill")
    args.enable_chunked_prefill = False
    args.long_prefill_token_threshold = 0
    for budget in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        tokens = getattr(args, budget)
        if tokens is not None and not 0 < (args.max_model_len or 0) <= tokens:
            # A prompt is prefilled in one piece: vLLM is left to choose a budget that holds one.
            off.append(f"{budget}={tokens}")
            setattr(args, budget, None)
    if not args.enforce_eager:
        if args.compilation_config.mode != CompilationMode.NONE:
            off.append("torch.compile of the model")
        if args.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
            args.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    # vLLM's fused custom ops are on only where nothing would compile (mode NONE, set before the
    # model is built).
    args.compilation_config.mode = CompilationMode.NONE
    args.worker_extension_cls = WORKER_EXTENSION
    args.hf_overrides = {**args.hf_overrides, "architectures": [staged_architecture(args)]}
    return off


def staged_architecture(args: EngineArgs) -> str:
    """The staged model for the one that ``args`` names. Raises ConfigError if there is none."""
    overrides = args.hf_overrides
    if callable(overrides):
        raise ConfigError("lazyllm: hf_overrides cannot be a function; give a dict")
    hf_config = get_config(
        args.hf_config_path or args.model,
        trust_remote_code=args.trust_remote_code,
        revision=args.revision,
        code_revision=args.code_revision,
        config_format=args.config_format,
    )
    names = overrides.get("architectures") or getattr(hf_config, "architectures", None) or []
    known = STAGED_MODELS | {staged: staged for staged in STAGED_MODELS.values()}
    staged = [known[name] for name in names if name in known]
    if not staged:
        raise ConfigError(
            f"lazyllm: the architecture {', '.join(names) or 'of this model'} is not supported; "
            f"supported: {', '.join(STAGED_MODELS)}"
        )
    return staged[0]


def check_engine_config(vllm_config: VllmConfig, config: LazyLLMConfig) -> None:
    """What only the finished configuration shows. Raises ConfigError."""
    if not vllm_config.use_v2_model_runner:
        raise ConfigError(
            "lazyllm: LazyLLM needs vLLM's Model Runner V2; remove VLLM_USE_V2_MODEL_RUNNER=0 and "
            "whatever flag vLLM's log says V2 does not support"
        )
    model = vllm_config.model_config
    if model.runner_type != "generate":
        raise ConfigError("lazyllm: only text generation works with LazyLLM; remove --convert")
    on_gpu = vllm_config.device_config.device_type == "cuda"
    if on_gpu and model.dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError("lazyllm: --dtype float32 does not work on a GPU; use bfloat16")
    if Trace.enabled() and not model.enforce_eager:
        raise ConfigError("lazyllm: LAZYLLM_TRACE=1 needs --enforce-eager")
    config.boundaries(model.get_num_layers(vllm_config.parallel_config))


def check_attention(layer: Attention) -> None:
    """Raises ConfigError if a layer's attention does more than the staged attention can."""
    impl = layer.impl
    unsupported = [
        (layer.attn_type != AttentionType.DECODER, "attention that is not causal"),
        (layer.sliding_window is not None, "sliding window attention"),
        (layer.kv_cache_dtype != "auto", f"a {layer.kv_cache_dtype} KV cache"),
        (bool(getattr(impl, "logits_soft_cap", None)), "soft-capped attention"),
        (getattr(impl, "alibi_slopes", None) is not None, "ALiBi"),
        (getattr(impl, "sinks", None) is not None, "attention sinks"),
    ]
    for is_used, what in unsupported:
        if is_used:
            raise ConfigError(
                f"lazyllm: this model uses {what} ({layer.layer_name}), which LazyLLM does not "
                "support yet"
            )
