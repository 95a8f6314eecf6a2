"""Each Triton kernel against its reference, on random inputs with poisoned outputs.

Here the kernels run in Triton's interpreter; ``tests/gpu`` runs the same checks compiled.
"""

import pytest
from kernel_checks import (
    LONG,
    ROTARY_SHAPES,
    check_attention,
    check_aux_copies,
    check_begin_step,
    check_decode_selection,
    check_place_and_write,
    check_prefill_attention,
    check_prefill_selection,
    check_rank,
    check_rotate_and_write,
    check_score,
    check_strict_attention_masks,
)

from lazyllm_vllm.kernels import rank, select_decode, select_prefill, top_k

SEEDS = (0, 1, LONG)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", (0, 1, 2))
@pytest.mark.parametrize("strict", (False, True))
def test_attention(seed, stage, strict):
    check_attention(seed, stage, strict)


def test_strict_attention_masks():
    check_strict_attention_masks()


def test_prefill_attention():
    check_prefill_attention(0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage, window, peak", ((0, 4, False), (2, 1, True), (2, 16, True)))
def test_score(seed, stage, window, peak):
    check_score(seed, stage, window, peak)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("pool", (1, 13))
@pytest.mark.parametrize("strict", (False, True))
def test_rank(seed, stage, pool, strict):
    check_rank(seed, stage, pool, strict)


@pytest.fixture(params=[(seed, None) for seed in SEEDS[:2]] + [(LONG, 2)])
def seed_and_splits(request, monkeypatch):
    """A world's seed; for long prompts, so few programs that each has several blocks of them."""
    seed, splits = request.param
    if splits:
        for module in (rank, top_k, select_prefill, select_decode):
            monkeypatch.setattr(module, "num_splits", lambda num_requests: splits)
    return seed


@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("ties", (True, False))
def test_prefill_selection(seed_and_splits, stage, ties):
    check_prefill_selection(seed_and_splits, stage, ties)


@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("share, ties", ((0, True), (3, True), (40, True), (5, False)))
def test_decode_selection(seed_and_splits, stage, strict, share, ties):
    check_decode_selection(seed_and_splits, stage, strict, share, ties)


@pytest.mark.parametrize("share", (0, 1, 5))
@pytest.mark.parametrize("always", (False, True))
@pytest.mark.parametrize("num_decodes", (0, 4))
def test_begin_step(share, always, num_decodes):
    check_begin_step(0, share, always, num_decodes)


@pytest.mark.parametrize("seed", SEEDS)
def test_place_and_write(seed):
    check_place_and_write(seed)


@pytest.mark.parametrize("shape", range(len(ROTARY_SHAPES)))
def test_rotate_and_write(shape):
    check_rotate_and_write(shape)


@pytest.mark.parametrize("has_aux", (False, True))
def test_aux_copies(has_aux):
    check_aux_copies(has_aux)
