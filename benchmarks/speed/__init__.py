"""How fast LazyLLM is beside stock vLLM, on a GPU: ``python -m benchmarks speed``."""
