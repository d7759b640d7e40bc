# Every target makes .venv by itself, from the pinned requirements, when those are newer than it.
# PYTHON=python3.12 chooses another interpreter for it, WORKERS=4 the number of test processes, MINUTES=60 how long to
# search for failures.

VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?=
WORKERS ?= 2
MINUTES ?= 10
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
KERNELS := build/.kernels
NVRTC := build/nvrtc/.installed
SANITIZED := build/sanitize
EMULATED := build/emulate
ARM64 := build/arm64
ARM64_PYTHON := $(ARM64)/sysroot/usr/bin/python

.PHONY: help demo test thorough sweep fuzz kernels check bench quality pictures bench-compare sanitize emulate arm64 format clean

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1\t\2/p' Makefile

demo: $(KERNELS)  ## watch the shipped model write: token by token, by verified drafts, block by block
	@$(PY) -m twotower_kernels demo

test: $(DEV) $(KERNELS) $(NVRTC)  ## the tests, on the CPU
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) -m "not thorough"

thorough: $(DEV) $(KERNELS) $(NVRTC)  ## the tests that make test leaves out: slow searches, whole collections
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) -m thorough

sweep: $(DEV) $(KERNELS)  ## every small causal language model of transformers on these kernels: agrees, or is refused by name
	@$(PY) -m tests.transformers_sweep

fuzz: $(DEV) $(KERNELS)  ## search for failures of the properties: make fuzz MINUTES=60. What it finds, make test replays
	@OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --minutes $(MINUTES) --workers $(WORKERS)

# Of each GPU kernel make test compiles the hardest build.
kernels: $(DEV) $(NVRTC)  ## compile every GPU kernel in every configuration for every GPU, into build/kernels.json
	@$(PY) -m tests.gpu.build_kernels build/kernels.json
	@$(PY) -m tests.gpu.launch_kernels
	@$(PY) -m tests.gpu.nvrtc

check: $(DEV)  ## ruff (lint and format), mypy and clang-format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/common/* csrc/cpu/* csrc/cuda/* csrc/direct/* tests/simt/*.h tests/simt/*.cpp

bench: $(DEV) $(KERNELS)  ## time every operation beside its rivals, then sweeps and generation, into bench/results/cpu
	@$(PY) -m bench --save bench/results/cpu
	@$(PY) -m bench.sweeps --save bench/results/cpu
	@$(PY) -m bench.generation --save bench/results/cpu
	@$(PY) -m bench.demo --save bench/results/cpu

quality: $(DEV) $(KERNELS)  ## score the shipped model's text on held-out files, into its card
	@$(PY) -m bench.quality --card

pictures: $(DEV)  ## draw docs/pictures from what is in bench/results/cpu
	@$(PY) -m bench.pictures bench/results/cpu docs/pictures

bench-compare: $(DEV)  ## two commits side by side: make bench-compare BASE=main~1 [ARGS="--op moe"]
	@$(PY) -m bench.compare $(BASE) $(ARGS)

# Optimised as ever, because the error budgets are about the code that runs. The portable baseline alone is built: it is
# the same source as every other instruction set.
sanitize: $(DEV)  ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@TT_BASELINE_ONLY=1 CXXFLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
		LDFLAGS="-fsanitize=address,undefined" \
		$(PY) setup.py -q build_ext --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 CI=true OMP_NUM_THREADS=1 \
		KERNEL_LIBRARY="$$(echo $(CURDIR)/$(SANITIZED)/lib/twotower_kernels/_C*.so)" \
		$(PY) -m pytest -q -n $(WORKERS) tests/kernels

# The paths of AVX512-BF16 and AMX on a processor that lacks them: same source, the instructions computed by other means.
emulate: $(DEV)  ## the kernels' tests with the instructions of AVX512-BF16 and AMX emulated
	@TT_EMULATE=1 CXXFLAGS="-march=native -Wno-psabi" \
		$(PY) setup.py -q build_ext --build-lib $(EMULATED)/lib --build-temp $(EMULATED)/temp
	@CI=true OMP_NUM_THREADS=1 KERNEL_LIBRARY="$$(echo $(CURDIR)/$(EMULATED)/lib/twotower_kernels/_C*.so)" \
		$(PY) -m pytest -q -n $(WORKERS) tests/kernels

# Compiled here, run by qemu in a Python of its own (tests/arm64), with all instructions that it knows: both sets. What
# depends on no processor, or takes minutes there, is left out.
arm64: $(DEV) $(ARM64_PYTHON)  ## the kernels for 64-bit Arm under an emulator. On Debian; installs system packages
	@CXX="aarch64-linux-gnu-g++ -I$(CURDIR)/$(ARM64)/sysroot/usr/include/python -I$(CURDIR)/$(ARM64)/sysroot/usr/include" \
		$(PY) setup.py -q build_ext --build-lib $(ARM64)/lib --build-temp $(ARM64)/temp
	@KERNEL_EMULATOR="qemu-aarch64-static -cpu max -L $(CURDIR)/$(ARM64)/sysroot \
		-E PYTHONHOME=$(CURDIR)/$(ARM64)/sysroot/usr $(CURDIR)/$(ARM64_PYTHON)" \
		KERNEL_LIBRARY="$$(echo $(CURDIR)/$(ARM64)/lib/twotower_kernels/_C*.so)" CI=true OMP_NUM_THREADS=1 \
		$(PY) -m pytest -q -n $(WORKERS) tests/arm64 tests/kernels \
		-k "(arm64 or every or bit or bits or alone or gate or ties or nan or many or extreme) \
		and not (registration or compile or released or direct or memory or argument or recording)"

format: $(DEV)  ## let ruff and clang-format rewrite the files
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i csrc/*.cpp csrc/*.h csrc/common/* csrc/cpu/* csrc/cuda/* csrc/direct/* tests/simt/*.h tests/simt/*.cpp

clean:  ## remove .venv and everything generated
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Other versions of one library, each in a folder of its own.
$(NVRTC): requirements-nvrtc.txt $(RUNTIME)
	@for wheel in $$(grep -v '^#' requirements-nvrtc.txt); do \
		$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
			--target build/nvrtc/$$wheel $$wheel || exit 1; done
	@touch $@

$(ARM64_PYTHON): scripts/arm64.sh
	@scripts/arm64.sh $(ARM64)
	@touch $@

# ninja compiles only what changed.
$(KERNELS): $(RUNTIME) setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/common/* csrc/cpu/* csrc/direct/*)
	@$(PY) setup.py -q build_ext --inplace
	@touch $@

$(RUNTIME): requirements.txt scripts/bootstrap.sh
	@PYTHON="$(PYTHON)" scripts/bootstrap.sh $(VENV) requirements.txt
	@touch $@

# mamba_ssm's sources hold PyTorch references that the tests compare with; its CUDA extension is not wanted.
$(DEV): requirements-dev.txt requirements-peers.txt $(RUNTIME)
	@scripts/bootstrap.sh $(VENV) requirements-dev.txt
	@MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
		scripts/bootstrap.sh $(VENV) requirements-peers.txt --no-deps --no-build-isolation
	@touch $@
