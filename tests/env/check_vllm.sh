#!/usr/bin/env bash
# The whole test suite on another vLLM, on a machine without a GPU:
# check_vllm.sh PYTHON VERSION [PYTEST ARGUMENT...]
#
# There is no CPU build of most releases. So this lays the release's own Python over the compiled
# parts of the CPU build that the environment has; what is compiled is checked on a GPU instead.
# The result stays in the environment, for the next time.
set -euo pipefail

python=$(realpath -s "${1:?usage: check_vllm.sh PYTHON VERSION}")
version=${2:?usage: check_vllm.sh PYTHON VERSION}
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
site=$(dirname "$python")/../vllm-$version

if [[ ! -e $site ]]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    echo "check_vllm: vLLM $version (a minute)"
    "$python" -m pip download --quiet --no-deps --python-version 3.12 --only-binary :all: \
        --dest "$work" "vllm==$version"
    "$python" - "$work" <<'END'
import importlib.metadata
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

work = pathlib.Path(sys.argv[1])
site = work / "site"
(wheel,) = work.glob("vllm-*.whl")
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(site, [name for name in archive.namelist() if not name.endswith(".so")])
wheel.unlink()
for library in pathlib.Path(importlib.util.find_spec("vllm").origin).parent.glob("*.so"):
    shutil.copy(library, site / "vllm")
# vLLM knows a CPU build by the version of what is installed.
(info,) = site.glob("vllm-*.dist-info")
metadata = (info / "METADATA").read_text()
(info / "METADATA").write_text(re.sub(r"^(Version: .*)$", r"\1+cpu", metadata, count=1, flags=re.M))
installed = {re.sub("[-_.]+", "-", d.name).lower() for d in importlib.metadata.distributions()}
gpu = r"nv|torch|flashinfer|tilelang|apache-tvm|quack|tokenspeed|humming|pynv|numba|.*tensor"
missing = []
for line in re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.M):
    requirement, _, marker = line.partition(";")
    name = re.sub("[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()
    if not marker and name not in installed and not re.match(gpu, name):
        missing.append(requirement.strip())
if missing:
    print("check_vllm: with", ", ".join(missing))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, *missing], check=True)
END
    mv "$work/site" "$site"
fi
export PYTHONPATH=$site
"$python" -c "import vllm; print('check_vllm: vLLM', vllm.__version__); assert vllm.__version__ == '$version'"
"$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
