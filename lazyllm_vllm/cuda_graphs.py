"""CUDA graphs of decode batches: two of each size, since most steps need no selection.

The plain graph attends to what each stage has, as stock vLLM does. The selecting one also scores,
selects and revives, and has rows for revived tokens; it serves any batch. vLLM tells graphs of a
size apart by how many LoRA adapters are in use; LazyLLM refuses LoRA, so that number is free.
"""

from dataclasses import replace

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

PLAIN, SELECTING = 0, 1


class LazyCudaGraphManager(ModelCudaGraphManager):
    """vLLM's manager, which asks the model's state which graph a batch needs."""

    def __init__(self, vllm_config, *args, lora_capture_cases=None, **kwargs) -> None:
        super().__init__(vllm_config, *args, lora_capture_cases=[PLAIN, SELECTING], **kwargs)
        self.model_state = None

    def capture(self, model, model_state, *args, **kwargs) -> None:
        self.model_state = model_state

        def choose(case: int, num_reqs: int, num_tokens: int) -> None:
            model_state.capture_selecting = case == SELECTING

        super().capture(model, model_state, *args, **{**kwargs, "lora_capture_hook": choose})

    def dispatch(
        self, num_reqs, num_tokens, uniform_token_count, num_active_loras, *args, **kwargs
    ) -> BatchExecutionDescriptor:
        case = SELECTING if self.model_state and self.model_state.selecting else PLAIN
        found = super().dispatch(num_reqs, num_tokens, uniform_token_count, case, *args, **kwargs)
        if found.cg_mode == CUDAGraphMode.FULL:
            return found
        return replace(found, num_active_loras=0)
