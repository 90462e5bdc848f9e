#!/usr/bin/env bash
# The student of `make mini` again, from cross-entropy alone at equal tokens: distillation must beat it.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
REPORTS=models/student/checkpoints

if [ ! -e "$REPORTS/worker.report.json" ]; then
    echo "error: $REPORTS/worker.report.json is missing: run make mini first" >&2
    exit 2
fi
cp "$REPORTS/latest.pt" "$REPORTS/latest.kept"
trap 'mv "$REPORTS/latest.kept" "$REPORTS/latest.pt"' EXIT
make --no-print-directory worker CONFIG=configs/worker_mini_ce.yaml
"$PYTHON" -m distill held-out "$REPORTS/worker.report.json" --against "$REPORTS/worker_ce.report.json"
