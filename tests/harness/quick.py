"""Imported by the process that a CPU's engines are forked from (``benchmarks.engine``): their start
and their steps take a fraction of the time. ``test_serve`` and the demo run vLLM as it is."""

import vllm.entrypoints.llm  # noqa: F401
import vllm.model_executor.models.llama  # noqa: F401
import vllm.v1.worker.cpu_worker  # noqa: F401

import lazyllm_vllm.models.staged  # noqa: F401
from harness import block_tables, interpreter, registry

interpreter.speed_up()
block_tables.install()
registry.look_here()
