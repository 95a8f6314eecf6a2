#!/usr/bin/env bash
# Builds the wheel, installs it into an empty folder and imports all of it there:
# check_wheel.sh PYTHON
set -euo pipefail

python=$(realpath -s "${1:?usage: check_wheel.sh PYTHON}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -rf build # else what was deleted since would be in the wheel
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" .
"$python" -m pip install --quiet --no-deps --target "$work/site" "$work"/*.whl
cd "$work"
# First on the path, so that the editable install of the development environment is not seen.
PYTHONPATH=$work/site TRITON_INTERPRET=1 "$python" - <<'END'
import importlib
import pathlib
import pkgutil

import lazyllm_vllm

site = pathlib.Path.cwd() / "site"
names = [m.name for m in pkgutil.walk_packages(lazyllm_vllm.__path__, "lazyllm_vllm.")]
for name in names:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(site), f"{name} is not from the wheel"
assert "lazyllm_vllm.kernels.score" in names and "lazyllm_vllm.benchmarks" not in names
assert (site / "lazyllm_vllm/py.typed").exists()
assert (site / "lazyllm_vllm/observe/explain/page/page.html").exists()
assert (site / "bin/lazyllm").exists()
print(f"wheel: {len(names)} modules imported")
END
