"""What engines run in tests for vLLM's kernels is what these do."""

import inspect
import random
from collections.abc import Callable

import pytest
import torch
from harness import block_tables, sampling, step_kernels

from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
from vllm.v1.worker.gpu import block_table, buffer_utils, input_batch
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.sample import logprob, sampler

BLOCK_SIZES, WIDTHS, MAX_TOKENS = [16, 32, 16], [12, 7, 20], 200
HAS_WINDOWS = "sliding_window_reach" in inspect.signature(BlockTables).parameters


def _tables(seed: int) -> tuple[BlockTables, random.Random]:
    """Six requests with blocks for 60 to 190 tokens, in groups of which one maps no slots and, in
    vLLM 0.33, one sees a window of 40 tokens."""
    rng = random.Random(seed)
    own = {"sliding_window_reach": [40, 0, 0]} if HAS_WINDOWS else {}
    enabled = [True, True, False]
    device = torch.device("cpu")
    tables = BlockTables(
        BLOCK_SIZES, 6, MAX_TOKENS, WIDTHS, device, slot_mapping_enabled=enabled, **own
    )
    for request in range(6):
        tokens = rng.randrange(60, 190)
        blocks = tuple([rng.randrange(1, 900) for _ in range(-(-tokens // n))] for n in BLOCK_SIZES)
        tables.append_block_ids(request, blocks, overwrite=True)
    tables.apply_staged_writes()
    return tables, rng


def _run(seed: int) -> list[torch.Tensor]:
    """Tables and slots of a step: chunks of four requests out of order, two rows of padding, over
    what an earlier step left."""
    tables, rng = _tables(seed)
    for row in (*tables.input_block_tables, tables.slot_mappings):
        row.fill_(7)
    index = torch.tensor(rng.sample(range(6), 4), dtype=torch.int32)
    first = [rng.randrange(45) for _ in range(4)]
    chunks = [range(n, n + rng.randrange(1, 15)) for n in first]
    starts = torch.tensor([0, *map(len, chunks)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.tensor([p for chunk in chunks for p in chunk])
    computed = torch.full((6,), 59, dtype=torch.int32)
    window = {"num_computed_tokens": computed} if HAS_WINDOWS else {}
    rows = tables.gather_block_tables(index, 6, **window)
    whole = torch.tensor([-1, *index[1:]], dtype=torch.int32)  # the first is a dummy
    slots = [
        tables.compute_slot_mappings(of, starts, positions, MAX_TOKENS).clone()
        for of in (index, whole)
    ]
    return [*rows, *slots]


@pytest.fixture
def install(monkeypatch):
    """Installs all; afterwards vLLM's own are back."""
    monkeypatch.setattr(buffer_utils, "UvaBuffer", UvaBuffer)
    monkeypatch.setattr(sampler, "gumbel_sample", sampler.gumbel_sample)
    for module in (block_table, buffer_utils, input_batch, logprob):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, getattr(module, name))

    def install() -> None:
        block_tables.install()
        step_kernels.install()
        sampling.install()

    return install


def _same_with(install: Callable, run: Callable, seed: int) -> list[torch.Tensor]:
    """What it runs is with ours as with vLLM's, which is returned."""
    expected = run(seed)
    install()
    for mine, theirs in zip(run(seed), expected, strict=True):
        assert torch.equal(mine, theirs)
    return expected


@pytest.mark.parametrize("seed", range(4))
def test_block_tables(seed, install):
    expected = _same_with(install, _run, seed)
    assert (expected[-1] == -1).any() and (expected[0] == 0).any()


MAX_REQUESTS, MAX_LENGTH = 6, 40


def _step(seed: int) -> list[torch.Tensor]:
    """All that a step of four requests out of order has, over what an earlier step left: a decode,
    a prompt's last chunk, a chunk in its middle, and one more decode; then what it said."""
    rng = random.Random(seed)

    def ints(*values, dtype=torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    def numbers(*shape: int, dtype=torch.int32) -> torch.Tensor:
        total = torch.Size(shape).numel()
        return torch.tensor([rng.randrange(500) for _ in range(total)], dtype=dtype).view(shape)

    index = rng.sample(range(MAX_REQUESTS), 4)
    lengths = [rng.randrange(20, 30) for _ in range(MAX_REQUESTS)]
    computed = [rng.randrange(1, 10) for _ in range(MAX_REQUESTS)]
    chunks = [1, rng.randrange(2, 9), rng.randrange(2, 9), 1]
    computed[index[0]], computed[index[3]] = lengths[index[0]], lengths[index[3]] + 3
    computed[index[1]] = lengths[index[1]] - chunks[1]
    starts = ints(0, *chunks).cumsum(0, dtype=torch.int32)
    rows, lengths, computed = ints(*index), ints(*lengths), ints(*computed)
    tokens = buffer_utils.StagedWriteTensor(
        (MAX_REQUESTS, MAX_LENGTH), dtype=torch.int32, device=torch.device("cpu")
    )
    for request in range(MAX_REQUESTS):
        tokens.stage_write(request, request % 2, numbers(30).tolist())
    tokens.apply_write()
    tokens.stage_write_elem(3, 777)
    tokens.stage_write(2, 5, [7, 8, 9])
    tokens.apply_write()

    ids, following = numbers(30), numbers(3, MAX_REQUESTS)
    state = ids, following, rows, starts, tokens.gpu, lengths, computed
    input_batch.prepare_prefill_inputs(*state)
    positions, seq_lens = numbers(30, dtype=torch.int64), numbers(MAX_REQUESTS)
    input_batch.prepare_pos_seq_lens(rows, starts, computed, positions, seq_lens)
    last, cuts = numbers(MAX_REQUESTS, 1, dtype=torch.int64), torch.arange(5, dtype=torch.int32)
    drafts = numbers(MAX_REQUESTS, 0)
    at = input_batch.combine_sampled_and_draft_tokens(
        ids, rows, last, starts, seq_lens, lengths, drafts, cuts, 4
    )
    counts = input_batch.get_num_sampled_and_rejected(
        seq_lens.new_ones(4), seq_lens, cuts, rows, lengths
    )
    assert sorted(counts[0].tolist()) == [0, 1, 1, 1]
    said, bins = numbers(4, 1, dtype=torch.int64), numbers(MAX_REQUESTS, 500)
    totals = torch.maximum(lengths, computed)
    skipped = ints(-1, *index[1:])  # the first is a dummy
    for each in (rows, skipped):
        state = each, computed, last, bins, said, counts[0], ints(0, 1, 0, 0), starts
        state += tokens.gpu, totals
        input_batch.post_update(*state)
    input_batch.post_update(*state[:3], None, *state[4:7], None, *state[8:])
    return [ids, following, positions, seq_lens, last, at, *counts, bins, *state[1:]]


@pytest.mark.parametrize("seed", range(4))
def test_steps(seed, install):
    _same_with(install, _step, seed)


def test_sampling(install):
    """A vocabulary of more than one of the kernels' blocks, in rows with something between."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 1500, generator=generator)[:, :1300]
    tokens = torch.randint(1300, (5,), generator=generator)
    mapping = torch.tensor([2, 0, 1, 4, 3])

    def run(temperatures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = logprob.compute_topk_scores(logits, 3, tokens)
        given = logits, mapping, temperatures, torch.arange(5), torch.arange(5)
        sampled = sampler.gumbel_sample(*given, apply_temperature=True, is_drafting=False)
        return scores.logprob_token_ids, scores.selected_token_ranks, sampled, scores.logprobs

    temperatures = torch.zeros(5), torch.tensor([0, 0, 1.5, 0, 3])
    expected = [run(each) for each in temperatures]
    install()
    for each, theirs in zip(temperatures, expected):
        *mine, logprobs = run(each)
        assert all(torch.equal(*pair) for pair in zip(mine, theirs))
        torch.testing.assert_close(logprobs, theirs[-1], rtol=1e-5, atol=1e-5)
