# Two commands do all the set-up: `make demo` and `make test`. They need Python 3.10 or 3.11 and a
# package index (pip's own configuration, e.g. a company mirror, is used); no model hub.
PYTHON ?= $(shell for p in python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV ?= .venv
PY = $(VENV)/bin/python
DEMO = demo

.PHONY: demo test benchmark clean

$(VENV)/.requirements: requirements.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.10 or 3.11 is needed; make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

$(VENV)/.requirements-dev: $(VENV)/.requirements requirements-dev.txt
	$(PY) -m pip install -q -r requirements-dev.txt
	@touch $@

demo: $(VENV)/.requirements
	@rm -rf $(DEMO)
	$(PY) data/init_model.py --output_dir $(DEMO)/tiny_ernie --dataset_dir data
	$(PY) train.py --device cpu --dataset_dir data --model_name $(DEMO)/tiny_ernie \
		--save_dir $(DEMO)/checkpoint --epochs 8 --learning_rate 1e-3 --warmup --warmup_steps 20 \
		--logging_steps 20
	$(PY) analysis/evaluate.py --device cpu --dataset_dir data --params_path $(DEMO)/checkpoint \
		--bad_case_path $(DEMO)/bad_case.txt --json_path $(DEMO)/report.json --skip_train
	$(PY) predict.py --device cpu --dataset_dir data --params_path $(DEMO)/checkpoint \
		--output_file $(DEMO)/output.txt
	@$(PY) data/demo_summary.py $(DEMO)

test: $(VENV)/.requirements-dev
	$(PY) -m pytest

clean:
	rm -rf $(VENV) $(DEMO) log
