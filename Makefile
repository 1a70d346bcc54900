# make demo | test | bench | docs: each sets up .venv first. `make clean` before another PYTHON or TORCH.
# make gpu: all that a new machine with a GPU should be asked, with the PYTHON that is there and no network;
# STAGES="correctness speed" for some of it, DEVICE=cpu for a rehearsal.
# make wheels: an sdist, and a wheel for every Python and every supported torch, tried with each; see .ci/wheels.
# make oldest | newest: what depends most on PyTorch and Triton, under the oldest, or the newest, that are supported.
# Gigabytes, the first time, unless PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: demo test bench docs gpu oldest newest wheels clean

demo: .venv/demo
	$(BIN)/python -m fastssl.train.demo

# In two processes, whose threads do not wait for each other by turning in circles.
test: .venv/test
	OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

bench: .venv/bench
	$(BIN)/python -m benchmarks.ops

# site/index.html
docs: .venv/docs
	$(BIN)/python -m mkdocs build

# The library in this tree is for another PyTorch and is not loaded: the portable code runs.
oldest newest: %: build/%/ready
	build/$@/bin/python -m pytest -q tests/ops/test_ops.py tests/gpu/test_triton.py \
		-k "(test_compile or test_opcheck) and not inductor or interpreted and (sigmoid or koleo)"

oldest: PAIR := torch==2.10.0 triton==3.6.0
newest: PAIR := torch==2.14.1 triton==3.8.0
build/oldest/ready build/newest/ready: build/%/ready:
	$(PYTHON) -m venv build/$*
	build/$*/bin/pip install $(PAIR) hypothesis numpy pytest rich
	touch $@

wheels:
	.ci/wheels

gpu:
	$(PYTHON) -m benchmarks.gpu $(STAGES) --device $(or $(DEVICE),cuda)

clean:
	rm -rf .venv build dist site *.egg-info fastssl/_build.json fastssl/*.so

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install "$(TORCH)"
	touch $@

# Editable, so that what runs is the working tree. torch again, lest an extra bring another one.
.venv/demo .venv/test .venv/bench .venv/docs: .venv/torch $(NATIVE)
	@echo "Compiling the kernels: minutes for C++, and as many again for CUDA where nvcc is. CUDACXX=none leaves CUDA out."
	$(BIN)/pip install "$(TORCH)" --editable ".[$(@F)]"
	touch $@
