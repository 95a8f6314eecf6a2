"""The arithmetic of stages: which layers, how many tokens, how many slots.

Everything here is a pure function of the configuration and of lengths, so the scheduler's process
and the worker's agree without a word between them.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from vllm.config import VllmConfig

from lazyllm_vllm.config import LazyLLMConfig, parse_config


@cache
def _exact(share: float) -> Fraction:
    return Fraction(str(share))


def share_of(share: float, count: int) -> int:
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
    def build(cls, config: LazyLLMConfig, num_layers: int) -> "Schedule":
        """Raises ConfigError when a boundary lies outside the model."""
        boundaries = config.boundaries(num_layers)
        return cls(
            starts=(0, *(b.layer for b in boundaries), num_layers),
            keeps=(1.0, *(b.keep for b in boundaries)),
            config=config,
        )

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> "Schedule":
        """That of an engine with LazyLLM on."""
        config = parse_config(vllm_config.additional_config["lazyllm"])
        layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        return cls.build(config, layers)

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
        """Whether dropped hidden states are kept at all."""
        return self.config.revive_budget > 0 and self.prunes

    def stage_layers(self, stage: int) -> range:
        return range(self.starts[stage], self.starts[stage + 1])

    def stage_of(self, layer: int) -> int:
        """The stage that decoder layer ``layer`` (0-based) belongs to."""
        return next(s for s in range(self.num_stages) if layer < self.starts[s + 1])

    def kept(self, num_prompt: int) -> tuple[int, ...]:
        """k_s: prompt tokens that each stage keeps of ``num_prompt``; all of them in stage 0, and
        everywhere for a prompt under ``min_prompt_tokens``."""
        if num_prompt < self.config.min_prompt_tokens:
            return (num_prompt,) * self.num_stages
        always = min(num_prompt, self.config.first_tokens + self.config.last_tokens)
        return tuple(max(share_of(keep, num_prompt), always) for keep in self.keeps)

    def is_pruned(self, num_prompt: int) -> bool:
        """Whether any stage drops a token of a prompt of this length."""
        return self.kept(num_prompt)[-1] < num_prompt

    def prompt_room(self, stage: int, num_prompt: int) -> int:
        """Most prompt tokens that may ever have keys in the stage: the kept ones, and a reserve
        for revived ones (none without an Aux Cache)."""
        kept = self.kept(num_prompt)[stage]
        reserve = self.config.revive_reserve if self.has_aux else 0
        return kept + share_of(reserve, num_prompt - kept)

    def slots(self, stage: int, num_prompt: int, num_total: int) -> int:
        """Slots that a request of ``num_total`` tokens so far, the first ``num_prompt`` of which
        were prefilled together, needs in the stage."""
        return self.prompt_room(stage, num_prompt) + num_total - num_prompt

    def aux_slots(self, num_prompt: int) -> int:
        """Slots that the request needs in the Aux Cache: one a prompt token if any can be
        dropped."""
        return num_prompt if self.has_aux and self.is_pruned(num_prompt) else 0

    def revive_share(self, num_decodes: int) -> int:
        """Most tokens that each of ``num_decodes`` requests may revive at a boundary of a step."""
        config = self.config
        return min(config.revive_budget // num_decodes, config.revive_per_request)

    def largest_share(self, num_decodes: int) -> int:
        """The same, whatever part of ``num_decodes`` is padding.

        A CUDA graph is captured for this many. vLLM's graphs are at most twice as large as the
        batches they serve, so that the real share fits unless the user chose other sizes.
        """
        return self.revive_share(num_decodes // 2 + 1)

    def revive_rows(self, num_decodes: int) -> int:
        """Rows that hold every revived token of a step with at most ``num_decodes`` decodes."""
        config = self.config
        return min(config.revive_budget, num_decodes * config.revive_per_request)

    def share_computed(self, prompt_keys: list[int] | tuple[int, ...], num_prompt: int) -> float:
        """Share of (prompt token, layer) pairs computed, given the number of prompt tokens with
        keys in each stage; the paper's "% of prompt tokens computed" (section 5)."""
        pairs = sum(n * len(self.stage_layers(s)) for s, n in enumerate(prompt_keys))
        return pairs / (num_prompt * self.num_layers)
