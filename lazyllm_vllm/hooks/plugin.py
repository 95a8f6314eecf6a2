"""The ``vllm.general_plugins`` entry point: runs in every vLLM process, changes nothing until an
engine is given a LazyLLM configuration."""


def register() -> None:
    """Register the staged models and wrap what vLLM has no hook for.

    Raises:
        RuntimeError: this vLLM is of another minor release than those LazyLLM works with.
    """
    import vllm
    from vllm import ModelRegistry

    from lazyllm_vllm.hooks import patches
    from lazyllm_vllm.hooks.versions import check_version
    from lazyllm_vllm.models.families import FAMILIES

    check_version(vllm.__version__)
    for family in FAMILIES:
        ModelRegistry.register_model(family.staged_architecture, family.staged)
    patches.install()
