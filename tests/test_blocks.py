"""Blocks asked of vLLM's own pool, over random lives of requests: by the arithmetic, none lost."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool

from lazyllm_vllm.config import LazyLLMConfig
from lazyllm_vllm.grouping import layers_per_group
from lazyllm_vllm.kv_cache.managers import AuxManager, StageManager
from lazyllm_vllm.kv_cache.specs import AuxSpec, StageSpec
from lazyllm_vllm.schedule import Schedule

BLOCK = 16


def _managers(schedule: Schedule, pool: BlockPool):
    common = {"block_pool": pool, "enable_caching": False, "scheduler_block_size": BLOCK}
    for stage in range(schedule.num_stages):
        spec = StageSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32,
            stage=stage, schedule=schedule,
        )  # fmt: skip
        yield StageManager(spec, kv_cache_group_id=stage, **common)
    aux = AuxSpec(
        block_size=BLOCK, page_size=spec.page_size_bytes, pages=3, vector_size=100,
        schedule=schedule,
    )  # fmt: skip
    yield AuxManager(aux, kv_cache_group_id=schedule.num_stages, **common)


@settings(max_examples=150, deadline=None)
@given(
    keeps=st.lists(st.integers(1, 100), min_size=1, max_size=3),
    reserve=st.integers(0, 10),
    lives=st.lists(st.tuples(st.integers(1, 400), st.integers(0, 80)), min_size=1, max_size=5),
)
def test_blocks_follow_the_arithmetic_and_come_back(keeps, reserve, lives):
    keeps = sorted((k / 100 for k in keeps), reverse=True)
    config = LazyLLMConfig(
        prune=tuple({"layer": i + 1, "keep": k} for i, k in enumerate(keeps)),
        min_prompt_tokens=50, first_tokens=2, last_tokens=8, revive_reserve=reserve / 10,
    )  # fmt: skip
    schedule = Schedule.build(config, len(keeps) + 1)
    pool = BlockPool(num_gpu_blocks=4000, enable_caching=False, hash_block_size=BLOCK)
    free = pool.get_num_free_blocks()
    managers = list(_managers(schedule, pool))
    per_aux_block = managers[-1].kv_cache_spec.tokens_per_block
    for i, (prompt, decoded) in enumerate(lives):
        for total in range(prompt, prompt + decoded + 1):
            for manager in managers:
                before = pool.get_num_free_blocks()
                wanted = manager.get_num_blocks_to_allocate(f"r{i}", total, [], 0, 0, total)
                manager.allocate_new_blocks(f"r{i}", total, total)
                assert before - pool.get_num_free_blocks() == wanted
        *stages, aux = (len(m.req_to_blocks[f"r{i}"]) for m in managers)
        for stage, blocks in enumerate(stages):
            assert blocks == cdiv(schedule.slots(stage, prompt, prompt + decoded), BLOCK)
        pruned = schedule.is_pruned(prompt)
        assert aux == (cdiv(prompt, per_aux_block) if pruned else 0)
        # Room for every key that there can ever be, with the current token's.
        for stage, blocks in enumerate(stages):
            most = schedule.prompt_room(stage, prompt) + decoded
            assert blocks * BLOCK >= most
            assert schedule.kept(prompt)[stage] <= schedule.prompt_room(stage, prompt) <= prompt
        if i % 2:  # preempted: prefilled anew, prompt and output as one prompt
            for manager in managers:
                manager.free(f"r{i}")
                manager.allocate_new_blocks(f"r{i}", prompt + decoded, prompt + decoded)
            for stage, manager in enumerate(managers[:-1]):
                blocks = len(manager.req_to_blocks[f"r{i}"])
                length = prompt + decoded
                assert blocks == cdiv(schedule.slots(stage, length, length), BLOCK)
    for i in range(len(lives)):
        for manager in managers:
            manager.free(f"r{i}")
    assert pool.get_num_free_blocks() == free
    assert not any(m.plans or m.req_to_blocks for m in managers)


def test_group_size_is_vllms():
    """vLLM's own grouping of unequal stages leaves each Aux block as many pages as its groups."""
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size

    equal, uneven, near = (0, 8, 16, 24, 32), (0, 5, 10, 22, 32), (0, 11, 21, 32)
    for starts in (equal, uneven, near, (0, 4, 16, 32), (0, 5, 12), (0, 6, 16, 32)):
        config = LazyLLMConfig(prune=tuple({"layer": s, "keep": 0.5} for s in starts[1:-1]))
        schedule = Schedule.build(config, starts[-1])
        size = layers_per_group(schedule.stage_sizes)
        specs = {
            f"layers.{i}": StageSpec(
                block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32,
                stage=schedule.stage_of(i), schedule=schedule,
            )
            for i in range(starts[-1])
        }  # fmt: skip
        aux = AuxSpec(
            block_size=BLOCK, page_size=specs["layers.0"].page_size_bytes, pages=size,
            vector_size=100, schedule=schedule,
        )  # fmt: skip
        specs |= {f"aux.{i}": aux for i in range(size)}
        groups = _get_kv_cache_groups_uniform_page_size(specs)
        assert max(len(g.layer_names) for g in groups) == size
        stages = [g.kv_cache_spec.stage for g in groups if isinstance(g.kv_cache_spec, StageSpec)]
        assert sorted(set(stages)) == list(range(schedule.num_stages))
        for g in groups:
            if isinstance(g.kv_cache_spec, StageSpec):
                layers = [int(n.split(".")[1]) for n in g.layer_names]
                assert {schedule.stage_of(i) for i in layers} == {g.kv_cache_spec.stage}
