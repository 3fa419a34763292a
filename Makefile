# make train   set up, train the embedded demo, evaluate, export
# make test    set up, run the tests
# make bench   speed, each figure beside its floor; make gpu: kernels' correctness and speed on a GPU, in one command
# make lock    the newest versions that setup.py allows into requirements/lock.txt, then the tests with them
# make test-oldest   the fast tests with the oldest versions that setup.py allows (torch from PyPI: gigabytes)
# Nothing else is needed on a fresh machine with Python 3.11 or 3.12; a GPU is used where there is one.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
GPU    := $(shell command -v nvidia-smi 2>/dev/null)
FAISS  := $(if $(GPU),"faiss-gpu>=1.15","faiss-cpu>=1.10")
TORCH  := torch==2.13.0 triton==3.7.1
LOCK   := requirements/chosen.txt requirements/lock.txt
FAST   := $(patsubst %,tests/test_%.py, \
            settings_are_checked store_contents store_is_what_was_read plan_strategies plan_has_no_false_negatives loss_contract \
            loss_arguments loss_equals_cross_entropy kernels_interpreted packed_equals_padded \
            checkpoints_that_are_loaded sources_cldr locked_versions)

.PHONY: train test lint bench gpu lock test-oldest clean

train: $(READY)
	$(BIN)/python -m hbt_fast.train --config configs/demo.yaml

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python -m pytest bench

# $(call install,virtual environment,constraint files,torch and triton)
# torch first and by exact version: DeepSpeed's build imports it, and a range would pull another build of it. The locks
# leave torch and triton out, so that a torch which is there already stays, with the triton that it asks for.
# Without its dependencies open_clip brings no torchvision, whose wheel wants another torch; a test reads its loss only.
define install
$(PYTHON) -m venv $(1)
$(call pip,$(1),$(2)) setuptools wheel packaging ninja
$(1)/bin/python -c "import torch" 2>/dev/null || $(call pip,$(1),$(2)) $(3)
DS_BUILD_OPS=0 $(call pip,$(1),$(2)) --no-build-isolation "deepspeed>=0.19.2"
$(call pip,$(1),$(2)) --no-build-isolation -e ".[train,hf,st,lora,onnx,mteb,dev]" $(FAISS)
$(call pip,$(1),$(2)) --no-deps "open_clip_torch>=3.3"
endef
pip = $(1)/bin/pip install -q --disable-pip-version-check $(addprefix -c ,$(2))

$(READY): setup.py $(LOCK) $(wildcard csrc/*.cpp)
	$(call install,$(VENV),$(LOCK),$(TORCH))
	touch $@

lock:
	rm -rf build/lock
	$(call install,build/lock,requirements/chosen.txt,$(TORCH))
	{ echo "# Written by \`make lock\`: what the tests and README's demo table hold for. Constraints: pip install -c"; \
	  build/lock/bin/pip freeze --all --exclude-editable --exclude pip --exclude hbt-fast --exclude torch --exclude triton \
	  | grep -Ev '^(#|nvidia-|cuda-|faiss-gpu)'; } > requirements/lock.txt
	$(MAKE) test

test-oldest:
	$(call install,build/oldest,requirements/oldest.txt,torch==2.11.0 triton==3.6.0)
	OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest -n 2 --dist loadfile $(FAST)

gpu: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash bench/gpu.sh

clean:
	rm -rf $(VENV) build *.egg-info
