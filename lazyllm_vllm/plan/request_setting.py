"""What one request sets for itself, in vLLM's ``extra_args`` (``vllm_xargs`` of the OpenAI API)."""

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

OFF = "off"
SCHEDULE, KEEP, REVIVE = "lazyllm", "lazyllm_keep", "lazyllm_revive"
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
    """

    schedule: str | None = None
    keep: float = 1.0
    revive: bool = True

    @classmethod
    def of(cls, extra_args: dict[str, Any] | None, names: Collection[str]) -> "RequestSetting":
        """A request's.

        Args:
            names: of the engine's schedules.

        Raises:
            SettingError: a field that there is not, or a value that is not allowed.
        """
        mine = {k: v for k, v in (extra_args or {}).items() if str(k).startswith("lazyllm")}
        if not mine:
            return DEFAULT
        for field in mine.keys() - {SCHEDULE, KEEP, REVIVE}:
            near = difflib.get_close_matches(field, (SCHEDULE, KEEP, REVIVE), 1, 0.0)[0]
            raise SettingError(field, f"unknown field; did you mean {near}?")
        schedule, keep, revive = (mine.get(field) for field in (SCHEDULE, KEEP, REVIVE))
        if schedule is not None and schedule not in (OFF, *names):
            raise SettingError(SCHEDULE, f"{schedule!r} is none of {', '.join((OFF, *names))}")
        if keep is not None:
            is_number = isinstance(keep, (int, float)) and not isinstance(keep, bool)
            if not is_number or not 1 <= keep < float("inf"):
                raise SettingError(KEEP, f"must be a number of 1 or more, got {keep!r}")
        if revive is not None and (isinstance(revive, list) or revive not in _SWITCH):
            raise SettingError(REVIVE, f"must be on or off, got {revive!r}")
        return cls(
            schedule, 1.0 if keep is None else float(keep), revive is None or _SWITCH[revive]
        )


DEFAULT = RequestSetting()
