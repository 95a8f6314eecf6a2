"""Measurements of LazyLLM against stock vLLM, and the demo."""
