"""The ``vllm.general_plugins`` entry point: runs in every vLLM process, changes nothing until an
engine is given a LazyLLM configuration."""


def register() -> None:
    """Register the staged models and wrap what vLLM has no hook for.

    Raises:
        RuntimeError: this vLLM is of another minor release than those LazyLLM works with.
    """
    import vllm

    from lazyllm_vllm.hooks import patches
    from lazyllm_vllm.hooks.versions import check_version
    from lazyllm_vllm.models.registry import register_staged_models

    check_version(vllm.__version__)
    register_staged_models()
    patches.install()
