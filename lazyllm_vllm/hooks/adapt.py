"""What LazyLLM sets in an engine's arguments, and what it switches off."""

from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.transformers_utils.config import get_config

from lazyllm_vllm.hooks.engine_config import SWITCHED_OFF, given_config
from lazyllm_vllm.models.families import FAMILIES, family_of
from lazyllm_vllm.models.registry import PREFIX, vllm_class
from lazyllm_vllm.plan.config import ConfigError

logger = init_logger(__name__)


def adapt_engine_args(args: EngineArgs) -> list[str]:
    """Set what LazyLLM needs of the engine; returns what was switched off, for the log. Changes
    nothing more when called again.

    Raises:
        ConfigError: there is no staged model for the one that ``args`` names.
    """
    off = list(args.additional_config.get(SWITCHED_OFF, []))
    args.hf_overrides = {**args.hf_overrides, "architectures": [staged_architecture(args)]}
    if not args.enforce_eager:
        if args.compilation_config.mode != CompilationMode.NONE:
            off.append("torch.compile of the model")
        if args.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
            args.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    # vLLM's fused custom ops are on only where nothing would compile (mode NONE, set before the
    # model is built).
    args.compilation_config.mode = CompilationMode.NONE
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
    if names and names[0].startswith(PREFIX):
        return names[0]  # set before
    found = next(filter(None, map(vllm_class, names)), None)
    known = ", ".join(family.name for family in FAMILIES)
    if found is None:
        raise ConfigError(
            f"lazyllm: {', '.join(names) or 'this model'} is not a text model of vLLM's own; those "
            f"that work are what vLLM runs as {known}"
        )
    module, name = found
    if family_of(module, name) is None:
        if not given_config(args.additional_config).allow_untested_model:
            raise ConfigError(
                f"lazyllm: vLLM runs this model as {name}, which was not tested with LazyLLM; "
                f'"allow_untested_model": true tries it. Tested: {known}'
            )
        logger.warning("LazyLLM: %s was not tested; allow_untested_model lets it run", name)
    return PREFIX + name
