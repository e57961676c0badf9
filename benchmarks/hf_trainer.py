"""Samples per second of Hugging Face Trainer on PyTorch; training_speed.py runs it.

    python benchmarks/hf_trainer.py --dataset_dir data --model_name tiny_ernie --steps 100

Needs an environment with torch, transformers and accelerate, nothing of ours but utils.py. The
settings are those of Hugging Face's own text-classification example: Trainer's defaults, and every
text padded to max_seq_length (its `--pad_to_max_length` is on unless switched off).
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder with train.txt and label.txt")
    add("--model_name", required=True, help="folder whose config.json gives the shape")
    add("--steps", type=int, required=True, help="optimizer steps")
    add("--batch_size", type=int, default=32, help="texts per step")
    add("--max_seq_length", type=int, default=128, help="every text is padded to it")
    return parser.parse_args(argv)


class Clock(transformers.TrainerCallback):
    """Remembers when each step ended."""

    def __init__(self):
        self.times = []

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())


def main(argv=None):
    args = parse_args(argv)
    data, folder = Path(args.dataset_dir), Path(args.model_name)
    labels = utils.read_labels(data / "label.txt")
    texts, label_ids = utils.read_examples(data / "train.txt", labels)
    encoded, _ = utils.encode(texts, utils.load_tokenizer(folder), args.max_seq_length)
    targets = utils.multi_hot(label_ids, len(labels))
    examples = []
    for ids, target in zip(encoded, targets):
        padding = [0] * (args.max_seq_length - len(ids))
        mask = [1] * len(ids) + padding
        examples.append({"input_ids": [*ids, *padding], "attention_mask": mask, "labels": target})
    config = transformers.AutoConfig.from_pretrained(
        folder, num_labels=len(labels), problem_type="multi_label_classification"
    )
    torch.manual_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        settings = transformers.TrainingArguments(
            output_dir=output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        transformers.Trainer(model, settings, train_dataset=examples, callbacks=[clock]).train()
    speed = (args.steps - 1) * args.batch_size / (clock.times[-1] - clock.times[0])
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    print(json.dumps({"samples_per_second": speed, **versions}))


if __name__ == "__main__":
    main()
