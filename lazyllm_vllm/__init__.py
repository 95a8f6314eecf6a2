"""LazyLLM (arXiv 2407.14057) for vLLM: dynamic token pruning for long prompts."""

__version__ = "0.15.0"


def __getattr__(name: str):
    # vLLM imports this package in every process, before it has chosen a platform.
    if name == "request_stats":
        from lazyllm_vllm.observe.stats import request_stats

        return request_stats
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
