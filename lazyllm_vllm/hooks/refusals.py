"""What does not work with LazyLLM, refused before weights load: one table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from lazyllm_vllm.hooks.engine_config import block_needs
from lazyllm_vllm.observe.trace import Trace
from lazyllm_vllm.plan.blocks import ceil_div
from lazyllm_vllm.plan.config import ConfigError
from lazyllm_vllm.plan.request_setting import DEEP
from lazyllm_vllm.plan.schedule import Schedule

FP8 = ("fp8", "fp8_e4m3")  # vLLM's names for an FP8 KV cache that works


@dataclass(frozen=True)
class Refusal:
    """Attributes:
    what: in words.
    fields: the engine arguments that set it.
    fix: what to do.
    in_config: whether an engine's finished configuration has it.
    in_args: the same of its arguments, for what vLLM does not note elsewhere, or stumbles over
        itself.
    """

    what: str
    fields: tuple[str, ...]
    fix: str = "leave it out"
    in_config: Callable[[VllmConfig], bool] | None = None
    in_args: Callable[[EngineArgs], bool] | None = None

    @property
    def error(self) -> ConfigError:
        flags = " or ".join("--" + field.replace("_", "-") for field in self.fields)
        return ConfigError(f"lazyllm: {self.what} does not work with LazyLLM; {flags}: {self.fix}")


def _kv_cache_dtype_is_other(config: VllmConfig) -> bool:
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    return config.cache_config.cache_dtype not in ("auto", dtype, *FP8)


def _kv_heads_do_not_divide(config: VllmConfig) -> bool:
    heads = config.model_config.get_total_num_kv_heads()
    ranks = config.parallel_config.tensor_parallel_size
    return bool(heads % ranks and ranks % heads)


REFUSALS = (
    Refusal(
        "pipeline parallelism",
        ("pipeline_parallel_size",),
        "set it to 1",
        in_args=lambda args: args.pipeline_parallel_size > 1,
    ),
    Refusal(
        "a number of ranks that neither divides nor is a multiple of the model's KV heads",
        ("tensor_parallel_size",),
        "choose another",
        in_config=_kv_heads_do_not_divide,
    ),
    Refusal(
        "sharing a mixture's experts among the ranks of tensor parallelism",
        ("enable_expert_parallel",),
        in_args=lambda args: args.enable_expert_parallel and args.tensor_parallel_size > 1,
    ),
    Refusal(
        "context parallelism",
        ("decode_context_parallel_size", "prefill_context_parallel_size"),
        "set it to 1",
        in_args=lambda args: (
            max(args.decode_context_parallel_size, args.prefill_context_parallel_size) > 1
        ),
    ),
    Refusal(
        "a mixture of experts in data parallel replicas, which share their experts",
        ("data_parallel_size",),
        "set it to 1, or start one server for each replica",
        in_config=lambda config: (
            config.parallel_config.data_parallel_size > 1 and config.model_config.is_moe
        ),
    ),
    Refusal(
        "reporting the experts of every token",
        ("enable_return_routed_experts",),
        in_args=lambda args: args.aux_output_config.enable_return_routed_experts,
    ),
    Refusal(
        "splitting a batch (DBO)",
        ("enable_dbo", "ubatch_size"),
        in_config=lambda config: config.parallel_config.use_ubatching,
    ),
    Refusal(
        "speculative decoding",
        ("speculative_config", "spec_method", "spec_model", "spec_tokens"),
        in_config=lambda config: config.speculative_config is not None,
    ),
    Refusal(
        "a diffusion model",
        ("diffusion_config",),
        in_config=lambda config: config.diffusion_config is not None,
    ),
    Refusal("LoRA", ("enable_lora",), in_config=lambda config: config.lora_config is not None),
    Refusal(
        "a KV connector or KV offloading",
        ("kv_transfer_config", "kv_offloading_size"),
        in_config=lambda config: (
            config.kv_transfer_config is not None
            or config.cache_config.kv_offloading_size is not None
        ),
    ),
    Refusal(
        "encoder disaggregation",
        ("ec_transfer_config",),
        in_config=lambda config: config.ec_transfer_config is not None,
    ),
    Refusal(
        "a prompt of embeddings",
        ("enable_prompt_embeds",),
        in_config=lambda config: config.model_config.enable_prompt_embeds,
    ),
    Refusal(
        "a KV cache of another type than the model's or FP8 (e4m3)",
        ("kv_cache_dtype",),
        "use auto or fp8",
        in_config=_kv_cache_dtype_is_other,
    ),
    Refusal(
        "a KV cache whose layers are of several types",
        ("kv_cache_dtype_skip_layers",),
        in_config=lambda config: bool(config.cache_config.kv_cache_dtype_skip_layers),
    ),
    Refusal(
        "a model that does not generate text",
        ("runner", "convert"),
        "use --runner generate and no --convert",
        in_config=lambda config: config.model_config.runner_type != "generate",
    ),
    Refusal(
        "a choice of attention backend",
        ("attention_backend", "attention_config.backend", "attention_config.backend_per_kind"),
        "leave it out, LazyLLM brings its own",
        in_args=lambda args: bool(
            args.attention_backend
            or args.attention_config.backend
            or args.attention_config.backend_per_kind
        ),
    ),
    Refusal(
        "one kind of KV cache group for all layers",
        ("disable_hybrid_kv_cache_manager",),
        in_args=lambda args: bool(args.disable_hybrid_kv_cache_manager),
    ),
    Refusal(
        "sharing keys between layers (fast prefill)",
        ("kv_sharing_fast_prefill",),
        in_config=lambda config: config.cache_config.kv_sharing_fast_prefill,
    ),
    Refusal(
        "admitting a prompt by its first part",
        ("scheduler_reserve_full_isl",),
        "leave it on",
        in_config=lambda config: not config.scheduler_config.scheduler_reserve_full_isl,
    ),
    Refusal(
        "another scheduler than vLLM's",
        ("scheduler_cls",),
        in_args=lambda args: args.scheduler_cls is not None,
    ),
    Refusal(
        "another worker than vLLM's",
        ("worker_cls",),
        "leave it out, or add to vLLM's with --worker-extension-cls",
        in_args=lambda args: args.worker_cls != "auto",
    ),
    Refusal(
        "another implementation of the model",
        ("model_impl", "model_class_overrides"),
        in_args=lambda args: (
            args.model_impl not in ("auto", "vllm") or bool(args.model_class_overrides)
        ),
    ),
    Refusal(
        "a kernel for whole layers",
        ("monokernel",),
        in_config=lambda config: getattr(config.kernel_config, "monokernel", False),
    ),
    Refusal(
        "sleep mode",
        ("enable_sleep_mode",),
        in_config=lambda config: config.model_config.enable_sleep_mode,
    ),
    Refusal(
        "float32 on a GPU",
        ("dtype",),
        "use bfloat16",
        in_config=lambda config: (
            config.device_config.device_type == "cuda"
            and config.model_config.dtype not in (torch.bfloat16, torch.float16)
        ),
    ),
    Refusal(
        "the trace (LAZYLLM_TRACE=1) in CUDA graphs",
        ("enforce_eager",),
        "set it",
        in_config=lambda config: Trace.enabled() and not config.model_config.enforce_eager,
    ),
)


def check_engine_args(args: EngineArgs) -> None:
    """Raises ConfigError naming the first argument that LazyLLM does not work with."""
    for refusal in REFUSALS:
        if refusal.in_args is not None and refusal.in_args(args):
            raise refusal.error


def check_engine_config(config: VllmConfig, schedule: Schedule) -> None:
    """The same by the finished configuration, where every way of setting a thing ends."""
    for refusal in REFUSALS:
        if refusal.in_config is not None and refusal.in_config(config):
            raise refusal.error
    if not config.use_v2_model_runner:
        is_cpu = config.device_config.device_type == "cpu"
        on_cpu = "; without a GPU set TRITON_INTERPRET=1" if is_cpu else ""
        raise ConfigError(
            "lazyllm: LazyLLM needs vLLM's Model Runner V2; remove VLLM_USE_V2_MODEL_RUNNER=0 and "
            f"whatever flag vLLM's log says V2 does not support{on_cpu}"
        )
    if schedule.prunes:
        _check_page_size(config)
        if schedule.config.reuse == DEEP and not config.cache_config.enable_prefix_caching:
            raise ConfigError(
                "lazyllm: reuse: deep reuses what is in the prefix cache, which is off; leave "
                "out --no-enable-prefix-caching, or set reuse to exact"
            )


def _check_page_size(config: VllmConfig) -> None:
    """A hidden state must fit in one layer's part of a block of the KV cache."""
    needs = block_needs(config)
    if needs.page_size < needs.vector_size:
        of_16_tokens = 16 * needs.page_size // needs.block_size
        raise ConfigError(
            f"lazyllm: a page of the KV cache holds {needs.page_size} bytes, less than a "
            f"hidden state ({needs.vector_size}); raise --block-size to "
            f"{16 * ceil_div(needs.vector_size, of_16_tokens)} or more"
        )


def check_attention(layer: Attention, is_full: bool) -> None:
    """Raises ConfigError if a layer's attention does more than the staged attention can.

    Args:
        is_full: whether the model's configuration says that the layer attends to all tokens.
    """
    impl = layer.impl
    unsupported = [
        (layer.attn_type != AttentionType.DECODER, "attention that is not causal"),
        ((layer.sliding_window is None) != is_full, "windows that config.json does not tell of"),
        (layer.head_size_v != layer.head_size, "values of another size than keys"),
        (layer.kv_sharing_target_layer_name is not None, "keys shared between layers"),
        (bool(getattr(impl, "logits_soft_cap", None)), "soft-capped attention"),
        (getattr(impl, "alibi_slopes", None) is not None, "ALiBi"),
    ]
    for is_used, what in unsupported:
        if is_used:
            raise ConfigError(
                f"lazyllm: this model uses {what} ({layer.layer_name}), which LazyLLM does not "
                "support yet"
            )
