"""CUDA graphs: two of each decode batch's size, since most steps need no selection, and one around
the attention of each size of other small batches.

The plain graph of a decode batch attends to what each stage has, as stock vLLM does. The selecting
one also scores, selects and revives, and has rows for revived tokens; it serves any batch. vLLM
tells graphs of a size apart by how many LoRA adapters are in use; LazyLLM refuses LoRA, so that
number is free.

Batches with short prompts, of which nothing is dropped, run in pieces: graphs of all that a layer
does to each row alone, and attention between them. Stock vLLM takes such pieces out of what
torch.compile makes of a model; here they are captured from the running model ("breakable" graphs).
Batches larger than its graphs it runs compiled; nothing is compiled here, so pieces go on to the
size at which a prefill keeps the GPU busier than the CPU. Stages of pruned prompts run in the same
pieces; see ``stage_pieces``. Steps with a turn have graphs of their own: ``turn_graphs``.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace

import torch

from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import weak_ref_tensor
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

from lazyllm_vllm.hooks.engine_config import schedule_of
from lazyllm_vllm.hooks.turn_graphs import TurnGraphs, has_turn_graphs
from lazyllm_vllm.hooks.warm_up import warm_up
from lazyllm_vllm.runtime.step_kind import StepKind

PLAIN, SELECTING = 0, 1
# Tokens of batches that run in pieces, beyond vLLM's largest size. Experts are many small kernels:
# with them the CPU is the slower one up to more tokens.
PIECES = (*range(128, 1024, 128), *range(1024, 2048 + 1, 256))
PIECES_WITH_EXPERTS = (*PIECES, *range(2560, 4096 + 1, 512))


class LazyCudaGraphManager(ModelCudaGraphManager):
    """vLLM's manager, which asks the model's state which graph a batch needs."""

    def __init__(
        self, vllm_config, device, cudagraph_mode, *args, lora_capture_cases=None, **kwargs
    ) -> None:
        if cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY:
            cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        cases = [PLAIN, SELECTING] if schedule_of(vllm_config).prunes else [PLAIN]
        super().__init__(
            vllm_config, device, cudagraph_mode, *args, lora_capture_cases=cases, **kwargs
        )
        self.use_breakable_cg = self.cudagraph_mode.has_piecewise_cudagraphs()
        self.model_state = None

    def _init_candidates(self) -> None:
        self._add_sizes()
        super()._init_candidates()

        def wanted(descriptor: BatchExecutionDescriptor) -> bool:
            return descriptor.cg_mode == CUDAGraphMode.FULL or descriptor.num_active_loras == PLAIN

        for by_key in (self._capture_descs, self._candidates):
            for key, descriptors in by_key.items():
                by_key[key] = [each for each in descriptors if wanted(each)]

    def _add_sizes(self) -> None:
        """Sizes beyond vLLM's, in a copy of its configuration, whose own largest size still bounds
        decode batches."""
        sizes = self.compilation_config.cudagraph_capture_sizes
        if not (self.cudagraph_mode and sizes):
            return
        most = self.vllm_config.scheduler_config.max_num_batched_tokens
        has_experts = self.vllm_config.model_config.is_moe
        pieces = PIECES_WITH_EXPERTS if has_experts else PIECES
        more = [size for size in pieces if max(sizes) < size <= most]
        self.compilation_config = copy(self.compilation_config)
        self.compilation_config.cudagraph_capture_sizes = [*sizes, *more]

    def capture(
        self,
        model,
        model_state,
        input_buffers,
        intermediate_tensors,
        block_tables,
        attn_groups,
        kv_cache_config,
        **kwargs,
    ) -> None:
        self.model_state = model_state
        if model_state.schedule.prunes:
            warm_up(
                model,
                model_state,
                self.vllm_config,
                input_buffers,
                block_tables,
                attn_groups,
                kv_cache_config,
            )

        def choose(case: int, num_reqs: int, num_tokens: int) -> None:
            selecting = case == SELECTING
            model_state.capture_kind = StepKind.CAPTURE_SELECTING if selecting else StepKind.CAPTURE

        super().capture(
            model,
            model_state,
            input_buffers,
            intermediate_tensors,
            block_tables,
            attn_groups,
            kv_cache_config,
            **{**kwargs, "lora_capture_hook": choose},
        )
        is_real = self._capture_mem_samples is None  # not for vLLM to see how much memory they take
        is_full = is_real and self.cudagraph_mode.has_full_cudagraphs()
        if is_full and has_turn_graphs(self.vllm_config, model_state):
            model.turn_graphs = TurnGraphs()
            model.turn_graphs.capture(model_state, self.vllm_config, self.pool)

    def dispatch(
        self, num_reqs, num_tokens, uniform_token_count, num_active_loras, *args, **kwargs
    ) -> BatchExecutionDescriptor:
        state = self.model_state
        case = SELECTING if state and state.selecting else PLAIN
        given = num_reqs, num_tokens, uniform_token_count, case, *args
        descriptor = super().dispatch(*given, **kwargs)
        if descriptor.cg_mode == CUDAGraphMode.PIECEWISE and not state.batch_runs_alike:
            descriptor = BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs)
        if descriptor.cg_mode == CUDAGraphMode.FULL:
            return descriptor
        return replace(descriptor, num_active_loras=0)


def between_graphs(function: Callable[..., None], *tensors: torch.Tensor) -> None:
    """``function(*tensors)``; where a graph is captured in pieces, outside of them, at each replay.

    Args:
        function: looks up all else that it needs in vLLM's forward context, and writes its result
            to one of the tensors.
    """
    capture = BreakableCUDAGraphCapture.current()
    if capture is None:
        function(*tensors)
    else:
        kept = [weak_ref_tensor(tensor) for tensor in tensors]  # the graph owns the memory
        capture.add_eager(lambda: function(*kept))


def captures_pieces() -> bool:
    """Whether what runs now is captured in pieces."""
    return BreakableCUDAGraphCapture.is_active()
