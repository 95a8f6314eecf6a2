"""The ``vllm.general_plugins`` entry point: runs in every vLLM process, changes nothing until an
engine is given a LazyLLM configuration."""

SUPPORTED_VLLM = "0.32"


def register() -> None:
    """Register the staged models, the block managers and the command-line flag.

    Raises:
        RuntimeError: this vLLM is of another minor release than the one LazyLLM works with.
    """
    import vllm
    from vllm import ModelRegistry

    from lazyllm_vllm import __version__, patches

    if vllm.__version__.split(".")[:2] != SUPPORTED_VLLM.split("."):
        raise RuntimeError(
            f"lazyllm-vllm {__version__} works with vLLM {SUPPORTED_VLLM}, this is vLLM "
            f"{vllm.__version__}: pip install 'vllm=={SUPPORTED_VLLM}.*', or uninstall lazyllm-vllm"
        )
    ModelRegistry.register_model(
        "LazyLlamaForCausalLM", "lazyllm_vllm.models.llama:LazyLlamaForCausalLM"
    )
    patches.install()
