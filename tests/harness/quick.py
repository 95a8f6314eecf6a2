"""Imported by the process that a CPU's engines are forked from (``benchmarks.engine``), and by a
server's (``harness.quick_vllm``): their start and their steps take a fraction of the time. The demo
runs vLLM as it is."""

import gc

import vllm.distributed.elastic_ep.elastic_execute  # noqa: F401
import vllm.entrypoints.anthropic.protocol  # noqa: F401
import vllm.entrypoints.llm  # noqa: F401
import vllm.model_executor.layers.quantization.online.base  # noqa: F401
import vllm.model_executor.models.llama  # noqa: F401
import vllm.v1.attention.backends.cpu_attn  # noqa: F401
import vllm.v1.worker.cpu.model_runner  # noqa: F401
import vllm.v1.worker.cpu_worker  # noqa: F401

import lazyllm_vllm.models.staged  # noqa: F401
from harness import block_tables, interpreter, registry, sampling, step_kernels

interpreter.speed_up()
block_tables.install()
step_kernels.install()
sampling.install()
registry.look_here()
# What vLLM looks through as it ends, all that was imported before among it, takes longer than its
# start.
gc.unfreeze = lambda: None
