# make env | test | smoke | lab | reproduce | docs | lock | notebooks | readme | clean. Needs python3, make and git; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
# A tree of its own per machine: uv shares one cache between all environments.
UV := $(BIN)/python -m uv

# make reproduce: every table, from nothing, on the mini world; TABLES="1 2", SEEDS=3, SIZE=large, CORES=8, DRY=1 (only the plan).
# make reproduce PROFILE=paper DATA=/path: the same on real data; /path holds epic, ego4d and egtea.
PROFILE ?= mini
TABLES ?= all
SEEDS ?= 1
SIZE ?= default
CORES ?= all
GPUS ?= 1
REPORT = $(PROFILE)$(if $(filter mini,$(PROFILE)),$(addprefix -,$(filter-out default,$(SIZE))))
SNAKEMAKE = snakemake --nolock --cores $(CORES) $(if $(DRY),--dry-run) $(if $(filter paper,$(PROFILE)),--resources gpu=$(GPUS)) \
	--config profile='$(PROFILE)' size='$(SIZE)' seeds='$(SEEDS)' tables='$(TABLES)' data='$(DATA)'

.PHONY: env test smoke lab reproduce docs lock notebooks readme clean

env: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 15) else f"xmic needs Python 3.11 to 3.14, this is {v[0]}.{v[1]}: make env PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) pip install --quiet --compile-bytecode -r requirements.lock
	$(UV) pip install --quiet --compile-bytecode --no-deps -e .
	@if [ -d .git ]; then $(BIN)/nbdev_install_hooks > /dev/null || echo "git's hooks for notebooks could not be installed; everything else works"; fi
	@touch $@

test: env
	bash tests/run

# From a clip to a table with another Python, in an environment of its own that is gone afterwards: make smoke PYTHON=python3.13.
smoke:
	@folder=$$(mktemp -d .smoke-XXXXXX) && trap 'rm -rf "$$folder"' EXIT && \
	$(MAKE) --silent env VENV=$$folder PYTHON='$(PYTHON)' && $$folder/bin/python tests/smoke.py

lab: env
	jupyter lab nbs/explore.ipynb

# One at a time in a folder. This lock ends with its process, however that ends; snakemake's own would outlive a kill.
reproduce: env
	@$(BIN)/python -m xmic.warm .snakemake/reproduce.lock $(SNAKEMAKE)
	$(if $(DRY),,@echo "The report: reports/$(REPORT)/index.html")

# The site, in _docs/html, from the notebooks as they are committed; a warning is an error.
docs: env
	sphinx-build -q -W --keep-going -n -c docs . _docs/html
	@echo "The site: _docs/html/index.html"

lock: $(BIN)/python
	$(UV) pip compile --quiet --universal --python-version 3.11 --upgrade --extra dev pyproject.toml -o requirements.lock

# Runs the library notebooks, so that their figures can be seen without running them.
notebooks: env
	env -u MPLBACKEND jupyter nbconvert --log-level WARN --to notebook --execute --inplace $$(find nbs -path 'nbs/[0-9]*' -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*')
	nbdev_clean

readme: env
	$(BIN)/python tests/readme.py --write

# What the targets above made, by name: no data, features, runs or reports.
clean:
	rm -rf $(VENV) build dist xmic.egg-info .pytest_cache .hypothesis _docs .snakemake
	find xmic nbs tests benchmarks docs \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
