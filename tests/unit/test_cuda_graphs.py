"""Which of a batch size's two CUDA graphs a step replays, as far as that shows without a GPU."""

from types import SimpleNamespace

import pytest
import torch

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

from lazyllm_vllm.hooks.cuda_graphs import PLAIN, SELECTING, LazyCudaGraphManager
from lazyllm_vllm.runtime.room_watch import INTERVAL, LATER, RoomWatch


@pytest.fixture
def manager():
    """As vLLM's manager stands after it has captured both graphs of 4 requests."""
    manager = object.__new__(LazyCudaGraphManager)
    manager._graphs_captured = True
    manager.model_state = SimpleNamespace(selecting={}, batch_runs_alike=True)
    manager._lora_dispatch_map, manager._max_lora_case = {1: 1}, 1
    descriptors = {
        case: BatchExecutionDescriptor(
            CUDAGraphMode.FULL,
            num_tokens=4,
            num_reqs=4,
            uniform_token_count=1,
            num_active_loras=case,
        )
        for case in (PLAIN, SELECTING)
    }
    manager._candidates = {(n, c): [d] for n in range(5) for c, d in descriptors.items()}
    return manager


def test_a_batch_that_may_select_replays_the_selecting_graph(manager):
    assert manager.dispatch(3, 3, 1, 0).num_active_loras == PLAIN
    manager.model_state.selecting["a"] = 0
    descriptor = manager.dispatch(3, 3, 1, 0)
    assert descriptor.num_active_loras == SELECTING and descriptor.cg_mode == CUDAGraphMode.FULL


def test_batches_whose_stages_run_alike_run_in_pieces(manager):
    piecewise = BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, num_tokens=384, num_reqs=None)
    manager._candidates |= {(n, PLAIN): [piecewise] for n in range(5, 385)}
    assert manager.dispatch(2, 300, None, 0) == piecewise
    manager.model_state.batch_runs_alike = False
    descriptor = manager.dispatch(2, 300, None, 0)
    assert descriptor.cg_mode == CUDAGraphMode.NONE and descriptor.num_tokens == 300
    manager.model_state.batch_runs_alike = True
    manager.model_state.selecting["a"] = 0
    assert manager.dispatch(2, 300, None, 0).cg_mode == CUDAGraphMode.NONE


def test_nothing_selects_in_pieces(monkeypatch):
    """Of vLLM's candidates for either case, piecewise graphs are kept for the plain one alone."""

    def find(manager):
        for mode, tokens in ((CUDAGraphMode.FULL, 4), (CUDAGraphMode.PIECEWISE, 384)):
            both = [
                BatchExecutionDescriptor(mode, num_tokens=tokens, num_reqs=4, num_active_loras=case)
                for case in (PLAIN, SELECTING)
            ]
            manager._capture_descs[mode] = both
            manager._candidates |= {(tokens, d.num_active_loras): [d] for d in both}

    monkeypatch.setattr(ModelCudaGraphManager, "_init_candidates", find)
    manager = object.__new__(LazyCudaGraphManager)
    manager._capture_descs, manager._candidates = {}, {}
    manager.cudagraph_mode = CUDAGraphMode.NONE
    manager.compilation_config = SimpleNamespace(cudagraph_capture_sizes=[])
    manager._init_candidates()
    assert len(manager._capture_descs[CUDAGraphMode.FULL]) == 2
    assert len(manager._capture_descs[CUDAGraphMode.PIECEWISE]) == 1
    assert manager._candidates[384, PLAIN] and manager._candidates[384, SELECTING] == []


@pytest.mark.parametrize(
    "sizes, most, has_experts, expected",
    (
        ([1, 512], 8192, False, [640, 768, 896, 1024, 1280, 1536, 1792, 2048]),
        ([1, 1600], 3500, True, [1792, 2048, 2560, 3072]),
        ([1, 500], 800, False, [512, 640, 768]),
        ([1, 4096], 8192, True, []),
    ),
)
def test_pieces_go_on_where_vllm_ends_and_decode_batches_do_not(sizes, most, has_experts, expected):
    """vLLM's own candidates, of sizes that it is given."""
    manager = object.__new__(LazyCudaGraphManager)
    config = SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=max(sizes))
    manager.compilation_config = config
    manager.vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=most),
        model_config=SimpleNamespace(is_moe=has_experts),
        speculative_config=None,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )
    manager.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    manager.max_num_reqs, manager.decode_query_len = 2048, 1
    manager.varlen_decode, manager.ubatch_runner = False, None
    manager.lora_capture_cases = [PLAIN, SELECTING]
    manager._capture_descs, manager._candidates = {}, {}
    manager._init_candidates()
    of = {
        mode: sorted({descriptor.num_tokens for descriptor in manager._capture_descs[mode]})
        for mode in (CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE)
    }
    assert of[CUDAGraphMode.PIECEWISE] == sizes + expected
    assert of[CUDAGraphMode.FULL] == [size for size in sizes if size <= 2048]
    assert config.cudagraph_capture_sizes == sizes, "vLLM's own are as they were"


def test_a_batch_without_a_graph_runs_eagerly_with_no_adapter(manager):
    manager.model_state.selecting["a"] = 0
    descriptor = manager.dispatch(3, 900, None, 0)
    assert descriptor.cg_mode == CUDAGraphMode.NONE and descriptor.num_active_loras == 0


def test_full_requests_are_found_and_no_others():
    table = SimpleNamespace(gpu=torch.zeros(8, 8, dtype=torch.int32))
    index_of = {"full": 0, "roomy": 1, "back": 2, "gone": 3}
    lengths = {"full": 100, "roomy": 100, "back": 101, "gone": 100}
    plans = {name: SimpleNamespace(num_prompt=n) for name, n in lengths.items()}
    for at in index_of.values():
        # num_prompt, state_room, kept[2], capacity[2], prompt_keys[2]
        table.gpu[at] = torch.tensor([100, 200, 100, 68, 100, 72, 100, 72 if at != 1 else 71])
    watch = RoomWatch(table)
    full = []
    for _ in range(INTERVAL + LATER - 1):
        full += watch.step(index_of, plans)
    del index_of["gone"]
    assert full == []
    assert watch.step(index_of, plans) == ["full"], "'back' was prefilled anew since"
