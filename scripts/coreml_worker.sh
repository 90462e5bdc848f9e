#!/usr/bin/env bash
# Convert what `make pytorch-worker` exported and verify every package. coreml/artifacts/worker/model.mlpackage is the
# primary prefill shape; the other shapes and decode stand beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
IN=${1:-models/student/exported}
OUT=${2:-coreml/artifacts/worker}

status=0
"$PYTHON" -m distill convert-all --in "$IN" --out "$OUT" || status=$?
[ $status -le 1 ] || exit $status  # 1: a secondary shape failed when it was exported; the others are verified
for package in "$OUT"/*.mlpackage; do
    name=$(basename "$package" .mlpackage)
    "$PYTHON" -m evaluation.toy_contracts --model "$package" --report "eval/reports/worker_$name.json" || status=$?
done
exit $status
