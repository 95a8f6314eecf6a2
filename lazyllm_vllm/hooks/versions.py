"""The releases of vLLM that this plugin works with; see docs/vllm-versions.md."""

SUPPORTED = ("0.32", "0.33")


def check_version(version: str) -> None:
    """Raises RuntimeError if vLLM's version is of another minor release."""
    if ".".join(version.split(".")[:2]) in SUPPORTED:
        return
    from lazyllm_vllm import __version__

    raise RuntimeError(
        f"lazyllm-vllm {__version__} works with vLLM {' and '.join(SUPPORTED)}, this is vLLM "
        f"{version}: pip install 'vllm=={SUPPORTED[-1]}.*', or uninstall lazyllm-vllm"
    )
