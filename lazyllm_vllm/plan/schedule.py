"""Stages: which layers each has and which share of the prompt it keeps."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from itertools import accumulate

from lazyllm_vllm.plan.config import LazyLLMConfig, PruneAt
from lazyllm_vllm.plan.request_plan import LongTurn, RequestPlan
from lazyllm_vllm.plan.request_setting import DEEP, DEFAULT, OFF, RequestSetting

TURNS_A_STEP = 8  # that begin in one step, at most
_TURNS = 8  # for which every prompt has room, where turns go on from each other
_GROWS = 2  # times a prompt's length for which long turns after it find room
LONG_TURN_FROM, _LONG_TURN_TO = 512, 32768  # tokens of a turn that drops some of them


@cache
def _ratio(share: float) -> tuple[int, int]:
    return Fraction(str(share)).as_integer_ratio()


def ceil_share(share: float, count: int) -> int:
    """``ceil(share * count)`` in exact decimal arithmetic: 0.3 of 10 is 3, not 4."""
    part, whole = _ratio(share)
    return -(-part * count // whole)


@dataclass(frozen=True)
class Schedule:
    """A model's decoder layers cut into stages, each with its share of the prompt.

    Attributes:
        starts: first layer (0-based) of each stage, then the number of layers: S + 1 entries.
        keeps: share of the prompt kept by each stage, 1.0 for stage 0.
        others: the same of other schedules that a request may choose, by name.
    """

    starts: tuple[int, ...]
    keeps: tuple[float, ...]
    config: LazyLLMConfig
    others: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @classmethod
    def build(
        cls,
        config: LazyLLMConfig,
        num_layers: int,
        full_layers: tuple[int, ...] | None = None,
        parked_pages: int = 0,
    ) -> "Schedule":
        """See ``LazyLLMConfig.boundaries``, which raises ConfigError."""
        place = num_layers, full_layers, parked_pages
        own = config.boundaries(*place)
        named = [(name, config.named(name).boundaries(*place)) for name, _ in config.schedules]
        layers = sorted(
            {b.layer for boundaries in (own, *dict(named).values()) for b in boundaries}
        )

        def keeps(boundaries: tuple[PruneAt, ...]) -> tuple[float, ...]:
            """At each of all boundaries, what was kept last."""
            at = {b.layer: b.keep for b in boundaries}
            return tuple(accumulate(layers, lambda keep, layer: at.get(layer, keep), initial=1.0))

        return cls(
            starts=(0, *layers, num_layers),
            keeps=keeps(own),
            config=config,
            others=tuple((name, keeps(boundaries)) for name, boundaries in named),
        )

    @property
    def num_stages(self) -> int:
        return len(self.keeps)

    @property
    def num_layers(self) -> int:
        return self.starts[-1]

    @cached_property
    def stage_sizes(self) -> list[int]:
        """Layers in each stage."""
        return [len(self.stage_layers(s)) for s in range(self.num_stages)]

    @cached_property
    def prunes(self) -> bool:
        """Whether any stage may drop a token of any prompt."""
        return any(keeps[-1] < 1 for keeps in (self.keeps, *dict(self.others).values()))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the schedules that a request may choose."""
        own = self.config.own_name
        return (*((own,) if own else ()), *dict(self.others))

    def setting(self, extra_args: dict | None) -> RequestSetting:
        """What a request sets for itself; raises SettingError."""
        return RequestSetting.of(extra_args, self.names, self.config.reuse)

    def reuse(self, setting: RequestSetting) -> str:
        """What a request takes of earlier ones."""
        return setting.reuse or self.config.reuse

    def may_prune(self, num_prompt: int) -> bool:
        """Whether a request with so long a prompt may choose to have it pruned."""
        if num_prompt < self.config.min_prompt_tokens:
            return False
        settings = (RequestSetting(name) for name in (None, *dict(self.others)))
        return any(self.plan(num_prompt, setting).is_pruned for setting in settings)

    def _keeps(self, setting: RequestSetting) -> tuple[float, ...]:
        if setting.schedule == OFF:
            return (1.0,) * self.num_stages
        keeps = dict(self.others).get(setting.schedule, self.keeps)
        return tuple(min(keep * setting.keep, 1.0) for keep in keeps)

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

    def selects(self, plan: RequestPlan) -> bool:
        """Whether decoding chooses tokens anew for a request that is pruned: to attend to them
        alone, or to revive those for which it has room."""
        return self.is_strict or plan.capacity != plan.kept

    def stage_layers(self, stage: int) -> range:
        return range(self.starts[stage], self.starts[stage + 1])

    def scoring_behind(self, full_layers: tuple[int, ...] | None) -> tuple[int, ...]:
        """Layers (0-based) behind the last boundary that score in decoding, for the next step: of
        those that attend to all tokens every third, from the first on. Each costs a decode step a
        kernel.

        Args:
            full_layers: as in ``LazyLLMConfig.boundaries``.
        """
        behind = self.stage_layers(self.num_stages - 1)
        return tuple(n for n in behind if full_layers is None or n + 1 in full_layers)[::3]

    def stage_of(self, layer: int) -> int:
        """The stage that decoder layer ``layer`` (0-based) belongs to."""
        return next(s for s in range(self.num_stages) if layer < self.starts[s + 1])

    def plan(self, num_prompt: int, setting: RequestSetting = DEFAULT) -> RequestPlan:
        """What a prompt of ``num_prompt`` tokens keeps, and most that it may ever have.

        k_s, the tokens that stage s keeps (with ``keep_mass`` at most), is
        ``ceil(keep_s * num_prompt)``, but at least ``least_kept``; all of them for a prompt under
        ``min_prompt_tokens``.
        """
        config = self.config
        if num_prompt < config.min_prompt_tokens:
            kept = (num_prompt,) * self.num_stages
        else:
            kept = self._kept(num_prompt, setting)
        reserve = config.revive_reserve if self.has_aux and setting.revive else 0
        least = _TURNS * self.turn_quota if reserve and config.reuse == DEEP else 0

        def room(dropped: int) -> int:
            return max(ceil_share(reserve, dropped), min(least, dropped))

        capacity = tuple(k + room(num_prompt - k) for k in kept)
        state_room = self.state_room(num_prompt) if kept[-1] < num_prompt else 0
        return RequestPlan(num_prompt, kept, capacity, state_room)

    def _kept(self, count: int, setting: RequestSetting) -> tuple[int, ...]:
        """By stage, how many of so many tokens are kept where some are dropped."""
        least = min(count, self.least_kept)
        return tuple(max(ceil_share(keep, count), least) for keep in self._keeps(setting))

    def state_room(self, num_prompt: int) -> int:
        """Positions for whose state there is room with a prompt that is pruned."""
        return num_prompt * (_GROWS if self.config.reuse == DEEP else 1)

    def long_turn(
        self, plan: RequestPlan, num_tokens: int, num_prompt: int, setting: RequestSetting
    ) -> RequestPlan | None:
        """The plan of a prompt that goes on from another, and of whose own tokens each stage keeps
        its share. None: they are too few, or more than a step may run, all of them are kept, or
        there is no room for their state.

        Args:
            plan: of the prompt that was pruned.
            num_tokens: from which it goes on.
        """
        config, own, between = self.config, num_prompt - num_tokens, num_tokens - plan.num_prompt
        least = min(LONG_TURN_FROM, config.min_prompt_tokens)
        fits = least <= own <= _LONG_TURN_TO and num_prompt <= plan.state_room
        if self.is_strict or config.keep_mass is not None or not (fits and self.selects(plan)):
            return None
        mine = self._kept(own, setting)
        last, reserve = config.score_window, config.revive_reserve
        if not last < mine[-1] < own:
            return None
        added = [between + k for k in mine]
        rooms = [ceil_share(reserve, own - k) for k in mine]
        return RequestPlan(
            num_prompt=num_prompt,
            kept=tuple(map(operator.add, plan.kept, added)),
            capacity=tuple(map(sum, zip(plan.capacity, added, rooms))),
            state_room=plan.state_room,
            long_turn=LongTurn(plan.num_prompt, num_tokens, tuple(k - last for k in mine), last),
        )

    def has_room(self, plan: RequestPlan, num_turns: int) -> bool:
        """Whether a prompt after which so many turns went on from each other has room for all that
        one more may bring back. Where nothing is ever brought back it needs none."""
        rooms = [(most - k, plan.num_prompt - k) for most, k in zip(plan.capacity, plan.kept)]
        needed = (num_turns + 1) * self.turn_quota
        has_none = not any(room for room, _ in rooms)
        return has_none or all(min(needed, dropped) <= room for room, dropped in rooms)

    def goes_on_sooner(self, num_run: int, plan: RequestPlan) -> bool:
        """Whether a prompt of which ``num_run`` tokens have run in all stages takes fewer
        (token, layer) pairs if the others do so too than if it is pruned anew, as in ``plan``.
        Stage 0 runs the others alone either way."""
        behind = self.stage_sizes[1:]
        anew = sum(kept * layers for kept, layers in zip(plan.kept[1:], behind))
        return (plan.num_prompt - num_run) * sum(behind) < anew

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

    @property
    def turn_quota(self) -> int:
        """Most tokens that the last token of a turn may revive at a boundary."""
        return min(self.config.revive_budget, self.config.revive_per_turn)

    def revive_rows(self, num_decodes: int) -> int:
        """Rows that hold every revived token of a step with at most ``num_decodes`` decodes."""
        config = self.config
        return min(config.revive_budget, num_decodes * config.revive_per_request)

    def share_computed(self, prompt_keys: Sequence[int], num_prompt: int) -> float:
        """Share of (prompt token, layer) pairs computed, given the number of prompt tokens with
        keys in each stage; the paper's "% of prompt tokens computed" (section 5)."""
        return self.pairs_computed(prompt_keys) / (num_prompt * self.num_layers)

    def pairs_computed(self, prompt_keys: Sequence[int]) -> int:
        """Of (prompt token, layer), as ``share_computed``."""
        return sum(map(operator.mul, prompt_keys, self.stage_sizes))
