"""Samples per second of Hugging Face Trainer on PyTorch; training_speed.py runs it.

    python benchmarks/hf_trainer.py --dataset_dir data --model_name tiny_ernie --steps 100

Needs an environment with torch, transformers and accelerate, nothing of Paddle. The settings are
those of Hugging Face's own text-classification example: Trainer's defaults, and every text padded
to max_seq_length (its `--pad_to_max_length` is on unless switched off).
"""

import tempfile
import time

import common
import torch
import transformers

import utils


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder with train.txt and label.txt")
    add("--model_name", required=True, help="folder whose config.json gives the shape")
    add("--steps", type=utils.at_least(2), required=True, help="optimizer steps")
    add("--batch_size", type=utils.at_least(1), default=32, help="texts per step")
    add("--max_seq_length", type=utils.at_least(3), default=128, help="every text is padded to it")
    return parser.parse_args(argv)


class Clock(transformers.TrainerCallback):
    """Remembers when each step ended."""

    def __init__(self):
        self.times = []

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())


def main(argv=None):
    args = parse_args(argv)
    labels, (texts, label_ids) = common.read_data(args.dataset_dir, "train.txt")
    encoded, _ = utils.encode(texts, utils.load_tokenizer(args.model_name), args.max_seq_length)
    targets = utils.multi_hot(label_ids, len(labels))
    examples = []
    for ids, target in zip(encoded, targets):
        padding = [0] * (args.max_seq_length - len(ids))
        mask = [1] * len(ids) + padding
        examples.append({"input_ids": [*ids, *padding], "attention_mask": mask, "labels": target})
    config = transformers.AutoConfig.from_pretrained(
        args.model_name, num_labels=len(labels), problem_type="multi_label_classification"
    )
    torch.manual_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
        size = {"max_steps": args.steps, "per_device_train_batch_size": args.batch_size}
        settings = transformers.TrainingArguments(output, use_cpu=True, **size, **quiet)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        transformers.Trainer(model, settings, train_dataset=examples, callbacks=[clock]).train()
    common.print_row(
        samples_per_second=(args.steps - 1) * args.batch_size / (clock.times[-1] - clock.times[0]),
        torch=torch.__version__,
        transformers=transformers.__version__,
        processor=common.processor(),
    )


if __name__ == "__main__":
    utils.cli(main)
