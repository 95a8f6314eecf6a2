"""What a server counts."""

import time
from collections import defaultdict

import httpx
from prometheus_client.parser import text_string_to_metric_families

_OWN_LABELS = ("stage", "pruned", "finished_reason")
_SETTLE = 1.0  # seconds until the worker has told what it counted last
Metrics = dict[tuple[str, str | None], float]


def parse(text: str) -> Metrics:
    """``/metrics``, summed over engines: by name without ``vllm:`` and ``_total``, and by the label
    that tells a metric's values apart, if it has one of ours."""
    found: Metrics = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name.startswith("vllm:") and not one.name.endswith(("_created", "_bucket")):
                own = next((one.labels[name] for name in _OWN_LABELS if name in one.labels), None)
                found[one.name.removeprefix("vllm:").removesuffix("_total"), own] += one.value
    return dict(found)


def reuses(address: str) -> int:
    """Requests of a server that went on from others (``reuse: deep``), now that none runs."""
    time.sleep(_SETTLE)
    found = parse(httpx.get(f"{address}/metrics", timeout=30).text)
    return round(found.get(("lazyllm_reuses", None), 0.0))
