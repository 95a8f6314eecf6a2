"""Llama, and every checkpoint that vLLM runs as Llama."""

from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM

from lazyllm_vllm.models.staged import StagedDecoder


class LazyLlamaForCausalLM(StagedDecoder, LlamaForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.cut_into_stages(vllm_config)
