# make demo | test | bench | docs: each sets up .venv first. `make clean` before another PYTHON or TORCH.
# make gpu: all that a new machine with a GPU should be asked, with the PYTHON that is there and no network;
# STAGES="correctness speed" for some of it, OUT=folder for the results, DEVICE=cpu for a rehearsal.
# make wheels: an sdist, and a wheel for every Python and every supported torch, tried with each; see .ci/wheels.
# make oldest | between | newest: what depends most on PyTorch and Triton, under such a pair of those that are supported.
# Gigabytes, the first time, unless PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)
VERSIONS := oldest between newest
SELECTED := test_backend.py or (test_compile or test_opcheck or test_torch_func) and not inductor \
	or interpreted and (sigmoid or koleo)

.PHONY: demo test bench docs gpu oldest between newest wheels clean

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

# On a copy of the package, with the library for that PyTorch: this tree keeps the one that it has.
$(VERSIONS): %: build/%/ready
	cd build/$@ && bin/python -m fastssl check
	cd build/$@ && PYTEST_ADDOPTS=--import-mode=append OMP_WAIT_POLICY=passive bin/python -m pytest -q -k "$(SELECTED)" \
		$(addprefix $(CURDIR)/tests/, test_backend.py ops/test_ops.py gpu/test_triton.py)

oldest: PAIR := torch==2.10.0 triton==3.6.0
between: PAIR := torch==2.12.1 triton==3.7.1
newest: PAIR := torch==2.14.1 triton==3.8.0
$(VERSIONS:%=build/%/ready): build/%/ready: $(NATIVE) $(shell find fastssl kernels -name "*.py")
	$(PYTHON) -m venv build/$*
	build/$*/bin/pip install $(PAIR) hypothesis numpy pytest rich
	FASTSSL_BUILD=require CUDACXX=none build/$*/bin/pip install .
	touch $@

wheels:
	.ci/wheels

gpu:
	$(PYTHON) -m benchmarks.gpu $(STAGES) --device $(or $(DEVICE),cuda) --out $(or $(OUT),results/gpu)

clean:
	rm -rf .venv build dist site *.egg-info fastssl/_build.json fastssl/*.so

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install "$(TORCH)"
	$(BIN)/pip freeze >$@

# Editable, so that what runs is the working tree. What torch brought stays: pip would look for another one that suits
# the newest torchvision.
.venv/demo .venv/test .venv/bench .venv/docs: .venv/torch $(NATIVE)
	@echo "Compiling the kernels: minutes for C++, and as many again for CUDA where nvcc is. CUDACXX=none leaves CUDA out."
	$(BIN)/pip install --constraint .venv/torch --editable ".[$(@F)]"
	touch $@
