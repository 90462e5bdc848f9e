#!/usr/bin/env bash
# The documented toy pipeline, step by step, for the sequence lengths given (default 128).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
LENGTHS=("${@:-128}")

"$PYTHON" -m data.make_toy_kd --out /tmp/toy_kd.jsonl --n 128
"$PYTHON" -m training.run_toy_distill --in /tmp/toy_kd.jsonl --out /tmp/toy.ckpt --epochs 2 --mps 0
"$PYTHON" -m conversion.export_pytorch --checkpoint /tmp/toy.ckpt --out /tmp/toy_exported --toy --mode prefill \
    --seq 64 --enumerated-T 64 128 256
for T in "${LENGTHS[@]}"; do
    "$PYTHON" -m conversion.convert_coreml --backend pytorch --in "/tmp/toy_exported/student_prefill_T$T.pt" \
        --out "/tmp/toy_T$T.mlpackage" --seq "$T" --compute-units all
    REPORT=eval/reports/toy_e2e.json
    [ "$T" = 128 ] || REPORT="eval/reports/toy_e2e_T$T.json"
    "$PYTHON" -m evaluation.toy_contracts --model "/tmp/toy_T$T.mlpackage" --seq "$T" --report "$REPORT"
done
