"""vLLM looks into a model's class in a process of its own, so as not to touch the GPU. That process
imports vLLM once more; only what a cache has from another time is not looked into."""

from vllm.model_executor.models import registry


def look_here() -> None:
    """From now on look in this process, and in those forked from it: on a CPU there is no GPU."""
    registry._run_in_subprocess = lambda look: look()
