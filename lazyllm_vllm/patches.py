"""The places where vLLM 0.32 has no hook. Each wrap says why, and ``install`` fails if vLLM
changed under it."""

import functools
import inspect
from typing import Any

from lazyllm_vllm.config import ConfigError, parse_config

_MARK = "_wrapped_by_lazyllm"


def install() -> None:
    """Wrap vLLM's functions, once a process.

    Raises:
        RuntimeError: a function is gone or takes other arguments than it did.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    _wrap(EngineArgs, "add_cli_args", ["parser"], _add_cli_args)
    _wrap(EngineArgs, "from_cli_args", ["cls", "args"], _from_cli_args)
    _wrap(EngineArgs, "create_engine_config", ["self", "usage_context", "headless"], _create_config)
    _wrap(InputProcessor, "_validate_params", ["self", "params", "supported_tasks"], _validate)


def install_in_worker() -> None:
    """The same for what only the process of the model needs."""
    from vllm.v1.worker.gpu import model_runner

    parameters = [
        "vllm_config", "device", "cudagraph_mode", "decode_query_len", "lora_capture_cases",
        "varlen_decode", "ubatch_runner",
    ]  # fmt: skip
    _wrap(model_runner, "ModelCudaGraphManager", parameters, _cuda_graph_manager)


def _wrap(owner, name, parameters, wrapper) -> None:
    """Make ``wrapper(original, *arguments)`` stand for ``owner.name``, of the same kind."""
    raw = inspect.getattr_static(owner, name, None)
    function = getattr(raw, "__func__", raw)
    if function is None or list(inspect.signature(function).parameters) != parameters:
        raise RuntimeError(
            f"lazyllm: vLLM's {owner.__name__}.{name} is not the one of vLLM 0.32 that LazyLLM "
            "wraps; install a vLLM 0.32 release"
        )
    if hasattr(function, _MARK):
        return

    @functools.wraps(function)
    def replacement(*args, **kwargs):
        return wrapper(function, *args, **kwargs)

    setattr(replacement, _MARK, True)
    kind = type(raw) if isinstance(raw, (staticmethod, classmethod)) else lambda f: f
    setattr(owner, name, kind(replacement))


# vLLM has no hook for a plugin's own flag, so the parser and the reading of it are wrapped.


def _add_cli_args(original, parser):
    parser = original(parser)
    group = parser.add_argument_group(
        title="LazyLLM",
        description="Prune prompt tokens layer by layer (arXiv 2407.14057).",
    )
    group.add_argument(
        "--lazyllm-config",
        type=_parse_flag,
        default=None,
        metavar="JSON|FILE|PRESET",
        help="LazyLLM's configuration: JSON, the path of a JSON or YAML file, or one of the "
        "presets conservative, balanced and aggressive. Left out: LazyLLM is off.",
    )
    return parser


def _parse_flag(text: str) -> dict[str, Any]:
    import argparse

    try:
        return parse_config(text).model_dump(mode="json", exclude_unset=True)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _from_cli_args(original, cls, args):
    engine_args = original(cls, args)
    config = getattr(args, "lazyllm_config", None)
    if config is not None:
        engine_args.additional_config = {**engine_args.additional_config, "lazyllm": config}
    return engine_args


# The one place that every way of starting an engine passes before its configuration is fixed:
# vLLM lets a plugin neither refuse flags nor change the defaults of others.


def _create_config(original, self, *args, **kwargs):
    if not isinstance(self.additional_config, dict) or "lazyllm" not in self.additional_config:
        return original(self, *args, **kwargs)
    from lazyllm_vllm.checks import adapt_engine_args, check_engine_args, check_engine_config

    config = parse_config(self.additional_config["lazyllm"])
    check_engine_args(self)
    switched_off = adapt_engine_args(self)
    self.additional_config = {
        **self.additional_config,
        "lazyllm": config.model_dump(mode="json", exclude_unset=True),
        "lazyllm_switched_off": switched_off,
    }
    vllm_config = original(self, *args, **kwargs)
    check_engine_config(vllm_config, config)
    return vllm_config


# vLLM asks only custom logits processors whether a request's parameters are allowed, and those
# cost time in every step.


def _validate(original, self, params, supported_tasks):
    from vllm.exceptions import VLLMValidationError

    if "lazyllm" in (self.vllm_config.additional_config or {}):
        for field in ("prompt_logprobs", "prompt_logprob_token_ids"):
            if getattr(params, field, None) is not None:
                raise VLLMValidationError(
                    f"{field} does not work with LazyLLM: pruned prompt tokens have no logits; "
                    "leave it out",
                    parameter=field,
                )
    return original(self, params, supported_tasks)


# vLLM captures a graph for each batch size and picks by size alone.


def _cuda_graph_manager(original, vllm_config, *args, **kwargs):
    if "lazyllm" not in (vllm_config.additional_config or {}):
        return original(vllm_config, *args, **kwargs)
    from lazyllm_vllm.cuda_graphs import LazyCudaGraphManager

    return LazyCudaGraphManager(vllm_config, *args, **kwargs)
