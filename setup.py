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
    # lazyllm_vllm/kernels is a link to the top-level folder: a top-level package of that name
    # belongs to others.
    packages=find_packages(include=["lazyllm_vllm", "lazyllm_vllm.*"]),
    package_data={"lazyllm_vllm": ["py.typed", "observe/explain/page/*"]},
    # vllm brings torch, triton and prometheus-client.
    install_requires=["vllm>=0.32,<0.34", "pydantic>=2", "pyyaml", "rich"],
    extras_require={
        "test": ["pytest", "hypothesis", "accelerate", "gguf", "httpx", "openai", "playwright"],
        "bench": ["accelerate", "gguf", "matplotlib"],
    },
    entry_points={
        "console_scripts": ["lazyllm = lazyllm_vllm.cli.main:main"],
        "vllm.general_plugins": ["lazyllm = lazyllm_vllm.hooks.plugin:register"],
        "vllm.platform_plugins": [
            "lazyllm_interpret = lazyllm_vllm.hooks.platform:interpret_triton_on_cpu"
        ],
    },
)
