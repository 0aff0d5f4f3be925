# Every target makes the environment it needs. `make` alone lists them.
#
#   VENV=DIR      where the environment is (default .venv)
#   PYTHON=...    which Python makes it (default: python3.11, else 3.12, else newer)
#   WORKERS=N     test processes (default 2)

VENV ?= .venv
WORKERS ?= 2
OUT ?= out
FUZZ_SECONDS ?= 60

PY := $(VENV)/bin/python
READY := $(VENV)/.metis-home-ready
OLDEST := $(VENV)-oldest
VLLM_VENV ?= $(VENV)-vllm
export PYTHONDONTWRITEBYTECODE ?= 1
# Tests run in $(WORKERS) processes: one torch thread each, or they fight for the cores.
TEST_THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_THREADS) HF_HUB_OFFLINE=1 $(PY) -m pytest

.PHONY: help environment demo test lint format types test-kernels conformance gpu-check bench-overhead bench-convert \
        bench-sft bench-rl study study-rl test-crash fuzz test-vllm test-adapters test-trl clean clean-environment

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

environment: $(READY)  ## make or update the environment (the other targets do this by themselves)

$(READY): pyproject.toml environment/constraints.txt environment/create.sh
	@environment/create.sh $(VENV)
	@touch $@

demo: $(READY)  ## the main job on real weights: convert, load, route, answer (CPU, minutes)
	@HF_HUB_OFFLINE=1 $(PY) examples/demo.py

# The kernel tests are a process of their own: Triton reads TRITON_INTERPRET when a kernel is defined.
test: lint types test-kernels  ## everything CI checks: lint, types, all tests
	$(PYTEST) -n $(WORKERS) --dist loadfile --ignore=tests/kernels tests

lint: $(READY)  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)  ## ruff, mending what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(READY)  ## mypy
	$(PY) -m mypy -p metis_home

test-kernels: $(READY)  ## kernels in Triton's interpreter, no GPU needed
	@if $(PY) -c 'import triton' 2>/dev/null; then TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) --dist loadfile tests/kernels; \
	else echo 'kernel tests skipped: there is no triton for this platform'; fi

conformance: $(READY) $(OLDEST)/.metis-home-ready  ## transformers' own model tests, newest and oldest supported version
	$(TEST_THREADS) $(PY) tests/conformance/run.py --workers $(WORKERS)
	$(TEST_THREADS) $(OLDEST)/bin/python tests/conformance/run.py --workers $(WORKERS)

# Its own transformers in front, everything else from the main environment behind it.
$(OLDEST)/.metis-home-ready: $(READY) environment/oldest.txt
	$(PY) -m venv $(OLDEST)
	$(PY) -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_paths()['purelib'])" \
	  > $$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/main_environment.pth
	$(OLDEST)/bin/python -m pip install -q -c environment/oldest.txt --ignore-installed --no-deps transformers
	$(OLDEST)/bin/python -m pip install -q -c environment/oldest.txt transformers
	@touch $@

gpu-check: $(READY)  ## kernels on this machine's GPU: correctness, then speed; results in OUT=DIR
	$(PY) benchmarks/gpu_check.py --out $(OUT)

bench-overhead: $(READY)  ## the two-branch model against the dense model it came from
	$(PY) benchmarks/overhead.py --json benchmarks/results/overhead.json

bench-convert: $(READY)  ## conversion against cp
	$(PY) benchmarks/convert.py --json benchmarks/results/convert.json

bench-sft: $(READY)  ## Stage-SFT against dense SFT with plain Trainer; packing against padding
	$(PY) benchmarks/sft.py --json benchmarks/results/sft.json

bench-rl: $(READY)  ## a step of Stage-RL against TRL's GRPOTrainer (its environment is made once)
	tests/trl/run.sh --environment-only $(VENV)-trl $(PY)
	$(PY) benchmarks/rl.py --trl-python $(VENV)-trl/bin/python --json benchmarks/results/rl.json

study: $(READY)  ## Stage-SFT on pico models: does the router choose well? (CPU, at most 30 minutes)
	$(PY) examples/study_sft.py

study-rl: $(READY)  ## GRPO, HDPO and all of RISE on pico models (CPU, at most 60 minutes)
	$(PY) examples/study_rl.py
	$(PY) examples/study_hdpo.py

test-crash: $(READY)  ## conversion killed at every file operation, not at every third
	METIS_HOME_CRASH_STRIDE=1 $(PYTEST) tests/convert/test_crash.py

fuzz: $(READY)  ## the safetensors header reader against mutated files, FUZZ_SECONDS=60
	$(PY) -c 'import atheris' 2>/dev/null || $(PY) -m pip install -q atheris
	tests/fuzz/run.sh $(FUZZ_SECONDS) $(PY)

test-vllm: $(READY)  ## split branches in a real vLLM engine (CPU; its environment is made once, 3.5 GB)
	tests/vllm/run.sh $(VLLM_VENV) $(PY)

test-trl: $(READY)  ## the hand-over in a real TRL, and TRL's losses against ours (its environment is made once)
	tests/trl/run.sh $(VENV)-trl $(PY)

test-adapters: $(READY)  ## lmms-eval and VLMEvalKit with our model, the real packages (environments made once, 1.5 GB)
	tests/adapters/run.sh $(VENV)-adapters $(PY)

clean:  ## remove caches and built files, keep the environment
	rm -rf build dist out .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

clean-environment:  ## remove the environments
	rm -rf $(VENV) $(OLDEST) $(VLLM_VENV) $(VENV)-trl $(VENV)-adapters-lmms $(VENV)-adapters-vlmeval
