"""Counts on their road from the worker to ``/metrics``, without an engine."""

import pickle

import pytest
import torch
from harness.tiny import tiny_model
from prometheus_client import REGISTRY

from vllm import EngineArgs
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from lazyllm_vllm.hooks.engine_config import schedule_of
from lazyllm_vllm.hooks.stats_connector import StatsConnector
from lazyllm_vllm.observe.metrics import KEY, METRICS, PREFIX
from lazyllm_vllm.observe.stats import RequestStats

LABELS = ["model_name", "engine"]
ENGINES = {0: ["tiny", "0"], 1: ["tiny", "1"]}


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    model = tiny_model(tmp_path_factory.mktemp("tiny"))

    def make(additional: dict):
        flags = {"max_model_len": 1024, "skip_tokenizer_init": True}
        return EngineArgs(str(model), additional_config=additional, **flags).create_engine_config()

    return make


@pytest.fixture
def config(make_config):
    return make_config(
        {"lazyllm": {"prune": [{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.2}]}}
    )


@pytest.fixture
def clean():
    unregister_vllm_metrics()
    yield
    unregister_vllm_metrics()


def _row(num_prompt: int, kept: list[int], revived: list[int]) -> torch.Tensor:
    """Of the request table, as ``RequestRow`` has it."""
    keys = [k + r for k, r in zip(kept, revived)]
    return torch.tensor([num_prompt, 0, *kept, *keys, *keys], dtype=torch.int32)


def _travel(output):
    """From a worker's output to what a front end is handed, the way vLLM hands it on."""
    output = pickle.loads(pickle.dumps(output.kv_connector_output))
    stats = SchedulerStats(kv_connector_stats=output.kv_connector_stats.to_dict())
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    return MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats.kv_connector_stats


def test_what_grew_is_sent_once(config):
    stats = RequestStats(schedule_of(config))
    assert stats.changes(wait=False) is None
    stats.record("a", _row(100, [100, 50, 20], [0, 3, 4]))
    stats.record("b", _row(10, [10, 10, 10], [0, 0, 0]))
    stats.selecting_steps, stats.aux_blocks = 7, 5
    assert stats.changes(wait=False) == {
        "requests": [1, 1],
        "prompt_tokens": [110],
        "kept_tokens": [110, 60, 30],
        "revived_tokens": [0, 3, 4],
        "pairs": [110 * 6],
        "computed_pairs": [2 * 110 + 2 * 63 + 2 * 34],
        "selecting_steps": [7],
        "aux_cache_blocks": [5],
    }
    assert stats.changes(wait=False) is None
    stats.record("c", _row(100, [100, 50, 20], [0, 5, 6]), reused=90)  # its prompt counted before
    assert stats.changes(wait=False) == {"requests": [0, 1], "reuses": [1], "reused_tokens": [90]}
    stats.selecting_steps, stats.aux_blocks = 9, 2
    assert stats.changes(wait=False) == {"selecting_steps": [2], "aux_cache_blocks": [2]}


def test_steps_alone_are_told_once_a_second(config, monkeypatch):
    """Every message costs; but none is lost once requests leave."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stats = RequestStats(schedule_of(config))

    def decode(steps: int) -> list:
        told = []
        for _ in range(steps):
            stats.selecting_steps += 1
            now[0] += 0.01
            told.append(stats.changes(wait=False))
        return [each for each in told if each is not None]

    assert sum(each["selecting_steps"][0] for each in decode(250)) >= 150
    assert len(decode(250)) in (2, 3), "2.5 seconds"
    stats.record("a", _row(100, [100, 50, 20], [0, 3, 4]))
    stats.changes(wait=False)
    assert decode(5) == []
    assert stats.changes(wait=True) == {"selecting_steps": [5]}, "the engine falls idle"
    assert stats.changes(wait=True) is None


def test_counts_reach_their_engine(config, clean):
    stats = RequestStats(schedule_of(config))
    connector = StatsConnector(stats)
    assert connector.post_forward(set()) is None
    stats.aux_blocks = 1
    connector.set_disabled(True)  # in steps that vLLM makes up
    assert connector.no_forward(None).kv_connector_output is None
    connector.set_disabled(False)
    assert connector.post_forward(set()).kv_connector_stats.data == {KEY: {"aux_cache_blocks": [1]}}
    prometheus = KVConnectorProm(config, LABELS, ENGINES)
    for tokens in (100, 200):
        stats.record("a", _row(tokens, [tokens, 50, 20], [0, 3, 4]))
        stats.aux_blocks = tokens
        data = _travel(connector.no_forward(None))
        prometheus.observe(data, 1)
        KVConnectorLogging(None).observe(data)  # which logs a connector's statistics, not ours

    def value(name: str, engine: str = "1", **labels) -> float | None:
        labels = dict(zip(LABELS, ("tiny", engine))) | labels
        return REGISTRY.get_sample_value(PREFIX + name, labels)

    assert value("prompt_tokens_total") == 300 and value("prompt_tokens_total", "0") == 0
    assert [value("kept_tokens_total", stage=s) for s in "012"] == [300, 100, 40]
    assert [value("revived_tokens_total", stage=s) for s in "012"] == [0, 6, 8]
    assert value("requests_total", pruned="true") == 2
    assert value("requests_total", pruned="false") == 0
    assert value("aux_cache_blocks") == 200
    assert set(data[KEY]) <= {metric.name for metric in METRICS}


def test_stock_vllm_has_none(make_config, clean):
    KVConnectorProm(make_config({}), LABELS, ENGINES)
    assert not [name for name in REGISTRY._names_to_collectors if name.startswith(PREFIX)]
