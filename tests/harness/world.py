"""A random engine state for kernel tests: requests of odd lengths in shuffled blocks, some of their
prompt tokens present in later stages, every output poisoned."""

from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace

import torch

from lazyllm_vllm.kernels.paged import StageKeys
from lazyllm_vllm.kernels.prompt_pages import PLANES, AuxCache, Pages, PromptState
from lazyllm_vllm.kernels.selection import Choice, PromptCounts, Rows, Segments, Selection
from lazyllm_vllm.kernels.top_k import make_search

LONG = 3  # a seed whose prompts take several tiles, whatever the kernel's tile
POISON = -99
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, atol: float | None = None) -> None:
    """Assert that arithmetic in ``dtype`` may tell them apart."""
    tolerance = TOLERANCE[dtype]
    atol = tolerance if atol is None else atol
    torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=atol)


def same(a, b, where: str = "") -> None:
    """Assert that two values, dataclasses of tensors among them, are equal."""
    if isinstance(a, torch.Tensor):
        if a.dtype == torch.float32:  # poison is no number
            a, b = a.view(torch.int32), b.view(torch.int32)
        assert torch.equal(a, b), where
    elif is_dataclass(a):
        for name in a.__dataclass_fields__:
            same(getattr(a, name), getattr(b, name), f"{where}.{name}")
    else:
        assert a == b, where


