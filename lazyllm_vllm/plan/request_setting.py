"""What one request sets for itself, in vLLM's ``extra_args`` (``vllm_xargs`` of the OpenAI API)."""

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

OFF, EXACT, DEEP = "off", "exact", "deep"
REUSES = (OFF, EXACT, DEEP)  # each more than the one before
SCHEDULE, KEEP, REVIVE, REUSE = "lazyllm", "lazyllm_keep", "lazyllm_revive", "lazyllm_reuse"
FIELDS = (SCHEDULE, KEEP, REVIVE, REUSE)
_SWITCH = {"on": True, "off": False, True: True, False: False}


class SettingError(ValueError):
    """A request's setting that cannot be used; ``field`` names it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"lazyllm: {field}: {problem}")
        self.field = field


@dataclass(frozen=True)
class RequestSetting:
    """Attributes:
    schedule: a name out of the engine's schedules, or ``off``: keep every token; None: the
        engine's own.
    keep: what every share is multiplied by, 1 or more.
    revive: whether dropped tokens may come back.
    reuse: what it takes of earlier requests, as the configuration's ``reuse``; None: as that says.
    """

    schedule: str | None = None
    keep: float = 1.0
    revive: bool = True
    reuse: str | None = None

    @classmethod
    def of(
        cls, extra_args: dict[str, Any] | None, names: Collection[str], most_reuse: str
    ) -> "RequestSetting":
        """A request's.

        Args:
            names: of the engine's schedules.
            most_reuse: the engine's own.

        Raises:
            SettingError: a field that there is not, or a value that is not allowed.
        """
        mine = {k: v for k, v in (extra_args or {}).items() if str(k).startswith("lazyllm")}
        if not mine:
            return DEFAULT
        for field in mine.keys() - {*FIELDS}:
            near = difflib.get_close_matches(field, FIELDS, 1, 0.0)[0]
            raise SettingError(field, f"unknown field; did you mean {near}?")
        schedule, keep, revive, reuse = (mine.get(field) for field in FIELDS)
        if schedule is not None and schedule not in (OFF, *names):
            raise SettingError(SCHEDULE, f"{schedule!r} is none of {', '.join((OFF, *names))}")
        if keep is not None:
            is_number = isinstance(keep, (int, float)) and not isinstance(keep, bool)
            if not is_number or not 1 <= keep < float("inf"):
                raise SettingError(KEEP, f"must be a number of 1 or more, got {keep!r}")
        if revive is not None and (isinstance(revive, list) or revive not in _SWITCH):
            raise SettingError(REVIVE, f"must be on or off, got {revive!r}")
        allowed = REUSES[: REUSES.index(most_reuse) + 1]
        if reuse is not None and reuse not in allowed:
            raise SettingError(
                REUSE,
                f"{reuse!r} is none of {', '.join(allowed)}, what a request may choose where the "
                f"server's own reuse is {most_reuse}",
            )
        keep = 1.0 if keep is None else float(keep)
        return cls(schedule, keep, revive is None or _SWITCH[revive], reuse)


DEFAULT = RequestSetting()
