#!/usr/bin/env bash
# vLLM's own load generator, with random prompts:
#   bench_serve.sh http://localhost:8000 MODEL TOKENIZER [INPUT_LEN [PROMPTS [MORE FLAGS...]]]
#
# MODEL is what the server calls it, TOKENIZER its folder or name on the Hub. Random prompts show
# speed, not answers. The same without pruning, to see what it brings:
#   --extra-body '{"vllm_xargs": {"lazyllm": "off"}}'
set -euo pipefail

server=${1:?usage: bench_serve.sh SERVER MODEL TOKENIZER [INPUT_LEN [PROMPTS [MORE FLAGS...]]]}
model=${2:?the name of the model}
tokenizer=${3:?its tokenizer}

exec vllm bench serve --backend openai --base-url "$server" --model "$model" \
    --tokenizer "$tokenizer" --dataset-name random --random-input-len "${4:-4096}" \
    --random-output-len 32 --num-prompts "${5:-8}" --max-concurrency 2 --ignore-eos \
    --temperature 0 "${@:6}"
