"""Counters at ``/metrics``, beside vLLM's own and with its labels: one table.

A request counts when it leaves, finished, aborted or preempted. The worker of the first rank counts
(``stats``) and sends what grew since the step before, once; it reaches one front end, however many
there are, and they add up. The road is that of vLLM's KV connectors, whose statistics go from the
worker through the scheduler to the front end (``hooks.stats_connector``): no connector works with
LazyLLM, so that it is free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge

KEY = "lazyllm"  # in what travels, a dict
PREFIX = "vllm:lazyllm_"  # vLLM forgets and makes anew what begins with its own name


@dataclass(frozen=True)
class Metric:
    """Attributes:
    name: without prefix, and without the ``_total`` that Prometheus adds to a counter's.
    label: beside vLLM's ``model_name`` and ``engine``: ``stage`` or ``pruned``.
    is_gauge: whether it may fall.
    """

    name: str
    documentation: str
    label: str | None = None
    is_gauge: bool = False


METRICS = (
    Metric("requests", "Requests that left, by whether their prompt was pruned.", "pruned"),
    Metric("prompt_tokens", "Prompt tokens of requests that left."),
    Metric("kept_tokens", "Of these, the tokens that prefill took into each stage.", "stage"),
    Metric("revived_tokens", "Of these, the tokens that decoding revived in each stage.", "stage"),
    Metric("pairs", "Pairs of a prompt token and a decoder layer, of requests that left."),
    Metric("computed_pairs", "Of these, the pairs whose token got keys and values in the layer."),
    Metric("reuses", "Requests that went on from what an earlier one kept (deep reuse)."),
    Metric("reused_tokens", "Tokens of that earlier one, which did not run again."),
    Metric("selecting_steps", "Steps that chose tokens anew for a request that decodes."),
    Metric(
        "aux_cache_blocks",
        "Blocks of the KV cache that hold prompt states and the Aux Cache.",
        is_gauge=True,
    ),
)


def label_values(label: str | None, num_stages: int) -> list[tuple[str, ...]]:
    """Of a metric's own label, in the order in which its values travel."""
    match label:
        case None:
            return [()]
        case "pruned":
            return [("false",), ("true",)]
    return [(str(stage),) for stage in range(num_stages)]


class FrontEndMetrics:
    """In the front end; vLLM's ``KVConnectorProm`` calls ``observe``.

    Args:
        classes: what stands for ``prometheus_client``'s ``Counter`` and ``Gauge``.
        labels: names of vLLM's labels; engines: their values, by the engine's number.
    """

    def __init__(
        self,
        num_stages: int,
        classes: dict[type, type],
        labels: Sequence[str],
        engines: dict[int, list[Any]],
    ) -> None:
        self._metrics = {}
        for metric in METRICS:
            own = (metric.label,) if metric.label else ()
            kind, options = classes[Counter], {}
            if metric.is_gauge:
                kind, options = classes[Gauge], {"multiprocess_mode": "mostrecent"}
            of_all = kind(
                name=PREFIX + metric.name,
                documentation=metric.documentation,
                labelnames=[*labels, *own],
                **options,
            )
            values = label_values(metric.label, num_stages)
            self._metrics[metric.name] = (
                metric,
                {
                    engine: [of_all.labels(*of_engine, *value) for value in values]
                    for engine, of_engine in engines.items()
                },
            )

    def observe(self, data: dict[str, Any], engine: int = 0) -> None:
        """Count what an engine's ``stats.RequestStats.changes`` gave."""
        for name, values in data[KEY].items():
            metric, by_engine = self._metrics[name]
            for child, value in zip(by_engine[engine], values, strict=True):
                (child.set if metric.is_gauge else child.inc)(value)
