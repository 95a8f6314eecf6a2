"""An engine on random weights of a shape."""

import json
import tempfile
from pathlib import Path


def start(shape: dict, config: dict | None, options: dict):
    """A ``vllm.LLM``, at vLLM's defaults but for ``options``.

    Args:
        shape: the model's config.json.
        config: LazyLLM's; None: stock vLLM.
        options: further arguments of ``LLM``.
    """
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            seed=0,
            additional_config={"lazyllm": config} if config else {},
            **options,
        )
    llm.collective_rpc(randomize)
    return llm


def randomize(worker) -> None:
    """Give a worker's model random weights. Every rank's part has the same numbers, which times do
    not depend on."""
    from benchmarks import weights

    weights.randomize(worker.model_runner.model_state.model)
