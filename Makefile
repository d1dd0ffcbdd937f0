# make demo   train, distil and evaluate on the digits data set, from nothing
# make test   check the code and run all tests
# make results  measure the tables of results/ that have a target below anew, or go on where that
#               was stopped. The cost of those for a CPU is in results/README.md; densenet and
#               resnet18 need a GPU
# make clean  remove the virtual environment and what the demo made

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := demo
# A process for each core; tests of one file share what they need.
PYTEST_FLAGS ?= --numprocesses auto --dist loadfile
# Small enough for a laptop's processor: a teacher of three layers, two seeds.
DEMO_FLAGS := --dataset digits --model simple_dense --epochs 20 --batch_size 64 --trials 2 \
	--output_dir $(DEMO)/runs

.PHONY: demo test results clean
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

# The targets below leave their networks in runs/<table> and their tables in results.
LR_TABLES := mnist-simple-dense-lr fashionmnist-simple-dense-lr
TABLES := gaussians $(LR_TABLES) students densenet-8-epochs densenet resnet18
.PHONY: $(TABLES)
results: $(TABLES)
	$(RUN) results/parity.py

SEEDS := 0 1 2
STUDY = $(RUN) Hyperparameter-study.py --seeds $(SEEDS)
EVALUATE := $(RUN) Models-evaluation.py --compare --plots --bootstrap 1000
FASHION := --dataset fashionmnist
GARMENTS := --tsne_classes Shirt Pullover Sneaker
ILS_README := vanilla label-smoothing instance-based "instance-based --variant scores"

gaussians: $(VENV)/installed
	$(RUN) Synthetic-study.py --output_dir results/gaussians

# The LR paper's protocol; both selections are from the same trainings.
fashionmnist-simple-dense-lr: CLASSES := $(GARMENTS)
mnist-simple-dense-lr: SEEDS := 0 1 2 3
fashionmnist-simple-dense-lr: SEEDS := 0 1 2 3 4 5 6 7
$(LR_TABLES): %-simple-dense-lr: $(VENV)/installed-dev
	for by in accuracy ece; do \
	  $(STUDY) --dataset $* --model simple_dense --params published --select_by $$by \
	    --methods vanilla label-smoothing label-relaxation focal confidence-penalty \
	    --keep_candidates runs/simple-dense-lr/kept --output_dir runs/simple-dense-lr/$$by && \
	  $(EVALUATE) runs/simple-dense-lr/$$by/$* --ece_bins 15 $(CLASSES) \
	    --output_dir results/$@/$$by || exit; \
	done

# Students of four methods, at three temperatures of distillation.
TEACHERS := Vanilla-cross-entropy Label-smoothing Instance-based-smoothing Label-relaxation
students: $(VENV)/installed
	for script in $(TEACHERS); do \
	  $(RUN) $$script.py $(FASHION) --model simple_dense --epochs 20 --batch_size 128 \
	    --trials 3 --output_dir runs/students || exit; \
	done
	for T in 1 4 20; do \
	  $(RUN) Network-distillation.py --teacher runs/students/fashionmnist/simple_dense \
	    --student lenet --scale_teacher no --temperature $$T --epochs 30 \
	    --output_dir runs/students-T$$T || exit; \
	done
	$(EVALUATE) runs/students/fashionmnist runs/students-T1 runs/students-T4 runs/students-T20 \
	  $(GARMENTS) --output_dir results/fashionmnist-students

# The ILS README's Fashion-MNIST row within 8 epochs, ε untuned: what a CPU can do of it.
EPOCHS_8 := runs/densenet-8-epochs
EPOCHS_8_FLAGS := $(FASHION) --model densenet --epochs 8 --schedule cosine --batch_size 64 \
	--trials 3 --output_dir $(EPOCHS_8)
densenet-8-epochs: $(VENV)/installed
	$(RUN) Vanilla-cross-entropy.py $(EPOCHS_8_FLAGS)
	$(RUN) Label-smoothing.py $(EPOCHS_8_FLAGS) --smoothing 0.05
	for variant in scores ils2; do \
	  $(RUN) Instance-based-smoothing.py $(EPOCHS_8_FLAGS) --smoothing 0.05 --variant $$variant || exit; \
	done
	$(RUN) Network-distillation.py --teacher $(EPOCHS_8)/fashionmnist/densenet --epochs 30 \
	  --schedule cosine --output_dir $(EPOCHS_8)
	$(EVALUATE) $(EPOCHS_8)/fashionmnist $(GARMENTS) --output_dir results/fashionmnist-$@

# The whole row and its like; these two need a GPU.
densenet: $(VENV)/installed-dev
	$(STUDY) $(FASHION) --model densenet --device cuda --methods $(ILS_README) \
	  --distil shallownet --output_dir runs/densenet
	$(EVALUATE) runs/densenet/fashionmnist $(GARMENTS) --output_dir results/fashionmnist-densenet

resnet18: $(VENV)/installed-dev
	$(STUDY) $(FASHION) --model resnet18 --device cuda --output_dir runs/resnet18
	$(EVALUATE) runs/resnet18/fashionmnist $(GARMENTS) --output_dir results/fashionmnist-resnet18

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
