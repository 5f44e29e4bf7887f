# SPDX-License-Identifier: Apache-2.0
# A new user needs only `make demo` and `make test`. Both install everything
# into a virtual environment in this folder.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
SOURCES := $(wildcard cc/*/*.cc cc/*/*.h cc/core/*/*.cc cc/core/*/*.cu \
	cc/core/*/*.h)
TEST_SOURCES := $(wildcard tests/*/*.c tests/*/*.cc tests/*/*.h)

.PHONY: help install demo demo-full docs quick test test-full wheel wheel-test \
	benchmark gpu-check gpu-check-tf lint format bazel clean

help:
	@echo "make demo       fine-tune detectors of trees in aerial photographs,"
	@echo "                plain and deformable (fetches 43 MB; 5 to 15 minutes)"
	@echo "make demo-full  the same with three seeds and more steps; and"
	@echo "                segmenters and detectors of digits, with controls (hours)"
	@echo "make quick      run the most telling tests (two minutes)"
	@echo "make test       run the tests (twenty minutes on two processors)"
	@echo "make test-full  run all tests with whole grids (hours)"
	@echo "make wheel      build the wheels of a release, for every supported"
	@echo "                TensorFlow, into dist (fetches 1.6 GB of headers)"
	@echo "make wheel-test install the wheel beside every supported TensorFlow,"
	@echo "                Keras and Python, and test it (an hour)"
	@echo "make docs       write the API pages to build/docs"
	@echo "make benchmark  time the ops beside their peers"
	@echo "make gpu-check  time and test the GPU kernels: needs a GPU, nvcc and"
	@echo "                PyTorch, and nothing of TensorFlow"
	@echo "make gpu-check-tf"
	@echo "                run TensorFlow's tests on a GPU"
	@echo "make lint       check style;  make format  mend it"
	@echo "make bazel      build and test the core with Bazel"
	@echo "make clean      remove what was built (not results in runs/)"

# Builds the package against the TensorFlow of the environment, in place, so
# that Python started in this folder finds it. A changed source starts a new
# build.
$(INSTALLED): setup.py pyproject.toml cc/build.py $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check \
		"setuptools>=77,<84" "tensorflow==2.21.*"
	$(RUN) -m pip install --disable-pip-version-check \
		--no-build-isolation --editable ".[test,lint,release]"
	touch $@

install: $(INSTALLED)

# Fetches photographs and weights, see NOTICE, into the folder that
# `tf-deform doctor` names.
demo: $(INSTALLED)
	$(VENV)/bin/tf-deform demo trees --out runs/demo/trees

demo-full: $(INSTALLED)
	$(VENV)/bin/tf-deform demo trees --full --out runs/demo-full/trees
	$(VENV)/bin/tf-deform demo digits --full --out runs/demo-full/digits

# Builds the documentation; a warning fails.
docs: $(INSTALLED)
	$(RUN) docs/api.py build/docs

# Runs the tests in two processes, as most tests use one processor. The tests of
# a file run in the same process, as they share fixtures; conftest.py orders the
# files.
test: $(INSTALLED)
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Also runs the tests marked slow: the rows of grids beyond a cover of all
# pairs.
test-full: $(INSTALLED)
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ""

# Runs the tests of the core without its kernels for GPUs, of the ops against
# their references, of the layers' contracts, and of the comparisons that all
# other tests use. Leaves out tests that compile, start other processes or need
# gigabytes.
QUICK := $(filter-out tests/core/isa_core_test.py, \
		$(wildcard tests/core/*_core_test.py)) \
	tests/ops/arguments_test.py tests/ops/bad_calls_test.py \
	$(wildcard tests/ops/deformable_*_test.py) tests/ops/every_op_test.py \
	tests/ops/pooling_test.py $(wildcard tests/layers/contract_test.py) \
	tests/export/export_check_test.py tests/build/files_test.py tests/lib

quick: $(INSTALLED)
	$(RUN) -m pytest -n 2 --dist worksteal $(QUICK) \
		-k "not any_number_of_threads and not strips and not 32_bits"

# For example WHEEL="--tensorflow 2.15.1 2.21.0".
wheel: $(INSTALLED)
	$(RUN) cc/wheel.py $(WHEEL)

# For example WHEEL_TEST="--only 2.15.1".
wheel-test: $(INSTALLED)
	$(RUN) tests/wheel/matrix.py $(WHEEL_TEST)

benchmark: $(INSTALLED)
	$(RUN) benchmarks/run.py

# Runs on a machine without TensorFlow: makes no environment, installs nothing.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

gpu-check-tf: $(INSTALLED)
	TF_DEFORM_TEST_DEVICE=/GPU:0 $(RUN) -m pytest tests/gpu/gpu_test.py \
		tests/ops/deformable_*_test.py tests/ops/every_op_test.py \
		tests/ops/pooling_test.py \
		tests/layers/deformable_*_test.py tests/layers/roi_layers_test.py \
		tests/layers/contract_test.py tests/layers/given_test.py \
		tests/layers/types_test.py \
		tests/xla/xla_test.py

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES) $(TEST_SOURCES)

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES) $(TEST_SOURCES)

bazel: $(INSTALLED)
	PYTHON="$(abspath $(RUN))" bazel build //...
	PYTHON="$(abspath $(RUN))" bazel test //...

clean:
	rm -rf $(VENV) build dist *.egg-info tf_deform/*.so \
		tf_deform/_build_info.py
