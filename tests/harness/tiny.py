"""A Llama of a few thousand weights, of which only config.json is needed."""

import json
from pathlib import Path

from benchmarks.serving.tiny import SIZES

LLAMA = SIZES | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
# For the speed benchmark, whose prompts have token ids up to 30,000.
TINY_SHAPE = LLAMA | {"num_hidden_layers": 4, "head_dim": 16, "vocab_size": 30000}


def tiny_model(folder: Path, **changes) -> Path:
    """A folder for an engine with ``load_format="dummy", skip_tokenizer_init=True``."""
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return folder
