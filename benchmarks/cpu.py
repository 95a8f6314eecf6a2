"""The environment in which vLLM's CPU build, and our kernels in it, run without a GPU."""

import os

SETTINGS = {
    "TRITON_INTERPRET": "1",  # Model Runner V2 needs Triton
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_CI_ENV": "1",  # no compilation, no warm-up
    "TORCHDYNAMO_DISABLE": "1",  # nor what tensor parallelism compiles
    "HF_HUB_OFFLINE": "1",
}


def use_cpu_settings() -> None:
    """Set what is not set yet, if torch is a CPU build. Call it before anything imports vLLM."""
    import torch

    # Not torch.cuda.is_available(): that may touch the GPU, and then vLLM cannot fork.
    if torch.version.cuda is None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
