"""A request that waits in vain is named in the log; one that waits for others is not."""

import pytest
from harness.blocks import admit, manager_of, needs_of, request_of

from lazyllm_vllm.hooks.kv_cache import watchdog
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.schedule import Schedule

CONFIG = LazyLLMConfig(prune=({"layer": 1, "keep": 0.5},), min_prompt_tokens=50)


@pytest.fixture
def clock(monkeypatch):
    """Its ``now``, which is the test's to set, and the ``lines`` that were logged."""

    class Clock:
        now, lines = 1000.0, []

    monkeypatch.setattr(watchdog.time, "monotonic", lambda: Clock.now)
    log = lambda text, *values: Clock.lines.append(text % values)  # noqa: E731
    monkeypatch.setattr(watchdog.logger, "warning", log)
    Clock.lines = []
    return Clock


@pytest.fixture
def manager():
    """Room for a pruned prompt of 100 tokens."""
    needs = needs_of(Schedule.build(CONFIG, 4))
    return manager_of(needs, 100, needs.total(100, 100) + 1)


def wait(manager, clock, request, seconds: int) -> bool:
    """As the scheduler asks, twice a second; whether it was taken."""
    for _ in range(2 * seconds):
        if admit(manager, request):
            return True
        clock.now += 0.5
    return False


def test_who_waits_in_vain_is_named_once_a_minute(manager, clock):
    request = request_of("longest", 100)
    request.sampling_params.extra_args = {"lazyllm": "off"}  # which its check would have refused
    assert not wait(manager, clock, request, seconds=9) and clock.lines == []
    assert not wait(manager, clock, request, seconds=50)
    (line,) = clock.lines
    free = manager.block_pool.num_gpu_blocks - 1
    assert "longest" in line and f"all {free} blocks" in line and "keep [100, 100]" in line
    wait(manager, clock, request, seconds=30)
    assert len(clock.lines) == 2


def test_who_waits_for_others_is_not(manager, clock):
    first, second = request_of("first", 90), request_of("second", 90)
    assert admit(manager, first)
    assert not wait(manager, clock, second, seconds=100)
    manager.free(first)
    assert wait(manager, clock, second, seconds=1)
    manager.free(second)
    second.num_preemptions += 1  # it grew too long, alone
    clock.now += 100
    assert wait(manager, clock, second, seconds=1)
    assert clock.lines == []
