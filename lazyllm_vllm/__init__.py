"""LazyLLM (arXiv 2407.14057) for vLLM: dynamic token pruning for long prompts."""

from pathlib import Path

__version__ = "0.1.0"

# setup.py installs the top-level folder kernels/ as lazyllm_vllm.kernels. In a source checkout that
# folder is our sibling, so look there too: then an editable install, scripts run from the checkout
# and fresh interpreters that vLLM starts there all find it, with no build step in between.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))
