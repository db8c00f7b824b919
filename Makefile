# Every target makes its own .venv once; only Python and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-gpu stress lint format bench clean

demo: $(INSTALLED)
	$(BIN)/seekr-peft demo

# WORKERS=0 for one process. A worker goes on with tests of another one when its own are done, in the files' order, so
# that what a file's tests share is hardly ever made twice.
WORKERS ?= auto

test: $(INSTALLED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal --durations=10

test-gpu: $(INSTALLED)
	SEEKR_TEST_GPU=1 $(BIN)/python -m pytest tests/test_gpu.py tests/test_fused_rows.py

# STRESS='--only kills,damage=50 --seed 3' for a part of it.
stress: $(INSTALLED)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m stress $(STRESS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks --out runs/bench.json

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs
