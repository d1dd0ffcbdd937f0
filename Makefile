# make demo   train, distil and evaluate on the digits data set, from nothing
# make test   check the code and run all tests
# make clean  remove the virtual environment and what the demo made

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := demo
# Small enough for a laptop's processor: a teacher of three layers, two seeds.
DEMO_FLAGS := --dataset digits --model simple_dense --epochs 20 --batch_size 64 --trials 2 \
	--output_dir $(DEMO)/runs

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(RUN) Instance-based-smoothing.py $(DEMO_FLAGS)
	$(RUN) Label-smoothing.py $(DEMO_FLAGS)
	$(RUN) Label-relaxation.py $(DEMO_FLAGS)
	$(RUN) Network-distillation.py --teacher $(DEMO)/runs --epochs 10 --batch_size 64 \
		--output_dir $(DEMO)/runs
	$(RUN) Models-evaluation.py $(DEMO)/runs --output_dir $(DEMO)/evaluation
	@echo "The networks are in $(DEMO)/runs, the tables in $(DEMO)/evaluation."

test: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest $(PYTEST_FLAGS)

# A stamp for each set of requirements: installed once, and again when the file changes.
$(VENV)/installed: requirements.txt | $(VENV)/bin/pip
	$(RUN) -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

$(VENV)/bin/pip:
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) is missing: \
	apt install python3 python3-venv, or give another: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too \
	old, 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || { echo "$(PYTHON) cannot make virtual \
	environments: apt install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(DEMO)
