"""Each Triton kernel against its reference, on random inputs with poisoned outputs.

Here the kernels run in Triton's interpreter; ``tests/gpu`` runs the same checks compiled.
"""

import pytest
from kernel_checks import (
    LONG,
    check_attention,
    check_aux_copies,
    check_decode_selection,
    check_place_and_write,
    check_prefill_attention,
    check_prefill_selection,
    check_rank,
    check_score,
    check_strict_attention_masks,
)

SEEDS = (0, 1, 2, LONG)


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
@pytest.mark.parametrize("stage", (0, 2))
def test_score(seed, stage):
    check_score(seed, stage)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("pool", (1, 13))
@pytest.mark.parametrize("strict", (False, True))
def test_rank(seed, stage, pool, strict):
    check_rank(seed, stage, pool, strict)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", (1, 2))
def test_prefill_selection(seed, stage):
    check_prefill_selection(seed, stage)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("share", (0, 3, 40))
def test_decode_selection(seed, stage, strict, share):
    check_decode_selection(seed, stage, strict, share)


@pytest.mark.parametrize("seed", SEEDS)
def test_place_and_write(seed):
    check_place_and_write(seed)


@pytest.mark.parametrize("has_aux", (False, True))
def test_aux_copies(has_aux):
    check_aux_copies(has_aux)
