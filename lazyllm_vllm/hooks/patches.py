"""The places where vLLM has no hook for what a plugin needs. Each says why, and what would end it;
installing fails if vLLM changed under it.
"""

import functools
import inspect
from typing import Any
from weakref import WeakKeyDictionary

from lazyllm_vllm.hooks.versions import SUPPORTED
from lazyllm_vllm.plan.config import ConfigError, parse_config

_MARK = "_wrapped_by_lazyllm"


def install() -> None:
    """Wrap vLLM's functions, once a process.

    Raises:
        RuntimeError: a function is gone or takes other arguments than it did.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1 import metrics
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor

    _wrap(EngineArgs, "add_cli_args", ["parser"], _add_cli_args)
    _wrap(EngineArgs, "from_cli_args", ["cls", "args"], _from_cli_args)
    _wrap(EngineArgs, "create_engine_config", ["self", "usage_context", "headless"], _create_config)
    parameters = [
        "self",
        "request_id",
        "prompt",
        "params",
        "supported_tasks",
        "arrival_time",
        "lora_request",
        "tokenization_kwargs",
        "trace_headers",
        "priority",
        "data_parallel_rank",
        "resumable",
        "session_id",
        "kv_hints",
    ]
    _wrap(InputProcessor, "process_inputs", parameters, _process_inputs)
    parameters = ["self", "request", "max_cache_hit_length"]  # the last from 0.33 on
    _wrap(KVCacheManager, "get_computed_blocks", parameters, _get_computed_blocks, newer=1)
    _wrap(KVCacheManager, "free", ["self", "request"], _free)
    _wrap(Scheduler, "schedule", ["self", "throttle_prefills"], _schedule)
    parameters = ["self", "request", "num_computed_tokens", "num_new_tokens"]
    _wrap(Scheduler, "_reserve_prefill_lookahead", parameters, _reserve_prefill_lookahead)
    parameters = ["self", "request", "timestamp", "drop_stale_output"]
    _wrap(Scheduler, "_preempt_request", parameters, _preempt_request)
    parameters = ["self", "vllm_config", "labelnames", "per_engine_labelvalues"]
    _wrap(metrics.KVConnectorProm, "__init__", parameters, _init_prometheus)
    parameters = ["self", "transfer_stats_data"]
    _wrap(metrics.KVConnectorLogging, "observe", parameters, _log_connector)


def is_installed() -> bool:
    """Whether this process has the wraps."""
    from vllm.engine.arg_utils import EngineArgs

    return hasattr(EngineArgs.create_engine_config, _MARK)


def install_in_worker() -> None:
    """The same for what only the process of the model needs."""
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.worker_base import WorkerBase

    parameters = [
        "vllm_config",
        "device",
        "cudagraph_mode",
        "decode_query_len",
        "lora_capture_cases",
        "varlen_decode",
        "ubatch_runner",
    ]
    _wrap(model_runner, "ModelCudaGraphManager", parameters, _cuda_graph_manager)
    parameters = ["self", "scheduler_output", "dummy_run"]
    _wrap(model_runner.GPUModelRunner, "gather_batch_req_state", parameters, _gather_batch)
    parameters = ["self", "kv_cache_config", "is_profiling", "kv_cache_allocation_context"]
    _wrap(model_runner.GPUModelRunner, "initialize_kv_cache", parameters, _add_stats_connector)
    for name, method in _WORKER_METHODS.items():
        setattr(WorkerBase, name, method)


def _wrap(owner, name, parameters, wrapper, newer: int = 0) -> None:
    """Make ``wrapper(original, *arguments)`` stand for ``owner.name``, of the same kind.

    Args:
        newer: how many of the last parameters an older release that works does not have.
    """
    raw = inspect.getattr_static(owner, name, None)
    function = getattr(raw, "__func__", raw)
    allowed = (parameters, parameters[: len(parameters) - newer])
    if function is None or list(inspect.signature(function).parameters) not in allowed:
        raise RuntimeError(
            f"lazyllm: vLLM's {owner.__name__}.{name} is not the one that LazyLLM wraps; install a "
            f"release of vLLM {' or '.join(SUPPORTED)}"
        )
    if hasattr(function, _MARK):
        return

    @functools.wraps(function)
    def replacement(*args, **kwargs):
        return wrapper(function, *args, **kwargs)

    setattr(replacement, _MARK, True)
    kind = type(raw) if isinstance(raw, (staticmethod, classmethod)) else lambda f: f
    setattr(owner, name, kind(replacement))


# The flag --lazyllm-config. Ends when vLLM lets a plugin add flags of its own.


def _add_cli_args(original, parser):
    parser = original(parser)
    group = parser.add_argument_group(
        title="LazyLLM",
        description="Prune prompt tokens layer by layer (arXiv 2407.14057).",
    )
    group.add_argument(
        "--lazyllm-config",
        type=_parse_flag,
        default=None,
        metavar="JSON|FILE|PRESET",
        help="LazyLLM's configuration: JSON, the path of a JSON or YAML file, or one of the "
        "presets conservative, balanced and aggressive. Left out: LazyLLM is off.",
    )
    return parser


def _parse_flag(text: str) -> dict[str, Any]:
    import argparse

    try:
        return parse_config(text).model_dump(mode="json", exclude_unset=True)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _from_cli_args(original, cls, args):
    """With ``--api-server-count`` vLLM hands ``args`` on to front ends, which read them before they
    load plugins. So the flag ends where they look for it too."""
    config = getattr(args, "lazyllm_config", None)
    if config is not None:
        args.additional_config = {**(args.additional_config or {}), "lazyllm": config}
    return original(cls, args)


# The one place that every way of starting an engine passes before its configuration is fixed. Ends
# when vLLM lets a plugin refuse flags and change the defaults of others.


def _create_config(original, self, *args, **kwargs):
    from lazyllm_vllm.hooks.adapt import adapt_engine_args
    from lazyllm_vllm.hooks.engine_config import KEY, SWITCHED_OFF, given_config, schedule_of
    from lazyllm_vllm.hooks.refusals import check_engine_args, check_engine_config

    config = given_config(self.additional_config)
    if config is None:
        return original(self, *args, **kwargs)
    check_engine_args(self)
    switched_off = adapt_engine_args(self)
    self.additional_config = {
        **self.additional_config,
        KEY: config.model_dump(mode="json", exclude_unset=True),
        SWITCHED_OFF: switched_off,
    }
    vllm_config = original(self, *args, **kwargs)
    check_engine_config(vllm_config, schedule_of(vllm_config))
    return vllm_config


# Requests that cannot be served. Ends when vLLM asks plugins whether a request is allowed, its
# prompt known: custom logits processors are asked for the parameters alone, and cost time in every
# step.

_CHECKS: WeakKeyDictionary = WeakKeyDictionary()


def _process_inputs(original, self, *args, **kwargs):
    request = original(self, *args, **kwargs)
    if self not in _CHECKS:
        from lazyllm_vllm.hooks.engine_config import lazyllm_config
        from lazyllm_vllm.hooks.requests import RequestChecks

        is_on = lazyllm_config(self.vllm_config) is not None
        _CHECKS[self] = RequestChecks(self.vllm_config) if is_on else None
    if (checks := _CHECKS[self]) is not None:
        checks.check(request)
    return request


# Blocks by what a request sets for itself. Ends when a group's manager is told of the request that
# it allocates for, not of its name alone.


def _get_computed_blocks(original, self, request, *args, **kwargs):
    from lazyllm_vllm.hooks.kv_cache.reuse import find_blocks

    return find_blocks(functools.partial(original, self, request, *args, **kwargs), self, request)


# What a pruned request leaves for others. Ends when a group's manager is told of the request whose
# blocks it frees.


def _free(original, self, request):
    from lazyllm_vllm.hooks.kv_cache.reuse import free

    free(functools.partial(original, self, request), self, request)


# What workers must know of a request that goes on from there; and steps for the later stages of a
# prompt. Ends when a group's manager can send them a word with a request, and have blocks copied
# that stay the last to be reused; and when a request may ask for steps that bring no token.


def _schedule(original, self, *args, **kwargs):
    from lazyllm_vllm.hooks.kv_cache.reuse import hand_over
    from lazyllm_vllm.hooks.kv_cache.spread import spread, tokens_set_aside

    with tokens_set_aside(self):
        output = original(self, *args, **kwargs)
    hand_over(self.kv_cache_manager, output.scheduled_new_reqs)
    spread(self, output)
    return output


# With priorities vLLM may withdraw a chunk in the step that scheduled it, and its blocks stay in
# the prefix cache though nobody computes them: the request finds them when it begins again, and
# answers wrongly. Ends with vLLM's pull request 43569.


def _preempt_request(original, self, request, *args, **kwargs):
    from lazyllm_vllm.hooks.engine_config import lazyllm_config

    if lazyllm_config(self.vllm_config) is None:
        return original(self, request, *args, **kwargs)
    from lazyllm_vllm.hooks.kv_cache.reuse import promised_blocks

    manager = self.kv_cache_manager
    promised = promised_blocks(manager, request)
    result = original(self, request, *args, **kwargs)
    manager.evict_blocks(promised)
    return result


# The last token of a request that goes on runs as a decode: it is the one that tells what is to be
# revived. Where that needs a step of its own, the chunk before must end there. Ends when a
# scheduler's plugin may say where a chunk ends.


def _reserve_prefill_lookahead(original, self, request, num_computed_tokens, num_new_tokens):
    from lazyllm_vllm.hooks.kv_cache.reuse import chunk_size

    num_new_tokens = original(self, request, num_computed_tokens, num_new_tokens)
    return chunk_size(self, request, num_computed_tokens, num_new_tokens)


# Two CUDA graphs a batch size; vLLM captures one and picks by size alone. Ends when a model state
# can name the cases to capture and choose among them, as LoRA does.


def _cuda_graph_manager(original, vllm_config, *args, **kwargs):
    from lazyllm_vllm.hooks.engine_config import lazyllm_config

    if lazyllm_config(vllm_config) is None:
        return original(vllm_config, *args, **kwargs)
    from lazyllm_vllm.hooks.cuda_graphs import LazyCudaGraphManager

    return LazyCudaGraphManager(vllm_config, *args, **kwargs)


# A chunk of one token is no decode: its prompt's later stages are yet to run. vLLM sorts it among
# the decodes and gives the batch a decode's graph; of a request that goes on from a snapshot it is
# one. Ends when a model state is asked which requests of a batch decode.


def _gather_batch(original, self, scheduler_output, dummy_run):
    batch, uniform_tokens = original(self, scheduler_output, dummy_run)
    if batch is None or not hasattr(self.model_state, "note_batch"):
        return batch, uniform_tokens
    batch = self.model_state.note_batch(batch, scheduler_output)
    if not (batch.has_prefill and batch.is_prefilling_np.any()):
        return batch, uniform_tokens
    return _decodes_first(batch), None


def _decodes_first(batch):
    import numpy as np

    prefills = batch.is_prefilling_np
    if not batch.prefill_runs_as_decode_np.any() and (prefills[:-1] <= prefills[1:]).all():
        return batch
    order = np.argsort(prefills, kind="stable")
    fields = batch._asdict()
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            fields[name] = value[order]
    fields["req_ids"] = [batch.req_ids[i] for i in order]
    fields["prefill_runs_as_decode_np"] = np.zeros(len(order), bool)
    fields["decode_graph_eligible"] = False
    return type(batch)(**fields)


# Counters at /metrics. vLLM has a road from the worker to the front end for the statistics of a KV
# connector alone; ours take it, since no connector works with LazyLLM. Ends when a model state can
# give statistics of its own.


def _add_stats_connector(original, self, *args, **kwargs):
    original(self, *args, **kwargs)
    from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR

    from lazyllm_vllm.hooks.model_state import LazyModelState
    from lazyllm_vllm.hooks.stats_connector import StatsConnector

    state = self.model_state
    if isinstance(state, LazyModelState) and state.group.is_first_rank:
        if self.kv_connector is not NO_OP_KV_CONNECTOR:
            raise RuntimeError("lazyllm: vLLM has a KV connector, which LazyLLM refuses")
        self.kv_connector = StatsConnector(state.stats)


def _init_prometheus(original, self, vllm_config, labelnames, per_engine_labelvalues):
    original(self, vllm_config, labelnames, per_engine_labelvalues)
    from lazyllm_vllm.hooks.engine_config import lazyllm_config, schedule_of

    if lazyllm_config(vllm_config) is None:
        return
    from prometheus_client import Counter, Gauge

    from lazyllm_vllm.observe.metrics import FrontEndMetrics

    self.prom_metrics = FrontEndMetrics(
        schedule_of(vllm_config).num_stages,
        {Counter: self._counter_cls, Gauge: self._gauge_cls},
        labelnames,
        per_engine_labelvalues,
    )


def _log_connector(original, self, transfer_stats_data):
    """vLLM's log has a line for a connector's statistics; ours have their own."""
    from lazyllm_vllm.observe.metrics import KEY

    if KEY not in transfer_stats_data:
        original(self, transfer_stats_data)


# Methods for ``collective_rpc``. vLLM adds those of one class, --worker-extension-cls, and that is
# the user's to name. Ends when it takes several.


def _stats(self) -> dict[str, Any]:
    return self.model_runner.model_state.report_stats()


def _trace(self, request: str | None = None) -> dict[str, Any]:
    return self.model_runner.model_state.report_trace(request)


_WORKER_METHODS = {"lazyllm_stats": _stats, "lazyllm_trace": _trace}
