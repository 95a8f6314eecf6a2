"""Hidden states across the first boundary: parked page by page, and found again as they were."""

import pytest
import torch
from harness.world import POISON, World, make_world

from lazyllm_vllm.kernels.paged import FP8
from lazyllm_vllm.kernels.parked import (
    ParkedPage,
    ParkedStates,
    fetch_tokens_reference,
    fetch_tokens_triton,
    park_tokens_reference,
    park_tokens_triton,
)

GROUPS = 3
PARKS = (park_tokens_triton, park_tokens_reference)
FETCHES = (fetch_tokens_triton, fetch_tokens_reference)
# Hidden size, width of a page, and the KV cache group of each page.
SHAPES = ((40, 16, (2, 0, 2)), (64, 32, (1, 1)), (56, 24, (0, 2, 1)), (30, 48, (1,)))


class Parking:
    """Pages of KV cache groups that have blocks of their own for the same requests."""

    def __init__(self, w: World, shape, is_fp8: bool) -> None:
        self.w = w
        self.hidden_size, self.width, self.groups = shape
        self.dtype = FP8 if is_fp8 else w.dtype
        self.tables = [w.shuffled(len(w.prompts), w.width) + 1 for _ in range(GROUPS)]

    def empty(self) -> ParkedStates:
        """Poisoned pages that lie in each other's gaps, as layers do in a block."""
        w = self.w
        size = w.block_size * self.width
        stride = len(self.groups) * size + 32
        buffer = torch.full((w.num_blocks * stride * self.dtype.itemsize,), POISON).to(torch.int8)
        buffer = buffer.to(w.device).view(self.dtype).view(w.num_blocks, stride)
        pages = []
        for nth, group in enumerate(self.groups):
            cache = buffer[:, nth * size : (nth + 1) * size].unflatten(1, (w.block_size, -1))
            pages.append(ParkedPage(cache, self.tables[group], group, nth * self.width))
        scale = torch.full((w.num_blocks * w.block_size,), 7.0, device=w.device)
        return ParkedStates(pages, scale if self.dtype == FP8 else None)

    def slots(self, request: torch.Tensor, position: torch.Tensor, padding: int) -> torch.Tensor:
        """``[groups, rows]``, -1 for nobody's rows; some more columns than rows."""
        size = self.w.block_size
        in_group = []
        for table in self.tables:
            block = table.cpu()[request.clamp(min=0), position // size].long()
            in_group.append((block * size + position % size).where(request >= 0, -1))
        slots = torch.stack(in_group)
        return torch.nn.functional.pad(slots, (0, padding), value=1).to(self.w.device)

    def exact_states(self, num_rows: int) -> torch.Tensor:
        """States that FP8 stores as they are: numbers of e4m3, the largest among them, times a
        power of two that differs by row; the third row is zeros."""
        w, shape = self.w, (num_rows, self.hidden_size)
        byte = torch.randint(0, 256, shape, generator=w.random)
        byte = byte.where(byte % 128 < 127, 0).to(torch.uint8)  # 127 and 255 are no numbers
        states = byte.view(FP8).float()
        largest = torch.randint(0, self.hidden_size, (num_rows, 1), generator=w.random)
        sign = torch.randint(0, 2, (num_rows, 1), generator=w.random) * 2.0 - 1
        states.scatter_(1, largest, 448.0 * sign)
        states *= 2.0 ** torch.randint(-12, 5, (num_rows, 1), generator=w.random)
        states[2] = 0
        return (states + 0.0).to(w.device, w.dtype)  # no zero has a sign, which a sum would lose


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def all_tokens(w: World):
    """Of all prompts, in a shuffled order, every fifth row nobody's."""
    request = torch.repeat_interleave(torch.arange(4), torch.tensor(w.prompts))
    position = torch.cat([torch.arange(p) for p in w.prompts])
    order = torch.randperm(len(request), generator=w.random)
    request, position = request[order], position[order]
    request[::5] = -1
    return request, position


def split(w: World, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two addends, element by element of shares that leave no rest."""
    share = torch.tensor([0.0, 0.25, 0.5, 1.0, -1.0])
    share = share[torch.randint(0, len(share), states.shape, generator=w.random)]
    residual = states * share.to(w.device, w.dtype)
    return states - residual, residual


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_fp8", (False, True))
@pytest.mark.parametrize("has_residual", (False, True))
def test_parked_states_are_fetched(shape, is_fp8, has_residual, device, dtype):
    w = make_world(0, 0, device=device, dtype=dtype)
    parking = Parking(w, shape, is_fp8)
    request, position = all_tokens(w)
    states = parking.exact_states(len(request))
    hidden, residual = split(w, states) if has_residual else (states, None)
    slots = parking.slots(request, position, padding=3)
    results = []
    for park in PARKS:
        parked = parking.empty()
        park(hidden, residual, slots, parked)
        results.append(parked)
    for mine, theirs in zip(results[0].pages, results[1].pages):
        assert torch.equal(bits(mine.cache), bits(theirs.cache))
    parked, empty = results[0], parking.empty()
    there = (request >= 0).nonzero()[:, 0].to(device)
    assert 0 < len(there) < len(request)

    scale = torch.ones(len(states), device=device)
    if is_fp8:
        assert torch.equal(parked.scale, results[1].scale)
        highest = states.float().abs().amax(1)
        scale = (highest / 448).where(highest > 0, 1.0)
        expected = empty.scale.clone()
        expected[slots[parking.groups[0], there]] = scale[there]
        assert torch.equal(parked.scale, expected)
    # Each dimension in its page, at the token's slot in the page's group; nothing else touched.
    for nth, (page, before) in enumerate(zip(parked.pages, empty.pages)):
        expected = before.cache.clone().flatten(0, 1)
        for i in range(min(shape[1], shape[0] - nth * shape[1])):
            part = states[:, nth * shape[1] + i].float() / scale
            expected[slots[page.group, there], i] = part[there].to(parking.dtype)
        assert torch.equal(bits(page.cache.flatten(0, 1)), bits(expected))

    # Some go on from rows, some from where they are parked, one row is nobody's.
    back = there[torch.randperm(len(there), generator=w.random)[:40].to(device)]
    source = back.int()
    source[::3] = -1
    rows = w.rows(len(back) + 1)
    rows.request[:-1] = request.int().to(device)[back]
    rows.position[:-1] = position.to(device)[back]
    rows.source[:-1], rows.source[-1], rows.request[-1] = source, -1, -1
    others = torch.full_like(states, float("nan"))  # rows that nobody names
    named = source[source >= 0].long()
    others[named] = states[named]
    for fetch in FETCHES:
        out = torch.full((len(back) + 1, shape[0]), 9e9, device=device, dtype=dtype)
        fetch(out, others, rows, parked)
        assert torch.equal(out[:-1], states[back])
        assert (out[-1] == 0).all()


@pytest.mark.parametrize("has_residual", (False, True))
def test_states_in_fp8_come_back_rounded(has_residual, device, dtype):
    """Each with a scale of its own: rows a thousand times larger than others, and one of zeros."""
    w = make_world(1, 0, device=device, dtype=dtype)
    parking = Parking(w, (200, 64, (0, 1, 1, 2)), is_fp8=True)
    request, position = all_tokens(w)
    num_rows = len(request)
    size = 10.0 ** torch.randint(-2, 4, (num_rows, 1), generator=w.random)
    hidden, residual = (w.rand(num_rows, 200) * size.to(device, dtype) for _ in range(2))
    hidden[3], residual[3] = 0, 0
    residual = residual if has_residual else None
    states = (hidden if residual is None else hidden + residual).float()
    scale = states.abs().amax(1, keepdim=True) / 448
    slots = parking.slots(request, position, padding=0)
    rows = w.rows(num_rows)
    rows.request[:], rows.position[:], rows.source[:] = request.int(), position, -1
    there = request.to(device) >= 0
    for park in PARKS:
        parked = parking.empty()
        park(hidden, residual, slots, parked)
        outs = []
        for fetch in FETCHES:
            out = torch.full_like(hidden, 9e9)
            fetch(out, hidden, rows, parked)
            # e4m3 has three bits behind the point, and steps of 2^-9 near zero.
            bound = states.abs() / 16 * 1.05 + scale * 2.0**-9
            is_near = ((out.float() - states).abs() <= bound)[there]
            # Triton's interpreter stores some numbers wrongly, where a carry goes to the exponent.
            is_exact = device == "cuda" or park is park_tokens_reference
            assert is_near.all() if is_exact else is_near.float().mean() > 0.97
            assert (out[~there] == 0).all()
            outs.append(out)
        assert torch.equal(*outs)


def test_requests_that_share_blocks_share_what_is_parked_there(device, dtype):
    """The second's first blocks are the first's: it fetches what only that has parked."""
    w = make_world(0, 0, device=device, dtype=dtype)
    for is_fp8 in (False, True):
        parking = Parking(w, SHAPES[0], is_fp8)
        for table in parking.tables:
            table[1, :2] = table[0, :2]
        position = torch.arange(2 * w.block_size)
        states = parking.exact_states(len(position))
        slots = parking.slots(torch.zeros_like(position), position, padding=0)
        rows = w.rows(len(position))
        rows.request[:], rows.position[:], rows.source[:] = 1, position, -1
        for park, fetch in zip(PARKS, FETCHES):
            parked, out = parking.empty(), torch.full_like(states, 9e9)
            park(states, None, slots, parked)
            fetch(out, states, rows, parked)
            assert torch.equal(out, states)
