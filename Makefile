# Everything below sets itself up: a fresh clone, Python 3.10 or newer and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=

# pip does not compile (all of PyTorch, below): Python compiles what it imports, once. Where it may not keep that, every
# process would compile it anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-gpu lint proto clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"
	touch $@

# Three hospitals on this machine; DATA=FOLDER takes a data set of yours in nnU-Net's raw layout.
demo: $(VENV)/.installed
	$(BIN)/python benchmarks/demo.py --out demo $(if $(DATA),--data "$(DATA)")

# What is made of threads and functions first, then what is made of processes: two files at a time;
# more would bring deadlines into danger.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/e2e --numprocesses auto --dist worksteal
	$(BIN)/python -m pytest tests/e2e --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Does everything work on this machine's GPU? A few minutes; the end is text for a report.
test-gpu: $(VENV)/.installed
	$(BIN)/nnunet_fed selftest --device cuda

# mypy does not see through an editable install of mapped packages: it checks an ordinary one, from another folder. What
# it has found out about PyTorch and the others it keeps between runs, outside that folder.
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typed .
	bin=$$(cd "$(BIN)" && pwd) && cd build/typed && "$$bin/mypy" --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" -p nnunet_fed

# After a change of transport/proto/*.proto.
proto: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet grpcio-tools==1.76.0 --target build/protoc
	PYTHONPATH=build/protoc $(BIN)/python -m grpc_tools.protoc -Innunet_fed/transport/proto=transport/proto \
		--python_out=build --pyi_out=build --grpc_python_out=build \
		nnunet_fed/transport/proto/federation.proto nnunet_fed/transport/proto/check.proto
	cp build/nnunet_fed/transport/proto/*_pb2* transport/proto/

clean:
	rm -rf $(VENV) build demo
