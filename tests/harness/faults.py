"""Faults in a server's processes: each begins with the first prompt of more than ``SHORT`` tokens.

Every process of vLLM loads its plugins; ``environment`` makes one of this module.
"""

import os
from pathlib import Path

SHORT = 50
SAID = "a fault of the test"


def environment(folder: Path, fault: str) -> dict[str, str]:
    """Of a server that has a fault: a function below, by its name.

    Args:
        folder: an empty one for the plugin's metadata.
    """
    info = folder / "faults-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faults\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nfaults = harness.faults:install\n"
    )
    path = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), "FAULT": fault}


def install() -> None:
    """The plugin."""
    globals()[os.environ["FAULT"]]()


def _fail(*args, **kwargs):
    raise RuntimeError(SAID)


def _out_of_memory(*args, **kwargs):
    import torch

    raise torch.OutOfMemoryError(SAID)


def block_manager() -> None:
    """LazyLLM's, in the scheduler's process."""
    from lazyllm_vllm.hooks.kv_cache.managers import StageManager

    required = StageManager.required_blocks

    def fails(self, plan, num_tokens):
        return _fail() if plan.num_prompt > SHORT else required(self, plan, num_tokens)

    StageManager.required_blocks = fails


def model_runner() -> None:
    """At a boundary of the first prompt that is pruned."""
    from lazyllm_vllm.runtime import boundary

    boundary.rank_tokens = _fail


def out_of_memory() -> None:
    """The same."""
    from lazyllm_vllm.runtime import boundary

    boundary.rank_tokens = _out_of_memory


def stock_block_manager() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    allocate = FullAttentionManager.allocate_new_blocks

    def fails(self, request_id, num_tokens, *args, **kwargs):
        if num_tokens > SHORT and not self.req_to_blocks.get(request_id):
            _fail()
        return allocate(self, request_id, num_tokens, *args, **kwargs)

    FullAttentionManager.allocate_new_blocks = fails


def stock_model_runner() -> None:
    _stock_runner(_fail)


def stock_out_of_memory() -> None:
    _stock_runner(_out_of_memory)


def _stock_runner(fail) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    execute = GPUModelRunner.execute_model

    def fails(self, scheduler_output, *args, **kwargs):
        if max(scheduler_output.num_scheduled_tokens.values(), default=0) > SHORT:
            fail()
        return execute(self, scheduler_output, *args, **kwargs)

    GPUModelRunner.execute_model = fails
