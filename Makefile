# make train   set up, train the embedded demo, evaluate, export
# make test    set up, run the tests
# make bench   speed, each figure beside its floor; make gpu: kernels' correctness and speed on a GPU, in one command
# Nothing else is needed on a fresh machine with Python 3.11 or 3.12; a GPU is used where there is one.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
GPU    := $(shell command -v nvidia-smi 2>/dev/null)
FAISS  := $(if $(GPU),"faiss-gpu>=1.15","faiss-cpu>=1.10")

.PHONY: train test lint bench gpu clean

train: $(READY)
	$(BIN)/python -m hbt_fast.train --config configs/demo.yaml

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python -m pytest bench

# Without its dependencies open_clip brings no torchvision, whose wheel wants another torch; a test reads its loss only.
# torch first and by exact version: DeepSpeed's build imports it, and a range would pull another build of it
$(READY): setup.py $(wildcard csrc/*.cpp)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check setuptools wheel packaging ninja
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	DS_BUILD_OPS=0 $(BIN)/pip install -q --disable-pip-version-check --no-build-isolation "deepspeed>=0.19.2"
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e ".[train,hf,st,lora,onnx,mteb,dev]" $(FAISS)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps "open_clip_torch>=3.3"
	touch $@

gpu: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash bench/gpu.sh

clean:
	rm -rf $(VENV) build *.egg-info
