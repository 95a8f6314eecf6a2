"""Metadata of the lazyllm-vllm distribution."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "lazyllm_vllm/__init__.py").read_text())[1]

setup(
    name="lazyllm-vllm",
    version=VERSION,
    description="LazyLLM dynamic token pruning for long prompts, as a vLLM plugin",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["lazyllm_vllm", "lazyllm_vllm.*"]),
        # A top-level package named "kernels" belongs to others.
        "lazyllm_vllm.kernels",
    ],
    package_dir={"lazyllm_vllm.kernels": "kernels"},
    install_requires=["vllm>=0.32,<0.33", "pydantic>=2", "pyyaml"],  # vllm brings torch and triton
    extras_require={
        "test": ["pytest", "hypothesis", "accelerate", "gguf", "httpx", "openai"],
        "bench": ["accelerate", "gguf", "matplotlib", "rich"],
    },
    entry_points={
        "vllm.general_plugins": ["lazyllm = lazyllm_vllm.plugin:register"],
        "vllm.platform_plugins": [
            "lazyllm_interpret = lazyllm_vllm.platform:interpret_triton_on_cpu"
        ],
    },
)
