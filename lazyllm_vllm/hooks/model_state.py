"""The worker's side of a request's life, and the plan of each step: vLLM's ``ModelState`` hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import get_tp_group
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from lazyllm_vllm.hooks import step_plans
from lazyllm_vllm.hooks.attention_backend import StageMetadata
from lazyllm_vllm.hooks.held_back import HeldBack
from lazyllm_vllm.hooks.kv_cache.reuse import CONTINUATION, WHOLE
from lazyllm_vllm.hooks.kv_cache.specs import PromptSpec, StageSpec
from lazyllm_vllm.hooks.kv_cache.spread import LEGS
from lazyllm_vllm.hooks.prompt_cache import parked_states, prompt_cache
from lazyllm_vllm.hooks.turns import give_places
from lazyllm_vllm.observe.startup_log import log_start
from lazyllm_vllm.observe.stats import RequestStats
from lazyllm_vllm.observe.trace import Trace
from lazyllm_vllm.plan.request_plan import RequestPlan
from lazyllm_vllm.plan.request_setting import OFF
from lazyllm_vllm.plan.spread import Leg
from lazyllm_vllm.runtime.boundary import Boundary
from lazyllm_vllm.runtime.buffers import StepBuffers
from lazyllm_vllm.runtime.request_table import RequestRow, RequestTable
from lazyllm_vllm.runtime.room_watch import RoomWatch
from lazyllm_vllm.runtime.score_reduction import ScoreReduction
from lazyllm_vllm.runtime.snapshots import BlockCopier, Continuations
from lazyllm_vllm.runtime.state_parts import StateParts
from lazyllm_vllm.runtime.step import Step
from lazyllm_vllm.runtime.step_kind import StepKind
from lazyllm_vllm.runtime.turns import Turns

# Requests that vLLM makes up at start (v1/worker/gpu/warmup.py); users' ids never look like this.
VLLM_WARMUP = ("_warmup_", "_v2_mixed_warmup_")


class LazyModelState(DefaultModelState):
    """Attributes:
    index_of: rows in the request table of the requests there are; plans: what each may have.
    selecting: of those, the ones whose decoding chooses tokens anew.
    caught_up: tokens of a prompt that have run, of one that is not pruned in the later stages too,
        or those from which a request goes on.
    needs: blocks that a request needs, once there is a KV cache.
    continuations: the requests that go on from others.
    legs: of requests in the batch to come whose later stages are spread over several steps.
    held_back: those of them that have not run whole after it.
    batch_runs_alike: whether all stages run the rows that vLLM gives, in the batch to come.
    wants_prompt: requests of whose prompt every hidden state is read (``prompt_logprobs``).
    capture_kind: which of a batch size's two CUDA graphs is being captured; see ``cuda_graphs``.
    """

    def __init__(self, vllm_config: VllmConfig, model, encoder_cache, device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.schedule = model.schedule
        self.table = RequestTable(self.schedule.num_stages, self.max_num_reqs, device)
        num_heads = self.model_config.get_num_attention_heads(vllm_config.parallel_config)
        self.buffers = StepBuffers(
            self.schedule, self.table.counts, self.max_num_tokens, num_heads, device
        )
        self.stats = RequestStats(self.schedule)
        self.group = get_tp_group()
        self.trace = Trace(self.group) if Trace.enabled() else None
        self.index_of: dict[str, int] = {}
        self.plans: dict[str, RequestPlan] = {}
        self.selecting: dict[str, int] = {}
        self.caught_up: dict[str, int] = {}
        self.continuations = Continuations(self.schedule.num_stages)
        self.legs: dict[str, Leg] = {}
        self.held_back = HeldBack()
        self.batch_runs_alike = True
        self.wants_prompt: set[str] = set()
        self.room_watch = RoomWatch(self.table)
        self.capture_kind = StepKind.CAPTURE
        self._made_up_kind = StepKind.DUMMY

    # A request's life.

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        req_id = new_req_data.req_id
        params = new_req_data.sampling_params
        setting = self.schedule.setting(params and params.extra_args)
        continuation = getattr(new_req_data, CONTINUATION, None)
        if continuation is None:
            # Where no prompt is pruned, later stages' keys are shared like the first's.
            known = 0 if self.schedule.prunes else new_req_data.num_computed_tokens
            caught_up = getattr(new_req_data, WHOLE, known)
            num_prompt = len(new_req_data.prefill_token_ids)
            plan = self.schedule.plan(num_prompt, setting)
            if caught_up and plan.is_pruned:  # it goes on from prompts that were not
                self.continuations.note(req_id, caught_up)
                plan = self.schedule.plan(num_prompt, replace(setting, schedule=OFF))
            prompt_keys = plan.kept
        else:
            self.copier.copy(continuation.copies)
            plan, prompt_keys = self.continuations.begin(req_id, continuation)
            caught_up = continuation.num_tokens
        self.index_of[req_id] = req_index
        self.plans[req_id] = plan
        self.stats.aux_blocks += self.needs.prompt_blocks(plan)
        self.caught_up[req_id] = caught_up
        if plan.is_pruned:
            if blocks := new_req_data.block_ids[self.prompt_group]:  # none at vLLM's warm-up
                self.continuations.may_leave(req_id, blocks[0])
            if self.schedule.selects(plan):
                self.selecting[req_id] = req_index
        elif _reads_prompt(params):
            self.wants_prompt.add(req_id)
        self.table.add(req_index, plan, prompt_keys)

    def postprocess_state(
        self, idx_mapping: torch.Tensor, num_sampled, num_computed_tokens=None
    ) -> None:
        """Called when a step's kernels have been started: while they run there is time."""
        super().postprocess_state(idx_mapping, num_sampled, num_computed_tokens)
        self.held_back.end_step(idx_mapping, num_computed_tokens)
        self.table.apply_staged_writes()

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        index = self.index_of.pop(req_id, None)
        if index is None:
            return
        counts = self._counts(req_id) and not req_id.startswith(VLLM_WARMUP)
        plan = self.plans.pop(req_id)
        self.stats.aux_blocks -= self.needs.prompt_blocks(plan)
        self.selecting.pop(req_id, None)
        del self.caught_up[req_id]
        self.wants_prompt.discard(req_id)
        row = self.table.row(index) if plan.is_pruned else RequestRow.unpruned(plan)
        reused = self.continuations.reused(req_id)
        self.continuations.end(req_id, row)
        if counts:
            self.stats.record(req_id, row, reused)

    def _counts(self, req_id: str) -> bool:
        """Whether a request is counted: once it is prefilled, and by the first rank for all, which
        do the same."""
        is_prefilled = self.caught_up[req_id] >= self.plans[req_id].num_prompt
        return is_prefilled and self.group.is_first_rank

    def report_stats(self) -> dict:
        """See ``stats.request_stats``."""
        live, reused = filter(self._counts, self.index_of), self.continuations.reused
        rows = {name: (self.table.row(self.index_of[name]), reused(name)) for name in live}
        return self.stats.report(rows)

    def report_trace(self, request: str | None = None) -> dict:
        """``trace.Trace.report``, and with it ``starts``, the stages' first layers (``Schedule``).
        Raises RuntimeError if nothing was traced."""
        if self.trace is None:
            raise RuntimeError(
                "lazyllm: nothing was traced; set LAZYLLM_TRACE=1 before the engine starts"
            )
        return self.trace.report(request) | {"starts": list(self.schedule.starts)}

    # The KV cache.

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        stage_tables = [
            [
                (group, block_tables.input_block_tables[group])
                for group, spec in enumerate(specs)
                if isinstance(spec, StageSpec) and spec.stage == stage
            ]
            for stage in range(self.schedule.num_stages)
        ]
        block_size = specs[stage_tables[0][0][0]].block_size
        self.needs = specs[stage_tables[0][0][0]].needs
        layers = self.vllm_config.compilation_config.static_forward_context
        state, aux, blocks = prompt_cache(
            kv_cache_config,
            block_tables,
            layers,
            self.buffers.num_prompt,
            self.buffers.state_room,
            self.dtype,
        )
        num_slots = kv_cache_config.num_blocks * block_size
        parts = StateParts(self.group, self.model_config.get_hidden_size())
        parked = parked_states(kv_cache_config, block_tables, layers, parts.width)
        self.buffers.attach_kv_cache(num_slots, len(specs), state, aux, parked)
        self.block_tables = block_tables.input_block_tables
        if blocks is not None:
            self.copier = BlockCopier(blocks, self.buffers.slot_position)
            self.prompt_group = next(g for g, s in enumerate(specs) if isinstance(s, PromptSpec))
        parks_all = self.vllm_config.cache_config.enable_prefix_caching
        self.boundary = Boundary(
            self.schedule, self.buffers, stage_tables, block_size, parks_all, parts, self.trace
        )
        layer_names = [group.layer_names for group in kv_cache_config.kv_cache_groups]
        self.groups = [
            (stage, group, self.model.layer_names[layers[-1]], layer_names[group])
            for stage, tables in enumerate(stage_tables)
            for layers in [self.schedule.stage_layers(stage)]
            for group, _ in tables
        ]
        if self.group.world_size > 1 and self.schedule.prunes:
            self.boundary.reduction = self._reduction(kv_cache_config.num_blocks)
        if self.group.is_first_rank:
            log_start(self.vllm_config, self.schedule, kv_cache_config)

    def _reduction(self, num_blocks: int) -> ScoreReduction:
        longest = self.max_model_len
        most = min(self.max_num_reqs * longest, self.needs.most_pruned_tokens(num_blocks))
        is_peak = self.boundary.scorer.peak
        return ScoreReduction(self.group, is_peak, longest, most, self.device)

    # A step.

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Steps made up meanwhile run all that there is; see ``warm_up``."""
        self._made_up_kind = StepKind.WARM_UP
        try:
            yield
        finally:
            self._made_up_kind = StepKind.DUMMY

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
        if for_capture:
            kind = self.capture_kind
        elif input_batch.req_ids[0] not in self.index_of:
            kind = self._made_up_kind
        else:
            replays = cudagraph_mode == CUDAGraphMode.FULL
            kind = StepKind.REPLAY if replays else StepKind.RUN
        if kind.is_in_full_graph:
            num_decodes = input_batch.num_reqs
        elif kind is StepKind.RUN:
            num_decodes = int((~input_batch.is_prefilling_np).sum())
        else:
            num_decodes = int((input_batch.num_scheduled_tokens == 1).sum())
        is_plain, turns = False, None
        if kind is StepKind.RUN:
            is_plain = step_plans.is_plain(self, input_batch, num_decodes)
            given = input_batch, slot_mappings
            input_batch, slot_mappings, turns = give_places(self, num_decodes, *given)
            num_decodes = int((~input_batch.is_prefilling_np).sum())
        if num_decodes or not is_plain:
            self._fill_batch(kind, input_batch, num_decodes, turns)
        if kind is StepKind.REPLAY:
            self.stats.selecting_steps += bool(self.selecting)  # by which its graph was chosen
        if kind.has_requests:
            self._forget_full_requests()
        if kind is StepKind.REPLAY:
            return {}
        given = input_batch, num_decodes, slot_mappings
        if is_plain:
            return self.metadata_of(step_plans.plain_step(self, *given))
        return self.metadata_of(step_plans.planned_step(self, kind, *given, turns))

    def _fill_batch(
        self, kind: StepKind, input_batch: InputBatch, num_decodes: int, turns: Turns | None
    ) -> None:
        """Who is in the batch, and how many tokens each decode may revive at a boundary."""
        self.table.apply_staged_writes()
        num_reqs, padded = input_batch.num_reqs, input_batch.num_reqs_after_padding
        if kind.has_requests:
            index = input_batch.idx_mapping_np.tolist()
            self.buffers.set_index(index, input_batch.idx_mapping, padded)
        else:
            self.buffers.clear_index(padded)
        padded = num_decodes + padded - num_reqs
        if turns is not None:
            self.buffers.set_turns(turns)
            num_turns = len(turns.tokens)
            num_decodes = int((input_batch.idx_mapping_np[num_turns:num_decodes] >= 0).sum())
            padded -= num_turns
        if num_decodes:
            quota = self.schedule.revive_quota(num_decodes)
            self.buffers.set_quota(min(quota, self.schedule.largest_quota(padded)))

    def _forget_full_requests(self) -> None:
        """Requests that can revive nothing more need no selection; but strict decoding does, and a
        trace shows what every step selects."""
        if self.schedule.is_strict or self.trace:
            return
        for req_id in self.room_watch.step(self.selecting, self.plans):
            del self.selecting[req_id]

    def metadata_of(self, step: Step) -> dict[str, StageMetadata]:
        """What each layer is told of a step, by its name."""
        metadata = {}
        for stage, group, last_layer, names in self.groups:
            of_group = StageMetadata(step, self.boundary, stage, group, last_layer)
            metadata |= dict.fromkeys(names, of_group)
        return metadata

    def note_batch(self, batch, scheduler_output: SchedulerOutput):
        """Called before a batch's graph is chosen, with vLLM's ``BatchReqState``. Returns it, its
        prefills those that do not run as decodes do."""
        self.legs = getattr(scheduler_output, LEGS, {})
        self.batch_runs_alike = not batch.has_prefill or step_plans.sort_prefills(self, batch)
        return batch


def _reads_prompt(params) -> bool:
    """Whether a request's sampling parameters ask for something of every prompt token."""
    return params is not None and (
        params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
    )
