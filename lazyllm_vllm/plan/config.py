"""The user's configuration: one validated object, whichever way it was given."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from lazyllm_vllm.plan.presets import DEFAULT, PRESETS, preset_cuts
from lazyllm_vllm.plan.request_setting import OFF

Preset = Literal["conservative", "balanced", "aggressive"]


class ConfigError(ValueError):
    """A LazyLLM setting that cannot be used; the message names the field and the fix."""


class PruneAt(BaseModel):
    """One boundary: after ``layer`` decoder layers have run, keep this share of the prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int = Field(ge=1)
    keep: float = Field(gt=0, le=1)


def _pairs(value: Any) -> Any:
    """A mapping as pairs, which can be hashed, as vLLM hashes what describes its KV cache."""
    return tuple(value.items()) if isinstance(value, dict) else value


def _around(value: Any) -> Any:
    """An odd number of tokens as those before the middle one and those after it."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if value < 1 or value % 2 == 0:
        raise ValueError(f"one number must be odd, so that it has a middle; got {value}")
    return value // 2, value // 2


class LazyLLMConfig(BaseModel):
    """What to prune, when, and how decoding treats what was pruned.

    Attributes:
        prune: boundaries in order of depth; empty: nothing is pruned. Left out: ``preset`` fills
            it from the number of layers.
        preset: ``conservative``, ``balanced`` or ``aggressive``.
        schedules: others by name, each a preset or boundaries, that a request may choose. Given as
            a mapping. The stages are those of all boundaries together.
        min_prompt_tokens: prompts shorter than this many tokens are not pruned.
        first_tokens, last_tokens: so many tokens at either end of the prompt are always kept
            (``last_tokens`` at least 1: the last token is the one that scores the others).
        min_keep_tokens: every stage keeps so many tokens of a prompt, or all of a shorter one,
            however small its share.
        keep_mass: share of the sum of all scores that the tokens kept at a boundary must hold.
            ``keep`` is then the most, for which there is room, and ``min_keep_tokens`` the least.
            None: ``keep`` is what is kept.
        score: how a token is scored. ``peak``: the highest attention that any head pays to it, in
            prefill in any layer so far; queries before the last four count a quarter. ``mean``:
            the mean over the heads in the last layer before a boundary (the paper).
        score_window: how many tokens at the prompt's end score it in prefill, at most
            ``last_tokens``; 1 is the paper. In decoding the current token scores.
        score_pool: ``(before, after)``: a token's score becomes the highest of its own, of so many
            tokens' before it and of so many tokens' after it, so that what is looked at keeps its
            neighbours. An odd number n stands for n tokens with it in the middle; 1 is the paper.
        score_carry: in decoding, the share of its score after the last step that a token still has
            in this one. Every third layer behind the last boundary scores too then: these see what
            is being copied, and so what is asked for next. 0: this step's attention alone, before
            each boundary (the paper), and always with ``mean``.
        decode: ``resident`` attends to every token with keys in a stage, ``strict`` to this step's
            selection alone (the paper).
        revive_budget: rows that one engine step may spend, in each stage, on tokens revived from
            the Aux Cache, shared equally by the requests decoding. 0: no Aux Cache. In a mixture of
            experts 0 unless it is set.
        revive_per_request: most of them that one request may use.
        revive_per_turn: how many tokens a request that goes on from what an earlier one left
            (``reuse: deep``) brings back at each boundary as it begins, for its last
            ``score_window`` tokens, ``revive_budget`` at most. At most eight requests begin so in
            one step; their rows are beside those of the requests that decode.
        revive_min_score: least score with which a token is revived, its neighbours' counted as
            ``score_pool`` says: a share of one head's attention. With ``mean`` 0 unless it is set.
        revive_reserve: share of a stage's dropped tokens that the stage has room to take back.
        reuse: what a request takes of what earlier ones with the same beginning left in the prefix
            cache. ``off``: nothing, if its prompt is pruned. ``exact``: stage 0, with the answer
            that it would have had without. ``deep``: also what they kept behind stage 0, with
            which it goes on as if decoding had.
        allow_untested_model: run a model class that has the form of those that were tested, but
            was not tested itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prune: tuple[PruneAt, ...] | None = None
    preset: Preset | None = None
    schedules: Annotated[
        tuple[tuple[str, Preset | tuple[PruneAt, ...]], ...], BeforeValidator(_pairs)
    ] = ()
    min_prompt_tokens: int = Field(default=1024, ge=1)
    first_tokens: int = Field(default=4, ge=0)
    last_tokens: int = Field(default=16, ge=1)
    min_keep_tokens: int = Field(default=0, ge=0)
    keep_mass: float | None = Field(default=None, gt=0, lt=1)
    score: Literal["peak", "mean"] = "peak"
    score_window: int = Field(default=16, ge=1)
    score_pool: Annotated[
        tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], BeforeValidator(_around)
    ] = (16, 4)
    score_carry: float = Field(default=0.5, ge=0, lt=1)
    decode: Literal["resident", "strict"] = "resident"
    revive_budget: int = Field(default=64, ge=0)
    revive_per_request: int = Field(default=15, ge=1)
    revive_per_turn: int = Field(default=32, ge=1)
    revive_min_score: float = Field(default=0.15, ge=0, le=1)
    revive_reserve: float = Field(default=0.1, ge=0, le=1)
    reuse: Literal["off", "exact", "deep"] = "exact"
    allow_untested_model: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fit_window(cls, fields: Any) -> Any:
        """Who keeps fewer last tokens, and says nothing of the window, gets one that fits."""
        if isinstance(fields, dict) and "score_window" not in fields:
            last = fields.get("last_tokens")
            if isinstance(last, int) and 1 <= last < cls.model_fields["score_window"].default:
                return fields | {"score_window": last}
        return fields

    @model_validator(mode="before")
    @classmethod
    def _fit_mean(cls, fields: Any) -> Any:
        """What goes by one head's attention is off where the mean over heads scores."""
        if isinstance(fields, dict) and fields.get("score") == "mean":
            return {"score_carry": 0.0, "revive_min_score": 0.0} | fields
        return fields

    @model_validator(mode="after")
    def _check_carry(self) -> "LazyLLMConfig":
        if self.score == "mean" and self.score_carry:
            raise ValueError("score_carry: works with score peak alone; leave it out or set it 0")
        return self

    @model_validator(mode="after")
    def _check_window(self) -> "LazyLLMConfig":
        if self.score_window > self.last_tokens:
            raise ValueError(
                f"score_window: {self.score_window} is more than last_tokens ({self.last_tokens}), "
                "the tokens that every stage is sure to have; lower it or raise last_tokens"
            )
        return self

    @model_validator(mode="after")
    def _check_prune(self) -> "LazyLLMConfig":
        if self.prune is None:
            return self
        if self.preset is not None:
            raise ValueError("prune and preset both set the schedule; give one of them")
        _check_cuts("prune", self.prune)
        if self.keep_mass is not None and self.prune and self.prune[-1].keep == 1:
            raise ValueError(
                "prune: with keep_mass the last keep, the most that is kept, must be less than 1"
            )
        return self

    @model_validator(mode="after")
    def _check_schedules(self) -> "LazyLLMConfig":
        names = [name for name, _ in self.schedules]
        for name in names:
            if not name or name == OFF or name == self.own_name or names.count(name) > 1:
                raise ValueError(f"schedules: the name {name!r} is taken or empty; choose another")
        for name, cuts in self.schedules:
            if not isinstance(cuts, str):
                _check_cuts(f"schedules.{name}", cuts)
        return self

    @property
    def own_name(self) -> str | None:
        """The preset that is the engine's own schedule, and what requests call it; None: ``prune``
        is, which has no name."""
        return None if self.prune is not None else self.preset or DEFAULT

    def named(self, name: str) -> "LazyLLMConfig":
        """The same with one of ``schedules`` as its own."""
        cuts = dict(self.schedules)[name]
        own = {"preset": cuts, "prune": None} if isinstance(cuts, str) else {"prune": cuts}
        return self.model_copy(update={"preset": None, "schedules": ()} | own)

    def boundaries(
        self,
        num_layers: int,
        full_layers: tuple[int, ...] | None = None,
        parked_pages: int = 0,
    ) -> tuple[PruneAt, ...]:
        """The boundaries for a model of ``num_layers`` decoder layers.

        Args:
            full_layers: those that attend to all tokens, counted from 1; None: all do. Only they
                see which tokens matter, so that a boundary follows one.
            parked_pages: as in ``plan.blocks.BlockNeeds``; a preset's cuts go by it.

        Raises:
            ConfigError: a boundary lies outside the model, or after a layer with a window.
        """
        places = full_layers and tuple(n for n in full_layers if n < num_layers)
        if self.prune is None:
            cuts = preset_cuts(self.own_name, num_layers, places, parked_pages)
            return tuple(PruneAt(layer=layer, keep=keep) for layer, keep in cuts)
        for boundary in self.prune:
            if boundary.layer >= num_layers:
                raise ConfigError(
                    f"lazyllm: prune: layer {boundary.layer} is outside the model, which has "
                    f"{num_layers} layers; use 1 to {num_layers - 1}"
                )
            if places is not None and boundary.layer not in places:
                raise ConfigError(
                    f"lazyllm: prune: layer {boundary.layer} has a sliding window, and cannot tell "
                    f"which of all tokens matter; use {', '.join(map(str, places))}"
                )
        return self.prune


