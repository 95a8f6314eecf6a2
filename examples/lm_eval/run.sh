#!/usr/bin/env bash
# lm-evaluation-harness (pip install 'lm-eval[api]') against a server:
#   run.sh http://localhost:8000 MODEL [MORE FLAGS...]
#
# The task beside this file needs no download. Of the harness's own tasks those that generate work
# (output_type generate_until). Those that score given answers (multiple_choice, loglikelihood) ask
# for the log-probabilities of the prompt, which a pruned prompt does not have: a 400.
set -euo pipefail

server=${1:?usage: run.sh SERVER MODEL [MORE FLAGS...]}
model=${2:?the name of the model}
cd "$(dirname "${BASH_SOURCE[0]}")"

exec lm_eval run --model local-completions --include_path . --tasks lookup \
    --model_args "model=$model,base_url=$server/v1/completions,num_concurrent=2,tokenizer_backend=None,tokenized_requests=False" \
    "${@:3}"
