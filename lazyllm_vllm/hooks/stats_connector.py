"""The worker's end of the road to ``/metrics``; see ``observe.metrics``."""

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.kv_connector import KVConnector

from lazyllm_vllm.observe.metrics import KEY
from lazyllm_vllm.observe.stats import RequestStats


@dataclass
class TravellingStats(KVConnectorStats):
    """``data``: ``{KEY: RequestStats.changes}``, as vLLM hands it on."""

    def is_empty(self) -> bool:
        return not self.data


class StatsConnector(KVConnector):
    """Moves no keys: of a connector it has the statistics alone, with which it sends ours."""

    def __init__(self, stats: RequestStats) -> None:
        self.stats = stats
        self._is_disabled = False

    def set_disabled(self, disabled: bool) -> None:
        """vLLM does while it makes steps up, whose output nobody reads."""
        self._is_disabled = disabled

    def post_forward(self, *args, **kwargs) -> KVConnectorOutput | None:
        return self._output(wait=False)

    def no_forward(self, scheduler_output) -> ModelRunnerOutput:
        """A step without tokens comes when the last request has left. Nobody waits for it, so it
        may wait for the device: the next step may be far away."""
        return ModelRunnerOutput.with_kv_conn_output_only(self._output(wait=True))

    def _output(self, wait: bool) -> KVConnectorOutput | None:
        changes = None if self._is_disabled else self.stats.changes(wait)
        return (
            KVConnectorOutput(kv_connector_stats=TravellingStats({KEY: changes}))
            if changes
            else None
        )
