# The commands of this repository. Each starts from nothing: `make demo` in a fresh clone works.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The demo and the fast tests build without CUDA: compiling for three architectures takes minutes,
# and the emulator runs the same kernels' logic.
NATIVE_ENV := FASTZOO_CUDA=0 FASTZOO_TESTS=1 PATH="$(abspath $(BIN)):$$PATH"
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: demo test test-all lint format bench wheel wheel-cuda gpu clean

demo: $(VENV)/demo.stamp ## install, build, run the operators on real input, save a picture
	$(BIN)/python examples/demo.py

test: lint ctest ## the fast set: C++ tests, then pytest with every backend
	$(BIN)/python -m pytest -m "not slow" -n 2

test-all: lint ctest ## also ahead-of-time compiles, CUDA wheel and sweeps
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/aot/test_triton_aot.py

.PHONY: ctest
ctest: $(VENV)/test.stamp
	$(BIN)/ctest --test-dir build/native --output-on-failure

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/cpp/*.cpp' 'benchmarks/*.cpp' \
	  | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/test.stamp ## what pre-commit runs
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/cpp/*.cpp' 'benchmarks/*.cpp' \
	  | xargs $(BIN)/clang-format -i

bench: $(VENV)/test.stamp ## measure, write benchmarks/results/<device>.json and docs/benchmarks.md
	$(BIN)/python -m benchmarks

wheel: $(VENV)/test.stamp ## a CPU wheel and an sdist in dist/
	FASTZOO_CUDA=0 $(BIN)/python -m build

wheel-cuda: $(VENV)/test.stamp ## a wheel with CUDA kernels in dist/; needs nvcc, not a GPU
	FASTZOO_CUDA=1 $(BIN)/python -m build --wheel

gpu: ## on a machine with a GPU: build, conformance, benchmarks; see docs/gpu.md
	$(PYTHON) tools/gpu.py

clean:
	rm -rf build dist $(VENV) fastzoo/*.so

# Every file that the native build depends on; CMake decides what to do about a change.
NATIVE_SOURCES := CMakeLists.txt setup.py pyproject.toml \
  $(shell find csrc tests/cpp -type f 2>/dev/null)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: requirements/*.txt $(NATIVE_SOURCES) | $(VENV)/bin/python
	$(PIP) -r requirements/demo.txt
	$(NATIVE_ENV) $(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/test.stamp: requirements/*.txt $(NATIVE_SOURCES) | $(VENV)/bin/python
	$(PIP) -r requirements/test.txt
	$(PIP) --no-deps -r requirements/no-deps.txt
	$(NATIVE_ENV) $(PIP) --no-build-isolation --no-deps -e .
	touch $@
