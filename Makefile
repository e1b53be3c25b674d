# Two commands to try it:  make demo   and   make test.  Everything lives in .venv; `make clean` forgets all of it.
PYTHON      ?= $(shell command -v python3.11 || command -v python3)
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
PIP_FLAGS   ?=
EXTRAS      ?= dev,docs,onnx,openvino,ray,serve
DEMO_OUT    ?= secateur-demo
MARKS       ?= not slow
WORKERS     ?= 2
FUZZ_SECONDS ?= 300

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) $(PIP_FLAGS)

.PHONY: help demo test sanitize races fuzz install lint format docs build wheel-check clean

help:
	@echo "make demo      compress a small model and write $(DEMO_OUT)/report.html"
	@echo "make test      unit, contract and short real tests (MARKS='not slow'; slow ones: MARKS=slow)"
	@echo "make install   .venv with every development tool (EXTRAS=$(EXTRAS))"
	@echo "make lint      ruff, mypy --strict, import directions;  make format applies ruff's fixes"
	@echo "make sanitize  the native engine's tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make races     the same tests in two threads under ThreadSanitizer"
	@echo "make fuzz      damaged model folders, opened by the engine's loader for FUZZ_SECONDS ($(FUZZ_SECONDS))"
	@echo "make docs      the documentation site in site/, warnings are errors"
	@echo "make build     wheel and sdist in dist/;  make wheel-check installs the wheel in an empty environment"
	@echo "make clean     remove .venv, build products and caches"

# The newest of the stamps says what is installed: the second `make` installs nothing.
$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "secateur needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.created pyproject.toml $(CONSTRAINTS)
	@echo "Installing secateur into $(VENV) (once, a few minutes) ..."
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml $(CONSTRAINTS)
	@echo "Installing secateur and its development tools into $(VENV) (once, a few minutes) ..."
	$(INSTALL) -e ".[$(EXTRAS)]"
	@touch $@ $(VENV)/.base

install: $(VENV)/.dev

demo: $(VENV)/.base
	$(BIN)/secateur demo --out $(DEMO_OUT)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) -m "$(MARKS)"

# The engine's tests with its C++ under AddressSanitizer and UndefinedBehaviorSanitizer (g++).
sanitize: $(VENV)/.dev
	mkdir -p build/sanitized
	printf '#!/bin/sh\nexec g++ -g -fsanitize=address,undefined -fno-sanitize=alignment "$$@"\n' > build/sanitized/c++
	chmod +x build/sanitized/c++
	SECATEUR_CACHE=build/sanitized/cache CXX=$(CURDIR)/build/sanitized/c++ \
	  $(BIN)/python -c 'from secateur.runtime.build import built; built()'
	SECATEUR_CACHE=build/sanitized/cache CXX=$(CURDIR)/build/sanitized/c++ ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" UBSAN_OPTIONS=halt_on_error=1 \
	  $(BIN)/python -m pytest -q -s tests/contract/test_engine*.py -k "not side and not built_once and not quoted and not fork"

# The same in two threads under ThreadSanitizer, which shells do not start under, and which wants addresses where it expects them.
races: $(VENV)/.dev
	mkdir -p build/races
	printf '#!/bin/sh\nexec g++ -g -fsanitize=thread "$$@"\n' > build/races/c++
	chmod +x build/races/c++
	SECATEUR_CACHE=build/races/cache CXX=$(CURDIR)/build/races/c++ \
	  $(BIN)/python -c 'from secateur.runtime.build import built; built()'
	SECATEUR_CACHE=build/races/cache CXX=$(CURDIR)/build/races/c++ OMP_NUM_THREADS=2 \
	  LD_PRELOAD="$$(g++ -print-file-name=libtsan.so)" TSAN_OPTIONS=ignore_noninstrumented_modules=1 setarch -R \
	  $(BIN)/python -c 'import os, sys, pytest; del os.environ["LD_PRELOAD"]; sys.exit(pytest.main(sys.argv[1:]))' \
	  -q -s tests/contract/test_engine*.py -k "not side and not built_once and not quoted and not fork"

# Refused in one line, or run: what else becomes of a damaged folder is printed, and an error.
fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz_loader --seconds $(FUZZ_SECONDS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

build: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

# What a user gets: the wheel in a new environment, away from the checkout. Its dependencies are lent by $(VENV) through a .pth
# file, which does not lend the editable install; that none is undeclared is checked by tests/unit/test_package.py.
wheel-check: build
	test -f dist/secateur-*-py3-none-any.whl
	rm -rf build/wheel-check
	$(BIN)/python -m venv build/wheel-check
	build/wheel-check/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$(echo build/wheel-check/lib/python*/site-packages)/lent.pth"
	cd build && wheel-check/bin/python -I -c "import secateur; secateur.compress; assert 'wheel-check' in secateur.__file__; print('secateur', secateur.__version__, 'from', secateur.__file__)"
	cd build && wheel-check/bin/secateur list > /dev/null

clean:
	rm -rf $(VENV) $(DEMO_OUT) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
