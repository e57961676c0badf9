"""Fine-tune ERNIE for multi-label classification, evaluate each epoch, keep the best model.

    python train.py --device cpu --dataset_dir data --model_name ernie-3.0-medium-zh --early_stop
    python -m paddle.distributed.launch --nproc_per_node=2 --backend=gloo train.py --device cpu ...

Every random choice is a function of --seed, the epoch and the step, so a run that was stopped at any
moment continues with --resume to bit-identical weights.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes

import argparse
import hashlib
import json
import os
import random
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddlenlp.transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LinearDecayWithWarmup,
)
from safetensors import safe_open
from safetensors.numpy import save as safetensors_bytes
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import metric
import utils
from export_model import build_model, set_weights
from predict import all_reduce, dygraph_forward, set_device
from utils import UserError, logger

MODEL_NAMES = [
    *(f"ernie-3.0-{size}-zh" for size in ("xbase", "base", "medium", "micro", "mini", "nano")),
    "ernie-2.0-base-en",
    "ernie-2.0-large-en",
]
STATE_FILE = "training_state.safetensors"  # everything --resume needs; removed when the run is done
LOG_FILE = "train_log.jsonl"
# Flags that may differ between a stopped run and its continuation: they do not change the weights.
FREE_FLAGS = {"resume", "logging_steps", "save_steps", "visualdl_dir", "save_dir", "dataset_dir"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_dir", required=True, help="folder of the files below")
    data.add_argument("--train_file", default="train.txt", help="training set")
    data.add_argument("--dev_file", default="dev.txt", help="development set")
    data.add_argument("--label_file", default="label.txt", help="label names, one per line")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_name",
        default="ernie-3.0-medium-zh",
        help=f"a local model folder or one of {', '.join(MODEL_NAMES)}",
    )
    model.add_argument("--max_seq_length", type=int, default=128, help="longest token sequence")
    model.add_argument("--dropout", type=float, help="dropout rate (default: the model's own)")
    model.add_argument("--init_from_ckpt", help="model_state.pdparams to start from (weights only)")
    model.add_argument("--save_dir", default="./checkpoint", help="folder of the best model")
    training = parser.add_argument_group("training")
    training.add_argument("--device", default="gpu", help="cpu, gpu, gpu:0, xpu or npu")
    training.add_argument("--batch_size", type=int, default=32, help="texts per device and step")
    training.add_argument("--learning_rate", type=float, default=3e-5, help="peak learning rate")
    training.add_argument("--epochs", type=int, default=10, help="passes over the training set")
    training.add_argument("--early_stop", action="store_true", help="stop when dev stops improving")
    training.add_argument(
        "--early_stop_nums", type=int, default=4, help="epochs without improvement that stop it"
    )
    training.add_argument("--weight_decay", type=float, default=0.0, help="AdamW weight decay")
    training.add_argument(
        "--warmup", action="store_true", help="warm up, then decay linearly to 0 over all epochs"
    )
    training.add_argument("--warmup_steps", type=int, default=0, help="steps of the warm-up")
    training.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="batches per optimizer step"
    )
    training.add_argument(
        "--max_grad_norm", type=float, default=0.0, help="clip the gradients' global norm; 0: off"
    )
    training.add_argument("--amp", action="store_true", help="mixed precision (GPU only)")
    training.add_argument(
        "--batching",
        choices=["sorted", "random"],
        default="sorted",
        help="sorted: texts of like length share a batch, shuffled in windows; random: plain shuffle",
    )
    training.add_argument("--seed", type=int, default=3, help="seed of all randomness")
    run = parser.add_argument_group("run")
    run.add_argument("--resume", action="store_true", help="continue the run stopped in save_dir")
    run.add_argument(
        "--save_steps", type=int, default=0, help="also save the state every N steps; 0: per epoch"
    )
    run.add_argument("--logging_steps", type=int, default=5, help="steps between log lines")
    run.add_argument("--visualdl_dir", help="write VisualDL scalars there")
    return parser.parse_args(argv)


def check_args(args):
    for name in ("batch_size", "epochs", "early_stop_nums", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give at least 1")
    for name in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "save_steps"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: give 0 or more")
    if args.warmup_steps and not args.warmup:
        raise UserError("--warmup_steps needs --warmup")
    if args.amp and args.device.startswith("cpu"):
        raise UserError("--amp needs a GPU; leave it out with --device cpu")
    if args.logging_steps < 1:
        raise UserError("--logging_steps: give at least 1")


# --------------------------------------------------------------------------------------- model
def load_pretrained(name, labels, dropout, work_dir):
    """Returns (model, folder with its tokenizer files) for a local folder or a PaddleNLP name.

    The classifier is new unless a local folder was trained with the very same labels.
    """
    if not Path(name).is_dir():
        if name not in MODEL_NAMES:
            raise UserError(
                f"--model_name {name}: neither a folder nor one of {', '.join(MODEL_NAMES)}"
            )
        try:
            model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(labels))
            AutoTokenizer.from_pretrained(name).save_pretrained(str(work_dir))
        except Exception as error:  # PaddleNLP raises OSError, RuntimeError, requests' errors ...
            raise UserError(
                f"--model_name {name}: cannot be downloaded; without network give a local folder "
                "with config.json, model_state.pdparams and vocab.txt"
            ) from error
        folder = work_dir
    else:
        folder = Path(name)
        model = build_model(folder, len(labels))
        weights_file = folder / utils.WEIGHTS_FILE
        weights = utils.load_weights(weights_file)
        prefix = model.base_model_prefix + "."
        if not any(key.startswith(prefix) for key in weights):  # saved from the bare encoder
            weights = {prefix + key: value for key, value in weights.items()}
        fresh = {k: v.numpy() for k, v in model.state_dict().items()}
        names = utils.read_json(folder / utils.CONFIG_FILE).get("id2label", {})
        same_labels = list(names.values()) == labels
        kept = {k: v for k, v in weights.items() if k in fresh and k.startswith(prefix)}
        head = {k: v for k, v in fresh.items() if not k.startswith(prefix)}
        if same_labels:
            head.update({k: weights[k] for k in head if k in weights})
        set_weights(model, {**kept, **head}, weights_file)
    if dropout is not None:
        for layer in model.sublayers(include_self=True):
            if isinstance(layer, paddle.nn.Dropout):
                layer.p = dropout
            elif isinstance(layer, paddle.nn.MultiHeadAttention):
                layer.dropout = dropout
        model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = dropout
    return model, folder


def save_model(save_dir, model, tokenizer_dir):
    """The checkpoint: weights, tokenizer and config.json with labels and sequence length."""
    with utils.atomic_folder(save_dir) as folder:
        with open(folder / utils.WEIGHTS_FILE, "wb") as file:
            utils.save_weights(file, {k: v.numpy() for k, v in model.state_dict().items()})
        model.config.save_pretrained(str(folder))
        for name in utils.TOKENIZER_FILES:
            if (tokenizer_dir / name).exists():
                (folder / name).write_bytes((tokenizer_dir / name).read_bytes())
        if not (folder / "tokenizer_config.json").exists():  # PaddleNLP needs it to load the folder
            config = {"tokenizer_class": "ErnieTokenizer", "do_lower_case": True}
            (folder / "tokenizer_config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------------------ evaluation
def evaluate(model, encoded, label_ids, num_labels, batch_size):
    """Dev figures; the ranks share the batches, and the result does not depend on their number.

    Returns {"loss", "micro_f1", "macro_f1"}; loss is the mean over all texts and labels.
    """
    model.eval()
    counts = metric.MultiLabelCounts(num_labels)
    losses = np.zeros(-(-len(encoded) // batch_size), dtype=np.float64)
    for number, index, logits in utils.run_batches(
        dygraph_forward(model), encoded, batch_size, dist.get_rank(), dist.get_world_size()
    ):
        targets = utils.multi_hot([label_ids[i] for i in index], num_labels)
        counts.update(metric.decode(metric.probabilities(logits)), targets)
        losses[number] = metric.bce_sum(logits, targets)
    model.train()
    counts = metric.MultiLabelCounts.from_array(all_reduce(counts.to_array()))
    loss = float(all_reduce(losses).sum()) / (len(encoded) * num_labels)
    return {"loss": loss, "micro_f1": counts.micro_f1, "macro_f1": counts.macro_f1}


# ------------------------------------------------------------------------------- training state
class Progress:
    """Where a run is: plain values that go into the training state as JSON."""

    def __init__(self, num_labels):
        self.epoch = 0  # finished epochs
        self.batch = 0  # finished optimizer steps of the running epoch
        self.global_step = 0
        self.best_macro_f1 = -1.0  # so that the first evaluation is always an improvement
        self.best_loss = float("inf")
        self.stale_epochs = 0  # evaluations since the last improvement
        self.log_size = 0  # bytes of train_log.jsonl that belong to this state
        self.train_counts = metric.MultiLabelCounts(num_labels).to_array().tolist()

    def improved(self, result):
        """Higher macro F1 is better; while it is still 0, lower dev loss is."""
        if result["macro_f1"] == self.best_macro_f1 == 0:
            return result["loss"] < self.best_loss
        return result["macro_f1"] > self.best_macro_f1


def fingerprint(args, world_size):
    """What a run's weights depend on: flags and the content of the data files."""
    flags = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
    for key in ("train_file", "dev_file", "label_file"):
        path = Path(args.dataset_dir) / flags[key]
        flags[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {**flags, "world_size": world_size}


def _accumulator_names(model, optimizer_state):
    """{key in the optimizer state: stable key}; Paddle's own keys count the layers of the process."""
    names = {}
    for structured, parameter in model.state_dict().items():
        for key in optimizer_state:
            if key.startswith(parameter.name + "_"):
                names[key] = f"optimizer/{structured}/{key[len(parameter.name) + 1 :]}"
    return names


def save_state(path, model, optimizer, progress, run, scaler):
    state = optimizer.state_dict()
    names = _accumulator_names(model, state)
    tensors = {f"model/{k}": v.numpy() for k, v in model.state_dict().items()}
    tensors.update({names[k]: v.numpy() for k, v in state.items() if k in names})
    meta = {"progress": vars(progress), "run": run, "scheduler": state.get("LR_Scheduler")}
    if scaler is not None:
        meta["scaler"] = {
            k: v.item() if hasattr(v, "item") else v for k, v in scaler.state_dict().items()
        }
    with utils.atomic_file(path, "wb") as file:
        file.write(safetensors_bytes(tensors, metadata={"state": json.dumps(meta)}))


def load_state(path, model, optimizer, progress, run, scaler):
    """Restores all that save_state wrote; raises UserError if it is of another run."""
    try:
        with safe_open(str(path), framework="np") as file:
            meta = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise UserError(
            f"{path}: broken training state ({error}); train without --resume"
        ) from error
    changed = [k for k in run if meta["run"].get(k) != run[k]]
    if changed:
        raise UserError(
            f"--resume: {', '.join(changed)} differ(s) from the stopped run's; use the same flags and "
            "data, or start anew in another --save_dir"
        )
    weights = {k[len("model/") :]: v for k, v in tensors.items() if k.startswith("model/")}
    set_weights(model, weights, path)
    restored = {} if meta["scheduler"] is None else {"LR_Scheduler": meta["scheduler"]}
    parameters = model.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, structured, kind = key.split("/")
            restored[f"{parameters[structured].name}_{kind}"] = paddle.to_tensor(value)
    optimizer.set_state_dict(restored)
    if scaler is not None:
        scaler.load_state_dict(meta["scaler"])
    vars(progress).update(meta["progress"])


# ------------------------------------------------------------------------------------------ logs
class TrainLog:
    """train_log.jsonl, VisualDL scalars and the curves; only rank 0 writes."""

    def __init__(self, args, progress, active):
        self.path = Path(args.save_dir) / LOG_FILE
        self.file = self.visualdl = None
        if active:
            self.path.touch()
            os.truncate(self.path, progress.log_size)  # what a killed run logged after its state
            self.file = open(self.path, "a", encoding="utf-8")
            if args.visualdl_dir:
                from visualdl import LogWriter

                self.visualdl = LogWriter(logdir=args.visualdl_dir)

    def write(self, event, step, **values):
        if self.file is None:
            return
        self.file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self.file.flush()
        if self.visualdl is not None:
            for name, value in values.items():
                self.visualdl.add_scalar(tag=f"{event}/{name}", step=step, value=value)

    def size(self):
        return self.file.tell() if self.file else 0

    def plot(self):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        records = [json.loads(line) for line in open(self.path, encoding="utf-8")]
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
        for axis, event, name in (
            (axes[0], "train", "loss"),
            (axes[0], "eval", "loss"),
            (axes[1], "eval", "micro_f1"),
            (axes[1], "eval", "macro_f1"),
        ):
            points = [(r["step"], r[name]) for r in records if r["event"] == event]
            axis.plot(*zip(*points), marker="." if event == "eval" else "", label=f"{event} {name}")
        for axis in axes:
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            axis.legend()
        figure.tight_layout()
        with utils.atomic_file(self.path.with_name("train_curves.png"), "wb") as file:
            figure.savefig(file, format="png", dpi=100)
        pyplot.close(figure)


# --------------------------------------------------------------------------------------- training
def step_seed(*numbers):
    """A seed that is a function of --seed and the position in the run: no generator to save."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def train(args, run, model, labels, train_set, dev_set, tokenizer_dir):
    """Trains and leaves the best model in args.save_dir. Returns the best Progress."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    (train_ids, train_labels), (dev_ids, dev_labels) = train_set, dev_set
    save_dir, state_path = Path(args.save_dir), Path(args.save_dir) / STATE_FILE
    lengths = [len(ids) for ids in train_ids]
    batches_per_epoch = -(-(-(-len(lengths) // args.batch_size)) // world_size)
    steps_per_epoch = -(-batches_per_epoch // args.gradient_accumulation_steps)

    learning_rate = args.learning_rate
    if args.warmup:
        learning_rate = LinearDecayWithWarmup(
            learning_rate, steps_per_epoch * args.epochs, args.warmup_steps
        )
    decayed = {
        p.name for n, p in model.named_parameters() if not any(s in n for s in ("bias", "norm"))
    }
    clip = paddle.nn.ClipGradByGlobalNorm(args.max_grad_norm) if args.max_grad_norm else None
    optimizer = paddle.optimizer.AdamW(
        learning_rate=learning_rate,
        parameters=model.parameters(),
        weight_decay=args.weight_decay,
        apply_decay_param_fun=lambda name: name in decayed,
        grad_clip=clip,
    )
    scaler = paddle.amp.GradScaler() if args.amp else None
    progress = Progress(len(labels))
    if args.resume and state_path.exists():
        load_state(state_path, model, optimizer, progress, run, scaler)
        logger.info("Resume after epoch %d, step %d", progress.epoch, progress.global_step)
    parallel = paddle.DataParallel(model) if world_size > 1 else model
    log = TrainLog(args, progress, active=rank == 0)

    def checkpoint_state():
        if rank == 0:
            progress.log_size = log.size()
            save_state(state_path, model, optimizer, progress, run, scaler)

    def train_step(group, counts):
        """One optimizer step over the batches in `group`; returns their mean loss."""
        losses = []
        for position, index in enumerate(group):
            micro_batch = progress.global_step * args.gradient_accumulation_steps + position
            paddle.seed(step_seed(args.seed, micro_batch, rank))
            batch = utils.pad([train_ids[i] for i in index])
            targets = utils.multi_hot([train_labels[i] for i in index], len(labels))
            with paddle.amp.auto_cast(enable=args.amp):
                logits = parallel(**{k: paddle.to_tensor(v) for k, v in batch.items()})
                loss = F.binary_cross_entropy_with_logits(logits, paddle.to_tensor(targets))
            share = loss / len(group)
            synced = world_size == 1 or position == len(group) - 1
            with nullcontext() if synced else parallel.no_sync():
                (scaler.scale(share) if scaler else share).backward()
            losses.append((loss.detach(), logits.detach(), targets))
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.clear_grad()
        if args.warmup:
            optimizer._learning_rate.step()
        for _, logits, targets in losses:
            probs = metric.probabilities(logits.astype("float32").numpy())
            counts.update(metric.decode(probs), targets)
        return float(np.mean([float(loss) for loss, _, _ in losses]))

    model.train()
    while progress.epoch < args.epochs:
        if args.early_stop and progress.stale_epochs >= args.early_stop_nums:
            logger.info("Early stop!")
            break
        epoch = progress.epoch + 1
        rng = np.random.default_rng([args.seed, epoch])
        order = utils.batches(lengths, args.batch_size, rng, args.batching, group=world_size)
        mine = order[rank::world_size]
        groups = list(utils.chunks(mine, args.gradient_accumulation_steps))
        counts = metric.MultiLabelCounts.from_array(np.array(progress.train_counts))
        since, logged = time.time(), progress.global_step
        bar = tqdm(
            groups,
            desc=f"epoch {epoch}",
            initial=progress.batch,
            disable=True if rank else None,
            leave=False,
        )
        for group in groups[progress.batch :]:
            loss = train_step(group, counts)
            progress.batch += 1
            progress.global_step += 1
            bar.update()
            if progress.global_step % args.logging_steps == 0 and rank == 0:
                speed = (progress.global_step - logged) / (time.time() - since)
                since, logged = time.time(), progress.global_step
                logger.info(
                    "global step %d, epoch: %d, batch: %d, loss: %.5f, "
                    "micro f1 score: %.5f, macro f1 score: %.5f, speed: %.2f step/s",
                    *(progress.global_step, epoch, progress.batch, loss),
                    *(counts.micro_f1, counts.macro_f1, speed),
                )
                log.write(
                    "train",
                    progress.global_step,
                    epoch=epoch,
                    loss=loss,
                    lr=optimizer.get_lr(),
                    micro_f1=counts.micro_f1,
                    macro_f1=counts.macro_f1,
                )
            if args.save_steps and progress.global_step % args.save_steps == 0:
                progress.train_counts = counts.to_array().tolist()
                checkpoint_state()
        bar.close()
        result = evaluate(model, dev_ids, dev_labels, len(labels), args.batch_size)
        logger.info(
            "eval loss: %.5f, micro f1 score: %.5f, macro f1 score: %.5f",
            *(result["loss"], result["micro_f1"], result["macro_f1"]),
        )
        log.write("eval", progress.global_step, epoch=epoch, **result)
        progress.stale_epochs += 1
        if progress.improved(result):
            progress.stale_epochs = 0
            progress.best_macro_f1, progress.best_loss = result["macro_f1"], result["loss"]
            if rank == 0:
                save_model(save_dir, model, tokenizer_dir)
        logger.info("Current best macro f1 score: %.5f", progress.best_macro_f1)
        progress.epoch, progress.batch = epoch, 0
        progress.train_counts = metric.MultiLabelCounts(len(labels)).to_array().tolist()
        checkpoint_state()
    if rank == 0:
        log.write("end", progress.global_step, best_macro_f1=progress.best_macro_f1)
        log.plot()
        state_path.unlink(missing_ok=True)
    logger.info("Final best macro f1 score: %.5f", progress.best_macro_f1)
    logger.info("Save best macro f1 text classification model in %s", args.save_dir)


def main(argv=None):
    args = parse_args(argv)
    check_args(args)
    set_device(args.device)
    if dist.get_world_size() > 1:
        dist.init_parallel_env()
    rank = dist.get_rank()
    if rank:
        logger.setLevel("WARNING")  # every rank would say the same
    data, save_dir = Path(args.dataset_dir), Path(args.save_dir)
    labels = utils.read_labels(data / args.label_file)
    train_texts, train_labels = utils.read_examples(data / args.train_file, labels)
    dev_texts, dev_labels = utils.read_examples(data / args.dev_file, labels)
    run = fingerprint(args, dist.get_world_size())
    if finished(args, save_dir):
        return

    random.seed(args.seed)
    np.random.seed(args.seed)
    paddle.seed(args.seed)
    save_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work_dir, logging_redirect_tqdm([logger]):
        model, tokenizer_dir = load_pretrained(
            args.model_name, labels, args.dropout, Path(work_dir)
        )
        utils.check_length(args.max_seq_length, model.config.max_position_embeddings)
        if args.init_from_ckpt:
            set_weights(model, utils.load_weights(args.init_from_ckpt), args.init_from_ckpt)
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: i for i, name in enumerate(labels)}
        model.config.max_seq_length = args.max_seq_length
        model.config.thresholds = None
        tokenizer = utils.load_tokenizer(tokenizer_dir)
        train_ids, cut = utils.encode(train_texts, tokenizer, args.max_seq_length)
        dev_ids, dev_cut = utils.encode(dev_texts, tokenizer, args.max_seq_length)
        utils.warn_truncated(cut + dev_cut, len(train_ids) + len(dev_ids), args.max_seq_length)
        logger.info(
            "Train dataset: %d texts, %d tokens; dev dataset: %d texts, %d tokens; %d labels",
            *(len(train_ids), sum(map(len, train_ids)), len(dev_ids), sum(map(len, dev_ids))),
            len(labels),
        )
        train(
            args,
            run,
            model,
            labels,
            (train_ids, train_labels),
            (dev_ids, dev_labels),
            tokenizer_dir,
        )


def finished(args, save_dir):
    """True if --resume finds a finished run; an unfinished one is not silently overwritten."""
    state, log = save_dir / STATE_FILE, save_dir / LOG_FILE
    if state.exists() and not args.resume:
        raise UserError(
            f"{state}: a stopped run; continue it with --resume, or remove the file to start anew"
        )
    if args.resume and not state.exists() and log.exists():
        lines = log.read_text(encoding="utf-8").splitlines()
        if lines and json.loads(lines[-1]).get("event") == "end":
            logger.info("%s holds a finished run; nothing to resume", save_dir)
            return True
    return False


if __name__ == "__main__":
    utils.cli(main)
