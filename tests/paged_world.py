"""A random engine state for kernel tests: requests of odd lengths in shuffled blocks, some of their
prompt tokens present in later stages, every output poisoned."""

from dataclasses import dataclass

import torch

from lazyllm_vllm.kernels.gather import AuxPages
from lazyllm_vllm.kernels.state import Rows, Selection
from lazyllm_vllm.kernels.top_k import BINS, MAX_SPLITS, NUM_COUNTS


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
    share: int
    strict: bool
    seed: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        n = len(self.prompts)
        self.width = -(-max(p + d for p, d in zip(self.prompts, self.decoded)) // self.block_size)
        self.width += 2
        self.num_blocks = 2 * n * self.width + 1
        order = torch.randperm(self.num_blocks - 1, generator=self.random) + 1
        tables = order[: 2 * n * self.width].view(2, n, self.width).int()
        self.position_table, self.block_table = (t.contiguous().to(self.device) for t in tables)
        slots = self.num_blocks * self.block_size
        self.level = torch.zeros(slots, dtype=torch.int8)
        self.selected = torch.randint(0, self.stage + 1, (slots,), generator=self.random).to(
            torch.int8
        )
        self.slot_position = torch.full((slots,), -7, dtype=torch.int32)
        self.token_score = torch.rand(slots, generator=self.random)
        self.present: list[torch.Tensor] = []
        for i in range(n):
            self._fill_request(i)

    def rand(self, *shape) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.device, self.dtype)

    def homes(self, i: int) -> torch.Tensor:
        p = torch.arange(self.prompts[i])
        table = self.position_table[i].cpu().long()
        return table[p // self.block_size] * self.block_size + p % self.block_size

    def _fill_request(self, i: int) -> None:
        """Give each prompt token a level of 1 .. stages and put those that reach ``stage`` in
        slots there, out of order, then the tokens decoded so far."""
        n = self.prompts[i]
        level = torch.randint(1, self.num_stages + 1, (n,), generator=self.random)
        level[-1] = self.num_stages
        self.level[self.homes(i)] = level.to(torch.int8)
        present = (level > self.stage).nonzero()[:, 0]
        present = present[torch.randperm(len(present), generator=self.random)]
        self.present.append(present)
        position = torch.cat([present, torch.arange(n, n + self.decoded[i])])
        table = self.block_table[i].cpu().long()
        j = torch.arange(len(position))
        physical = table[j // self.block_size] * self.block_size + j % self.block_size
        self.slot_position[physical] = position.int()

    def kv_cache(self) -> torch.Tensor:
        return self.rand(self.num_blocks, self.kv_heads, self.block_size, 2 * self.head_dim)

    def selection(self, kept: list[int], room: int) -> Selection:
        """Fresh copies, so that a kernel and its reference start alike."""
        n, stages = len(self.prompts), self.num_stages
        table = torch.zeros(n + 3, 1 + 3 * stages, dtype=torch.int32)
        index = torch.randperm(n + 3, generator=torch.Generator().manual_seed(self.seed))[:n]
        for i in range(n):
            row = table[index[i]]
            row[0] = self.prompts[i]
            row[1 : 1 + stages] = kept[i]
            row[1 + stages : 1 + 2 * stages] = len(self.present[i]) + room
            row[1 + 2 * stages :] = len(self.present[i])
        ints = {"dtype": torch.int32, "device": self.device}
        is_pruned = torch.tensor([int(k < p) for k, p in zip(kept, self.prompts)], **ints)
        return Selection(
            token_key=torch.full((len(self.level),), -99, **ints),
            token_score=self.token_score.clone().to(self.device),
            level=self.level.clone().to(self.device),
            selected=self.selected.clone().to(self.device),
            position_table=self.position_table,
            table=table.to(self.device),
            req_index=index.int().to(self.device),
            num_prompt=torch.tensor(self.prompts, **ints),
            is_pruned=is_pruned,
            active=is_pruned.repeat(stages, 1),
            limit=torch.full((stages, n), min(self.share, room), **ints),
            histogram=torch.zeros(n, 2 * BINS, **ints),
            found=torch.full((n, 4), -99, **ints),
            counts=torch.full((n, NUM_COUNTS, MAX_SPLITS), -99, **ints),
            block_size=self.block_size,
        )

    def rows(self, num_rows: int) -> Rows:
        ints = {"dtype": torch.int32, "device": self.device}
        n = len(self.prompts)
        return Rows(
            position=torch.zeros(num_rows, dtype=torch.int64, device=self.device),
            request=torch.full((num_rows,), -1, **ints),
            slot=torch.full((num_rows,), -99, **ints),
            key_len=torch.full((n,), -99, **ints),
            num_revived=torch.full((n,), -99, **ints),
        )

    def aux(self, hidden: int, pages: int, per_page: int) -> AuxPages:
        block = -(-pages * (per_page * hidden + 5) // 8) * 8
        width = -(-max(self.prompts) // (pages * per_page))
        table = torch.randperm(len(self.prompts) * width, generator=self.random)
        size = len(self.prompts) * width * block + 3
        return AuxPages(
            buffer=torch.full((size,), 9e9, dtype=self.dtype, device=self.device),
            block_table=table.view(len(self.prompts), width).int().to(self.device),
            offset=3, page_stride=per_page * hidden + 5, block_stride=block,
            pages=pages, per_page=per_page, hidden_size=hidden,
        )  # fmt: skip


def same(a, b) -> None:
    """Assert that two dataclasses of tensors hold equal values."""
    for name in a.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), name


def with_ties(world: World) -> World:
    """The same world with scores of few distinct values, zero among them."""
    world.token_score = (world.token_score * 4).floor() / 4
    return world
