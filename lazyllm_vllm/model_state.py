"""The worker's side of a request's life, and the plan of each step: vLLM's ``ModelState`` hooks."""

import numpy as np
import torch

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from lazyllm_vllm.attention import StageMetadata
from lazyllm_vllm.aux_cache import aux_pages
from lazyllm_vllm.kv_cache.specs import AuxSpec, StageSpec
from lazyllm_vllm.report import log_start
from lazyllm_vllm.request_table import RequestTable
from lazyllm_vllm.room_watch import RoomWatch
from lazyllm_vllm.stats import RequestStats
from lazyllm_vllm.step import Step, StepBuffers
from lazyllm_vllm.trace import Trace

# Requests that vLLM makes up at start (v1/worker/gpu/warmup.py); users' ids never look like this.
VLLM_WARMUP = ("_warmup_", "_v2_mixed_warmup_")


class LazyModelState(DefaultModelState):
    def __init__(self, vllm_config: VllmConfig, model, encoder_cache, device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.schedule = model.schedule
        self.table = RequestTable(self.schedule, self.max_num_reqs, device)
        self.buffers = StepBuffers(
            self.schedule,
            self.max_num_reqs,
            self.max_num_tokens,
            self.model_config.get_num_attention_heads(vllm_config.parallel_config),
            device,
        )
        self.stats = RequestStats(self.schedule)
        self.trace = Trace() if Trace.enabled() else None
        self.index_of: dict[str, int] = {}
        self.num_prompt: dict[str, int] = {}
        self.strict = self.schedule.config.decode == "strict"
        # Row in the request table of the requests whose decoding chooses tokens anew.
        self.selecting: dict[str, int] = {}
        # Requests whose prompt is yet to be prefilled, and pruned in it.
        self.to_prune: set[str] = set()
        self.room_watch = RoomWatch(self.table)
        # Which of a batch size's two CUDA graphs is being captured; see cuda_graphs.
        self.capture_selecting = False
        # Whether a step is made up to run all there is; see warm_up.
        self.warms_up = False
        self.graph_splits = vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph

    # A request's life.

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        num_prompt = len(new_req_data.prefill_token_ids)
        self.index_of[new_req_data.req_id] = req_index
        self.num_prompt[new_req_data.req_id] = num_prompt
        if self.schedule.is_pruned(num_prompt):
            self.to_prune.add(new_req_data.req_id)
            if self.strict or self.schedule.has_aux:
                self.selecting[new_req_data.req_id] = req_index
        self.table.add(req_index, num_prompt)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        self.table.apply_staged_writes()

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        index = self.index_of.pop(req_id, None)
        if index is None:
            return
        self.selecting.pop(req_id, None)
        self.to_prune.discard(req_id)
        num_prompt = self.num_prompt.pop(req_id)
        if not req_id.startswith(VLLM_WARMUP):
            self.stats.record(req_id, num_prompt, self.table.row(index))

    def report_stats(self) -> dict:
        """See ``stats.request_stats``."""
        live = {r: (self.num_prompt[r], self.table.row(i)) for r, i in self.index_of.items()}
        return self.stats.report(live)

    # The KV cache.

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        groups = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self.groups_of_stage: list[list[int]] = [[] for _ in range(self.schedule.num_stages)]
        self.aux = None
        layers = self.vllm_config.compilation_config.static_forward_context
        for group, spec in enumerate(groups):
            if isinstance(spec, StageSpec):
                self.groups_of_stage[spec.stage].append(group)
            elif isinstance(spec, AuxSpec):
                table = block_tables.input_block_tables[group]
                self.aux = aux_pages(kv_cache_config, group, table, layers, self.dtype)
        block_size = groups[self.groups_of_stage[0][0]].block_size
        self.buffers.attach_kv_cache(kv_cache_config.num_blocks, block_size, len(groups))
        log_start(self.vllm_config, self.schedule, kv_cache_config)

    # A step.

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups,
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, StageMetadata]:
        """Plan the step. A batch that replays a CUDA graph only has its buffers filled."""
        replay = cudagraph_mode == CUDAGraphMode.FULL
        in_graph = replay or for_capture
        num_reqs = input_batch.num_reqs
        lens = input_batch.num_scheduled_tokens
        num_decodes = num_reqs if in_graph else int((lens == 1).sum())
        real = input_batch.req_ids[0] in self.index_of  # else vLLM's dummy batch
        self._fill_batch(input_batch, num_decodes, real)
        # A trace shows what every step selects; strict needs it.
        if real and not self.strict and not self.trace:
            for req_id in self.room_watch.step(self.selecting, self.num_prompt):
                del self.selecting[req_id]
        if replay:
            return {}

        prompts = [int(n) for n in lens[num_decodes:]]
        if real:
            self._check_whole_prompts(input_batch.req_ids[num_decodes:], prompts)
            self.to_prune.difference_update(input_batch.req_ids)
        if in_graph:
            selects = self.capture_selecting
        else:
            selects = self.warms_up or not self.selecting.keys().isdisjoint(
                input_batch.req_ids[:num_decodes]
            )
        kept = (
            [self.schedule.kept(n) for n in prompts]
            if real
            else [(n,) * self.schedule.num_stages for n in prompts]
        )
        step = Step(
            schedule=self.schedule,
            buffers=self.buffers,
            table=self.table,
            block_tables=block_tables,
            stage_groups=self.groups_of_stage,
            slot_mapping_0=slot_mappings,
            aux=self.aux,
            num_decodes=input_batch.num_reqs_after_padding if in_graph else num_decodes,
            prefill_lens=np.array(kept, np.int32).reshape(-1, self.schedule.num_stages).T,
            decodes_select=selects,
            prefills_select=self.warms_up or any(k[-1] < k[0] for k in kept),
            revives=selects and self.aux is not None,
            recorded=not (real or self.warms_up),
            max_splits=self.graph_splits if in_graph else 0,
            sampled_tokens=input_batch.logits_indices,
            trace=self.trace if real else None,
            req_ids=input_batch.req_ids,
        )
        metadata = {}
        for stage, groups in enumerate(self.groups_of_stage):
            last_layer = None
            if stage < self.schedule.num_stages - 1:
                last_layer = self.model.layer_names[self.schedule.stage_layers(stage)[-1]]
            for group in groups:
                names = kv_cache_config.kv_cache_groups[group].layer_names
                metadata |= dict.fromkeys(names, StageMetadata(step, stage, group, last_layer))
        return metadata

    def _fill_batch(self, input_batch: InputBatch, num_decodes: int, real: bool) -> None:
        """Who is in the batch, and how many tokens each decode may revive at a boundary."""
        num_reqs = input_batch.num_reqs
        req_index = self.buffers.req_index
        req_index[num_reqs : input_batch.num_reqs_after_padding] = -1
        if real:
            req_index[:num_reqs] = input_batch.idx_mapping
        else:
            req_index[:num_reqs] = -1
        if num_decodes:
            padded = num_decodes + input_batch.num_reqs_after_padding - num_reqs
            share = self.schedule.revive_share(num_decodes)
            self.buffers.share.fill_(min(share, self.schedule.largest_share(padded)))

    def _check_whole_prompts(self, req_ids: list[str], lens: list[int]) -> None:
        for req_id, scheduled in zip(req_ids, lens):
            if scheduled != self.num_prompt[req_id]:
                raise RuntimeError(
                    f"LazyLLM needs whole prompts: vLLM scheduled {scheduled} of the "
                    f"{self.num_prompt[req_id]} tokens of request {req_id}"
                )
