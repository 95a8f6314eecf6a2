"""What each step of an engine runs: which requests' tokens, and how much work."""


class Steps:
    """Of one engine, from now on.

    Attributes:
        done: of each step that had tokens ``tokens``, scheduled by request, and ``layer_rows``.
    """

    def __init__(self, scheduler, state) -> None:
        self.done, self._scheduled, self._state = [], [], state
        self._schedule, self._begin = scheduler.schedule, state.boundary.begin
        scheduler.schedule, state.boundary.begin = self._note_tokens, self._note_work

    def _note_tokens(self, *args, **kwargs):
        output = self._schedule(*args, **kwargs)
        if output.num_scheduled_tokens:
            self._scheduled.append(dict(output.num_scheduled_tokens))
        return output

    def _note_work(self, step) -> None:
        """One step may be scheduled before the one before it runs."""
        sizes, plan = self._state.schedule.stage_sizes, step.plan
        rows = sum(size * step.num_rows(stage) for stage, size in enumerate(sizes))
        rows += sum(
            size * part.num_rows for size, parts in zip(sizes, plan.parts) for part in parts
        )
        rows += sum(part.num_rows * sum(sizes[1:]) for part in plan.catch_up)
        self.done.append({"tokens": self._scheduled.pop(0), "layer_rows": rows})
        return self._begin(step)

    def take(self) -> list[dict]:
        """Those since the last call."""
        done, self.done = self.done, []
        return done
