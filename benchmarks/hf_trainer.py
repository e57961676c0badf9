"""Seconds of an epoch of Hugging Face Trainer on PyTorch; training_speed.py runs it.

    python benchmarks/hf_trainer.py --dataset_dir data --model_name tiny_ernie --batching grouped

Needs an environment with torch, transformers and accelerate, nothing of Paddle. The settings are
those of Hugging Face's own text-classification example: Trainer's defaults, and every text padded
to max_seq_length. Its users can switch on what --batching and --bf16 name.
"""

import tempfile
import time

import common
import numpy as np
import torch
import transformers

import utils


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder with train.txt and label.txt")
    add("--model_name", required=True, help="folder whose config.json gives the shape")
    add("--batch_size", type=utils.at_least(1), default=32, help="texts per step")
    add("--max_seq_length", type=utils.at_least(3), default=128, help="longest sequence in tokens")
    add(
        "--batching",
        choices=["padded", "dynamic", "grouped"],
        default="padded",
        help="texts are padded to max_seq_length; to the longest of the batch; the same, and texts "
        "of like length share a batch (train_sampling_strategy group_by_length)",
    )
    add("--bf16", action="store_true", help="bfloat16 autocast")
    return parser.parse_args(argv)


class Clock(transformers.TrainerCallback):
    """Seconds from the start of the first step to the end of the last."""

    def on_train_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds = time.perf_counter() - self.start


def main(argv=None):
    args = parse_args(argv)
    labels, (texts, label_ids) = common.read_data(args.dataset_dir, "train.txt")
    encoded, _ = utils.encode(texts, utils.load_tokenizer(args.model_name), args.max_seq_length)
    targets = utils.multi_hot(label_ids, len(labels))
    examples = [{"input_ids": ids, "labels": row} for ids, row in zip(encoded, targets)]
    computed = []  # tokens of each batch, with its padding

    def collate(batch):
        sequences = [torch.tensor(example["input_ids"]) for example in batch]
        input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        if args.batching == "padded":
            room = args.max_seq_length - input_ids.shape[1]
            input_ids = torch.nn.functional.pad(input_ids, (0, room))
        computed.append(input_ids.numel())
        labels = torch.tensor(np.stack([example["labels"] for example in batch]))
        mask = (input_ids != 0).long()
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    config = transformers.AutoConfig.from_pretrained(
        args.model_name, num_labels=len(labels), problem_type="multi_label_classification"
    )
    torch.manual_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        settings = transformers.TrainingArguments(
            output,
            use_cpu=True,
            bf16=args.bf16,
            num_train_epochs=1,
            per_device_train_batch_size=args.batch_size,
            # Takes the lengths from the column input_ids.
            train_sampling_strategy="group_by_length" if args.batching == "grouped" else "random",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        transformers.Trainer(
            model, settings, data_collator=collate, train_dataset=examples, callbacks=[clock]
        ).train()
    common.print_row(
        seconds=clock.seconds,
        samples_per_second=len(texts) / clock.seconds,
        padding=sum(computed) / sum(map(len, encoded)) - 1,
        torch=torch.__version__,
        transformers=transformers.__version__,
        processor=utils.processor(),
    )


if __name__ == "__main__":
    utils.cli(main)