def _check_cuts(field: str, cuts: tuple[PruneAt, ...]) -> None:
    for before, after in zip(cuts, cuts[1:]):
        if after.layer <= before.layer:
            raise ValueError(f"{field}: layers must rise, got {after.layer} after {before.layer}")
        if after.keep > before.keep:
            raise ValueError(
                f"{field}: keep may not rise with depth, got {after.keep} after {before.keep}"
            )


def parse_config(value: "LazyLLMConfig | dict[str, Any] | str") -> LazyLLMConfig:
    """Build the configuration from an object, a dict, or the text of ``--lazyllm-config``.

    Args:
        value: a mapping of fields, JSON text, the path of a JSON or YAML file, or a preset's name.

    Raises:
        ConfigError: one line that names the field and what is wrong with it.
    """
    if isinstance(value, LazyLLMConfig):
        return value
    fields = _read(value) if isinstance(value, str) else value
    if not isinstance(fields, dict):
        raise ConfigError(f"lazyllm: expected a mapping of fields, got {type(fields).__name__}")
    try:
        return LazyLLMConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _read(text: str) -> Any:
    if text in PRESETS:
        return {"preset": text}
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"lazyllm: not valid JSON: {error}") from None
    path = Path(text)
    if not _is_file(path):
        raise ConfigError(
            f"lazyllm: {text[:200]!r} is neither JSON, a file, nor a preset ({', '.join(PRESETS)})"
        )
    try:
        return yaml.safe_load(path.read_text())  # JSON is YAML
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"lazyllm: {text} is not valid JSON or YAML: {problem}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for a file
        return False


def _one_line(error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = PruneAt if where.startswith(("prune.", "schedules.")) else LazyLLMConfig
            text = f"unknown field; known: {', '.join(known.model_fields)}"
        else:
            text = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{where}: {text}" if where else text)
    return "lazyllm: " + "; ".join(problems)
