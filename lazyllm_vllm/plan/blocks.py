"""Blocks of vLLM's pool that a request needs, over all KV cache groups.

A stage's layers make one or more groups. Stage 0's have some pages more, as if they were layers:
there each token's hidden state is parked on its way to stage 1. What is private to a pruned prompt
makes one more group. Its blocks are cut into slots as large as a hidden state: first the prompt's
state, ``STATE_BYTES`` a position, then the Aux Cache, a slot for each token with keys in stage 1.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from lazyllm_vllm.plan.grouping import layers_per_group
from lazyllm_vllm.plan.request_plan import RequestPlan
from lazyllm_vllm.plan.schedule import Schedule

STATE_BYTES = 24  # six numbers of four bytes: score, rank, level, selected, scale, place


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class BlockNeeds:
    """Attributes:
    block_size: tokens a block of a stage.
    page_size: bytes of one layer's part of a block.
    vector_size: bytes of a hidden state in the Aux Cache.
    ranks: of tensor parallelism.
    """

    schedule: Schedule
    block_size: int
    page_size: int
    vector_size: int
    ranks: int = 1

    @cached_property
    def pages(self) -> int:
        """Pages a block: the layers of a group."""
        return layers_per_group(self.stage_pages)

    @property
    def parked_pages(self) -> int:
        """Pages of stage 0 that hold the hidden states of a block's tokens."""
        if not self.schedule.prunes:
            return 0
        return ceil_div(self.block_size * self.vector_size, self.page_size)

    @property
    def stage_pages(self) -> list[int]:
        """Pages of each stage, in all of its groups: one a layer, and the parked ones."""
        first, *others = self.schedule.stage_sizes
        return [first + self.parked_pages, *others]

    @property
    def slots_per_page(self) -> int:
        return self.page_size // self.vector_size

    @property
    def slots_per_block(self) -> int:
        """Hidden states in a block of the prompt's own group."""
        return self.pages * self.slots_per_page

    @property
    def positions_per_slot(self) -> int:
        """Positions whose state one slot holds."""
        return self.vector_size // STATE_BYTES

    def stage_blocks(self, plan: RequestPlan, stage: int, num_total: int) -> int:
        """In each group of the stage, for a request of ``num_total`` tokens so far."""
        return ceil_div(num_total - plan.slots_saved[stage], self.block_size)

    def full_blocks(self, plan: RequestPlan, stage: int, num_total: int) -> int:
        """Of these, how many are surely full once so many tokens have run: slots are filled one
        after the other, and revived tokens only add to those that are kept."""
        kept = plan.kept[stage]
        if self.schedule.config.keep_mass is not None:  # then it is the most
            kept = min(kept, self.schedule.least_kept)
        return (num_total - plan.num_prompt + kept) // self.block_size

    def prompt_blocks(self, plan: RequestPlan) -> int:
        """In the prompt's own group."""
        if not plan.is_pruned:
            return 0
        slots = ceil_div(plan.state_room, self.positions_per_slot) + plan.aux_slots
        return ceil_div(slots, self.slots_per_block)

    def most_prompt_blocks(self, longest: int) -> int:
        """The same whatever a request keeps of a prompt of up to ``longest`` tokens."""
        kept, room = (longest - 1,) * 3, self.schedule.state_room(longest)
        return self.prompt_blocks(RequestPlan(longest, kept, (longest,) * 3, room))

    def total(self, num_prompt: int, num_total: int) -> int:
        """In all groups together."""
        return self.total_of(self.schedule.plan(num_prompt), num_total)

    def total_of(self, plan: RequestPlan, num_total: int) -> int:
        """The same for a request with a plan of its own."""
        in_stages = sum(
            math.ceil(pages / self.pages) * self.stage_blocks(plan, stage, num_total)
            for stage, pages in enumerate(self.stage_pages)
        )
        return in_stages + self.prompt_blocks(plan)

    def most_pruned_tokens(self, num_blocks: int) -> int:
        """At most so many tokens have all pruned prompts together that are in so many blocks, if
        none goes on from another: each token takes its share of a slot in every group of the later
        stages, by whichever schedule its request chose."""
        schedule = self.schedule
        least = [min(keeps) for keeps in zip(schedule.keeps, *dict(schedule.others).values())]
        slots = sum(
            keep * math.ceil(pages / self.pages)
            for keep, pages in zip(least[1:], self.stage_pages[1:])
        )
        return math.ceil(num_blocks * self.block_size / slots)

    def neediest_prompt(self, longest: int) -> int:
        """The prompt length of up to ``longest`` that needs the most blocks to be prefilled.

        Need grows with the length among prompts that are too short to be pruned, and among longer
        ones; where pruning begins it falls.
        """
        unpruned = min(longest, self.schedule.config.min_prompt_tokens - 1)
        return max({max(unpruned, 1), longest}, key=lambda n: self.total(n, n))

    def longest_unpruned(self, num_blocks: int) -> int:
        """The longest prompt under ``min_prompt_tokens`` that fits in so many blocks."""
        fits, too_long = 0, self.schedule.config.min_prompt_tokens
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.total(middle, middle) <= num_blocks:
                fits = middle
            else:
                too_long = middle
        return fits
