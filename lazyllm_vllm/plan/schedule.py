"""Stages: which layers each has and which share of the prompt it keeps."""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.request_plan import RequestPlan


@cache
def _exact(share: float) -> Fraction:
    return Fraction(str(share))


def ceil_share(share: float, count: int) -> int:
    """``ceil(share * count)`` in exact decimal arithmetic: 0.3 of 10 is 3, not 4."""
    return math.ceil(_exact(share) * count)


@dataclass(frozen=True)
class Schedule:
    """A model's decoder layers cut into stages, each with its share of the prompt.

    Attributes:
        starts: first layer (0-based) of each stage, then the number of layers: S + 1 entries.
        keeps: share of the prompt kept by each stage, 1.0 for stage 0.
    """

    starts: tuple[int, ...]
    keeps: tuple[float, ...]
    config: LazyLLMConfig

    @classmethod
    def build(
        cls,
        config: LazyLLMConfig,
        num_layers: int,
        full_layers: tuple[int, ...] | None = None,
        parked_pages: int = 0,
    ) -> "Schedule":
        """See ``LazyLLMConfig.boundaries``, which raises ConfigError."""
        boundaries = config.boundaries(num_layers, full_layers, parked_pages)
        return cls(
            starts=(0, *(b.layer for b in boundaries), num_layers),
            keeps=(1.0, *(b.keep for b in boundaries)),
            config=config,
        )

    @property
    def num_stages(self) -> int:
        return len(self.keeps)

    @property
    def num_layers(self) -> int:
        return self.starts[-1]

    @property
    def stage_sizes(self) -> list[int]:
        """Layers in each stage."""
        return [len(self.stage_layers(s)) for s in range(self.num_stages)]

    @property
    def prunes(self) -> bool:
        """Whether any stage may drop a token of any prompt."""
        return self.keeps[-1] < 1

    @property
    def has_aux(self) -> bool:
        """Whether tokens are ever revived."""
        return self.config.revive_budget > 0 and self.prunes

    @property
    def least_kept(self) -> int:
        """Tokens that every stage keeps, of a prompt that has them."""
        config = self.config
        return max(config.first_tokens + config.last_tokens, config.min_keep_tokens)

    @property
    def is_strict(self) -> bool:
        return self.config.decode == "strict"

    def stage_layers(self, stage: int) -> range:
        return range(self.starts[stage], self.starts[stage + 1])

    def stage_of(self, layer: int) -> int:
        """The stage that decoder layer ``layer`` (0-based) belongs to."""
        return next(s for s in range(self.num_stages) if layer < self.starts[s + 1])

    def plan(self, num_prompt: int) -> RequestPlan:
        """What a prompt of ``num_prompt`` tokens keeps, and most that it may ever have.

        k_s, the tokens that stage s keeps (with ``keep_mass`` at most), is
        ``ceil(keep_s * num_prompt)``, but at least ``least_kept``; all of them for a prompt under
        ``min_prompt_tokens``.
        """
        config = self.config
        if num_prompt < config.min_prompt_tokens:
            kept = (num_prompt,) * self.num_stages
        else:
            least = min(num_prompt, self.least_kept)
            kept = tuple(max(ceil_share(keep, num_prompt), least) for keep in self.keeps)
        reserve = config.revive_reserve if self.has_aux else 0
        capacity = tuple(k + ceil_share(reserve, num_prompt - k) for k in kept)
        return RequestPlan(num_prompt, kept, capacity)

    def revive_quota(self, num_decodes: int) -> int:
        """Most tokens that each of ``num_decodes`` requests may revive at a boundary of a step."""
        config = self.config
        return min(config.revive_budget // num_decodes, config.revive_per_request)

    def largest_quota(self, num_decodes: int) -> int:
        """The same, whatever part of ``num_decodes`` is padding.

        A CUDA graph is captured for this many. vLLM's graphs are at most twice as large as the
        batches they serve, so that the real quota fits unless the user chose other sizes.
        """
        return self.revive_quota(num_decodes // 2 + 1)

    def revive_rows(self, num_decodes: int) -> int:
        """Rows that hold every revived token of a step with at most ``num_decodes`` decodes."""
        config = self.config
        return min(config.revive_budget, num_decodes * config.revive_per_request)

    def share_computed(self, prompt_keys: list[int] | tuple[int, ...], num_prompt: int) -> float:
        """Share of (prompt token, layer) pairs computed, given the number of prompt tokens with
        keys in each stage; the paper's "% of prompt tokens computed" (section 5)."""
        pairs = sum(n * len(self.stage_layers(s)) for s, n in enumerate(prompt_keys))
        return pairs / (num_prompt * self.num_layers)