@dataclass
class World:
    """``prompts`` are prefilled lengths, ``decoded`` tokens after them (0: being prefilled)."""

    prompts: list[int]
    decoded: list[int]
    stage: int
    num_stages: int
    block_size: int
    kv_heads: int
    group: int
    head_dim: int
    quota: int
    strict: bool
    seed: int
    device: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        n = len(self.prompts)
        self.width = -(-max(p + d for p, d in zip(self.prompts, self.decoded)) // self.block_size)
        self.width += 2
        self.num_blocks = n * self.width + 1
        self.block_table = self.shuffled(n, self.width) + 1
        self.slot_position = torch.full((self.num_blocks * self.block_size,), -7).int()
        # Of each request's prompt, by position.
        self.level: list[torch.Tensor] = []
        self.selected: list[torch.Tensor] = []
        self.score: list[torch.Tensor] = []
        self.place: list[torch.Tensor] = []
        self.present: list[torch.Tensor] = []
        for i in range(n):
            self._fill_request(i)

    def shuffled(self, n: int, width: int) -> torch.Tensor:
        """A block table in which no block is twice."""
        order = torch.randperm(n * width, generator=self.random)
        return order.view(n, width).int().to(self.device)

    def rand(self, *shape) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.device, self.dtype)

    def ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _fill_request(self, i: int) -> None:
        """Give each prompt token a level of 1 .. stages and put those that reach ``stage`` in
        slots there, out of order, then the tokens decoded so far."""
        n = self.prompts[i]
        level = torch.randint(1, self.num_stages + 1, (n,), generator=self.random)
        level[-1] = self.num_stages
        self.level.append(level)
        self.selected.append(torch.randint(0, self.stage + 1, (n,), generator=self.random))
        self.score.append(torch.rand(n, generator=self.random))
        place = torch.full((n,), POISON)
        place[level > 1] = torch.randperm(int((level > 1).sum()), generator=self.random)
        self.place.append(place)
        present = (level > self.stage).nonzero()[:, 0]
        present = present[torch.randperm(len(present), generator=self.random)]
        self.present.append(present)
        position = torch.cat([present, torch.arange(n, n + self.decoded[i])])
        table = self.block_table[i].cpu().long()
        j = torch.arange(len(position))
        physical = table[j // self.block_size] * self.block_size + j % self.block_size
        self.slot_position[physical] = position.int()

    def with_ties(self) -> "World":
        """The same with scores of few distinct values, zero among them."""
        self.score = [(score * 4).floor() / 4 for score in self.score]
        return self

    def pages(self, slot_size: int, num_slots: int) -> tuple[Pages, int]:
        """Pages in which each request has so many slots, and the elements that hold them."""
        pages, per_page = (3, 4) if self.seed % 2 else (2, 7)
        width = -(-num_slots // (pages * per_page))
        page_stride = per_page * slot_size + 8
        block_stride = pages * page_stride + 4
        table = self.shuffled(len(self.prompts), width)
        pages = Pages(
            table, pages, per_page, slot_size, self.positions_per_slot, page_stride, block_stride
        )
        return pages, table.numel() * block_stride + slot_size

    @property
    def positions_per_slot(self) -> int:
        return 8 if self.seed % 2 else 10

    @contextmanager
    def _the_same_again(self):
        """Draw the same random numbers at every call, and leave those to come as they are."""
        state = self.random.get_state()
        self.random.manual_seed(self.seed + 1)
        yield
        self.random.set_state(state)

    def state(self) -> PromptState:
        """The prompt state, everything else in its buffer poisoned. The same at every call."""
        slots = -(-max(self.prompts) // self.positions_per_slot)
        with self._the_same_again():
            pages, size = self.pages(PLANES * self.positions_per_slot + 1, slots)
        words = torch.full((size,), POISON, dtype=torch.int32, device=self.device)
        state = PromptState.of_buffer(words, pages)
        for i, n in enumerate(self.prompts):
            at = state.at(i, torch.arange(n, device=self.device))
            state.score[at] = self.score[i].to(self.device)
            state.level[at] = self.level[i].int().to(self.device)
            state.selected[at] = self.selected[i].int().to(self.device)
            state.place[at] = self.place[i].int().to(self.device)
        return state

    def keys(self, lengths: list[int]) -> StageKeys:
        cache = self.rand(self.num_blocks, self.kv_heads, self.block_size, 2 * self.head_dim)
        position = self.slot_position.to(self.device)
        return StageKeys(cache, self.block_table, self.ints(lengths), position, self.stage)

    def selection(self, kept: list[int], room: int, least_revived: int = 0) -> Selection:
        """Fresh copies, so that a kernel and its reference start alike.

        Args:
            kept: of each request, in every stage.
            room: how many more tokens each may revive.
        """
        n, stages = len(self.prompts), self.num_stages
        table = torch.zeros(n + 3, 2 + 3 * stages, dtype=torch.int32, device=self.device)
        index = torch.randperm(n + 3, generator=torch.Generator().manual_seed(self.seed))[:n]
        scalars, *others = table.split([2] + 3 * [stages], dim=1)
        counts = PromptCounts(*scalars.unbind(1), *others)
        for i in range(n):
            counts.num_prompt[index[i]] = self.prompts[i]
            counts.state_room[index[i]] = self.prompts[i] + i
            counts.kept[index[i]] = kept[i]
            counts.capacity[index[i]] = len(self.present[i]) + room
            counts.prompt_keys[index[i]] = len(self.present[i])
        is_pruned = self.ints([int(k < p) for k, p in zip(kept, self.prompts)])
        choice = Choice.of(torch.zeros(3 + 2 * stages, n).int().to(self.device))
        choice.end[:] = self.ints(self.prompts)
        choice.count[:] = self.ints(kept)
        search = make_search(n, self.device)
        search.thresholds.fill_(POISON)
        search.split_counts.fill_(POISON)
        return Selection(
            state=self.state(),
            counts=counts,
            index=index.int().to(self.device),
            num_prompt=self.ints(self.prompts),
            is_pruned=is_pruned,
            state_room=torch.full_like(is_pruned, POISON),
            choice=choice,
            revivable=self.ints(self.prompts),
            active=is_pruned.repeat(stages, 1),
            limit=torch.full_like(is_pruned.repeat(stages, 1), min(self.quota, room)),
            quota=self.ints([self.quota]),
            first_row=self.ints([n + i * self.quota for i in range(n)]),
            least_revived=least_revived,
            turn_tokens=torch.zeros_like(is_pruned),
            turn_row=torch.zeros_like(is_pruned),
            turn_end=torch.zeros_like(is_pruned),
            turn_limit=torch.zeros_like(is_pruned.repeat(stages, 1)),
            search=search,
        )

    def rows(self, num_rows: int) -> Rows:
        """Poisoned rows of one stage that are nobody's."""
        rows = Rows.make(1, num_rows, len(self.prompts), self.device).of_stage(0)
        for tensor in (rows.slot, rows.source, rows.num_keys, rows.num_revived):
            tensor.fill_(POISON)
        return rows

    def segments(self, spans: list[tuple[int, int]], base: int) -> Segments:
        """Rows of prefills from row ``base`` on, with the slots ``first .. end - 1`` of each."""
        starts = [0]
        for first, end in spans:
            starts.append(starts[-1] + end - first)
        first = self.ints([first for first, _ in spans])
        return Segments(self.ints(starts), base, first, torch.zeros_like(first))

    def aux(self, hidden_size: int, dtype: torch.dtype) -> AuxCache:
        """An Aux Cache with the prompt state in the same pages, all of it poisoned but for the
        places: each position has one, out of order. The same at every call."""
        room = [n + 7 * i for i, n in enumerate(self.prompts)]
        slots = -(-max(room) // self.positions_per_slot) + max(self.prompts)
        per_word = 4 // dtype.itemsize
        with self._the_same_again():
            pages, size = self.pages(hidden_size, slots)
            places = [torch.randperm(n, generator=self.random) for n in self.prompts]
        words = torch.full((size // per_word + 1,), POISON, dtype=torch.int32, device=self.device)
        sizes = ("slot_size", "page_stride", "block_stride")
        assert all(getattr(pages, name) % per_word == 0 for name in sizes)
        in_words = replace(pages, **{name: getattr(pages, name) // per_word for name in sizes})
        assert in_words.slot_size >= PLANES * self.positions_per_slot
        state = PromptState.of_buffer(words, in_words)
        for i, place in enumerate(places):
            at = state.at(i, torch.arange(len(place), device=self.device))
            state.place[at] = place.int().to(self.device)
        return AuxCache(words.view(dtype), self.ints(self.prompts), self.ints(room), pages, state)


def make_world(
    seed: int,
    stage: int,
    *,
    strict: bool = False,
    decoded=(3, 1, 9, 40),
    quota: int = 4,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> World:
    """Four requests, in stage ``stage`` of three."""
    prompts = [37, 100, 261, 5] if seed % 2 == 0 else [300, 16, 64, 129]
    if seed == LONG:
        prompts = [1500, 700, 2100, 40]
    return World(
        prompts=prompts,
        decoded=list(decoded),
        stage=stage,
        num_stages=3,
        block_size=16,
        kv_heads=2,
        group=3 if seed % 2 else 4,
        head_dim=64 if seed % 2 else 48,
        quota=quota,
        strict=strict,
        seed=seed,
        device=device,
        dtype=dtype,
    )


def kept_share(world: World, share: float) -> list[int]:
    return [max(1, int(p * share)) for p in world.prompts]
