#!/usr/bin/env bash
# Builds the wheel, installs it into an empty folder, imports all of it there and runs its command:
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

# A model of which config.json alone is there.
mkdir model
cat > model/config.json <<'END'
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000,
 "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
 "num_key_value_heads": 2, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
END
check() {
    PYTHONPATH=$work/site TRITON_INTERPRET=1 "$work/site/bin/lazyllm" check model \
        --skip-tokenizer-init "$@"
}
check --lengths 2048
if refused=$(check --enable-lora --json); then
    echo "wheel: lazyllm check let LoRA pass" && exit 1
fi
grep -q '"error": "lazyllm: LoRA does not work with LazyLLM; --enable-lora: leave it out"' <<< "$refused"
echo "wheel: lazyllm check ran"
