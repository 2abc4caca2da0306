# make env | test | lab | lock | notebooks | readme | clean. Needs python3, make and git; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
# A tree of its own per machine: uv shares one cache between all environments.
UV := $(BIN)/python -m uv

.PHONY: env test lab lock notebooks readme clean

env: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 14) else f"xmic needs Python 3.10 to 3.13, this is {v[0]}.{v[1]}: make env PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) pip install --quiet -r requirements.lock
	$(UV) pip install --quiet --no-deps -e .
	@touch $@

test: env
	bash tests/run

lab: env
	jupyter lab nbs

lock: $(BIN)/python
	$(UV) pip compile --quiet --universal --python-version 3.10 --upgrade --extra dev pyproject.toml -o requirements.lock

# Runs the library notebooks, so that their figures can be seen without running them.
notebooks: env
	env -u MPLBACKEND jupyter nbconvert --log-level WARN --to notebook --execute --inplace nbs/[0-9]*.ipynb
	nbdev_clean

readme: env
	$(BIN)/python tests/readme.py --write

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis _docs
	find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
