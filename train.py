"""Fine-tune ERNIE for multi-label classification, evaluate each epoch, keep the best model.

    python train.py --device cpu --dataset_dir data --model_name ernie-3.0-medium-zh --early_stop
    python -m paddle.distributed.launch --nproc_per_node=2 --backend=gloo train.py --device cpu ...

Every random choice is a function of --seed, the epoch and the step, so a run that was stopped at
any moment continues with --resume to bit-identical weights.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddlenlp import transformers
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import metric
import utils
from export_model import MODEL_NAMES, dygraph_forward, load_pretrained, set_device, set_weights
from predict import all_reduce
from utils import UserError, at_least, logger

STATE_FILE = "training_state.pdparams"  # everything --resume needs; removed when the run is done
LOG_FILE = "train_log.jsonl"
# How the log names what --metric_for_best can be.
BEST = {"macro_f1": "macro f1", "micro_f1": "micro f1", "loss": "loss"}
FOCAL_GAMMA = 2.0  # Lin et al. 2017, section 5
ASL_GAMMA, ASL_MARGIN = 4.0, 0.05  # of the negatives; 0 of the positives; Ridnik et al. 2021, 3.3
# Flags that may differ between a stopped run and its continuation: they do not change the weights.
FREE_FLAGS = {"resume", "logging_steps", "save_steps", "visualdl_dir", "save_dir", "dataset_dir"}


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset_dir", required=True, help="folder of the files below")
    add("--train_file", default="train.txt", help="training set")
    add("--dev_file", default="dev.txt", help="development set")
    add("--label_file", default="label.txt", help="label names, one per line")
    add = parser.add_argument_group("model").add_argument
    names = ", ".join(MODEL_NAMES)
    local = "a local folder in PaddleNLP's or Hugging Face's (safetensors) format,"
    add("--model_name", default="ernie-3.0-medium-zh", help=f"{local} or {names}")
    add("--max_seq_length", type=at_least(3), default=128, help="longest sequence in tokens")
    add("--dropout", type=at_least(0.0), help="dropout rate; None: the model's own")
    add("--init_from_ckpt", help="model_state.pdparams to start from; weights only")
    add("--save_dir", default="./checkpoint", help="folder of the best model")
    add = parser.add_argument_group("training").add_argument
    add("--device", type=str.lower, default="gpu", help="cpu, gpu, gpu:0, xpu or npu")
    add("--batch_size", type=at_least(1), default=32, help="texts per device and batch")
    add("--learning_rate", type=at_least(0.0), default=3e-5, help="peak learning rate")
    add("--epochs", type=at_least(1), default=10, help="passes over the training set")
    add("--early_stop", action="store_true", help="stop when dev no longer improves")
    add("--early_stop_nums", type=at_least(1), default=4, help="epochs without improvement to stop")
    add("--weight_decay", type=at_least(0.0), default=0.0, help="AdamW weight decay")
    add("--warmup", action="store_true", help="warm up, then decay linearly to 0")
    add("--warmup_steps", type=at_least(0), default=0, help="steps of the warm-up")
    add("--gradient_accumulation_steps", type=at_least(1), default=1, help="batches per step")
    add("--max_grad_norm", type=at_least(0.0), default=0.0, help="clip gradients to it; 0: off")
    add("--amp", action="store_true", help="mixed precision (GPU only)")
    batching = "sorted: texts of like length share a batch; random: plain shuffle"
    losses = "bce: cross-entropy; focal, asl: less weight on labels that are easy"
    add("--loss", choices=["bce", "focal", "asl"], default="bce", help=losses)
    weight = "auto: a label's positives count sqrt(negatives / positives) times"
    add("--pos_weight", choices=["none", "auto"], default="none", help=weight)
    best = "dev figure that decides which epoch is the best"
    add("--metric_for_best", choices=list(BEST), default="macro_f1", help=best)
    add("--batching", choices=["sorted", "random"], default="sorted", help=batching)
    add("--seed", type=at_least(0), default=3, help="seed of all randomness")
    add = parser.add_argument_group("run").add_argument
    add("--resume", action="store_true", help="continue the run that was stopped in save_dir")
    add("--save_steps", type=at_least(0), default=0, help="save the state every N steps, too")
    add("--logging_steps", type=at_least(1), default=5, help="steps between log lines")
    add("--visualdl_dir", help="write VisualDL scalars there")
    args = parser.parse_args(argv)
    if args.warmup_steps and not args.warmup:
        raise UserError("--warmup_steps needs --warmup")
    if args.dropout is not None and args.dropout >= 1:
        raise UserError(f"--dropout {args.dropout}: a rate is at least 0 and below 1")
    if args.amp and args.device == "cpu":
        raise UserError("--amp needs a GPU; leave it out with --device cpu")
    return args


# --------------------------------------------------------------------------------------- model
def set_dropout(model, rate):
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, paddle.nn.Dropout):
            layer.p = rate
        elif isinstance(layer, paddle.nn.MultiHeadAttention):
            layer.dropout = rate
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = rate


def save_model(save_dir, model, tokenizer_dir):
    """The checkpoint: weights, tokenizer and config.json with labels and sequence length."""
    with utils.atomic_folder(save_dir) as folder:
        with open(folder / utils.WEIGHTS_FILE, "wb") as file:
            utils.save_weights(file, {k: v.numpy() for k, v in model.state_dict().items()})
        model.config.save_pretrained(str(folder))
        utils.copy_tokenizer(tokenizer_dir, folder)


# ------------------------------------------------------------------------------------ evaluation
def evaluate(model, encoded, label_ids, num_labels, batch_size):
    """Dev figures; the ranks share the batches, and the result does not depend on their number.

    Returns {"loss", "micro_f1", "macro_f1"}; loss is the mean over all texts and labels.
    """
    model.eval()
    counts = metric.MultiLabelCounts(num_labels)
    losses = np.zeros(-(-len(encoded) // batch_size), dtype=np.float64)
    forward, rank, world_size = dygraph_forward(model), dist.get_rank(), dist.get_world_size()
    for number, index, logits in utils.run_batches(forward, encoded, batch_size, rank, world_size):
        targets = utils.multi_hot([label_ids[i] for i in index], num_labels)
        counts.update(metric.decode(metric.probabilities(logits)), targets)
        losses[number] = metric.bce_sum(logits, targets)
    model.train()
    counts = metric.MultiLabelCounts.from_array(all_reduce(counts.to_array()))
    loss = float(all_reduce(losses).sum()) / (len(encoded) * num_labels)
    return {"loss": loss, "micro_f1": counts.micro_f1, "macro_f1": counts.macro_f1}


# ------------------------------------------------------------------------------- training state
def decided_by_rank_0(function, *args):
    """Rank 0's result for all ranks; its UserError is raised by all, so that none waits for it."""
    result = error = None
    if dist.get_rank() == 0:
        try:
            result = function(*args)
        except UserError as found:
            error = str(found)
    if dist.get_world_size() > 1:
        shared = [(result, error)]
        dist.broadcast_object_list(shared, src=0)
        result, error = shared[0]
    if error:
        raise UserError(error)
    return result


def fingerprint(args):
    """What a run's weights depend on: flags, number of ranks and the content of the data files."""
    flags = {key: value for key, value in vars(args).items() if key not in FREE_FLAGS}
    for key in ("train_file", "dev_file", "label_file"):
        content = (Path(args.dataset_dir) / flags[key]).read_bytes()
        flags[key] = hashlib.sha256(content).hexdigest()
    return {**flags, "number of processes": dist.get_world_size()}


def check_identity(identity, expected, hint):
    changed = [key for key in identity if expected.get(key) != identity[key]]
    if changed:
        raise UserError(f"{', '.join(changed)} {hint}")


def save_state(path, identity, progress, model, optimizer, scaler):
    """One file with all that a run needs to go on, in the format of the weights."""
    state, scale = optimizer.state_dict(), scaler.state_dict()
    meta = {"identity": identity, "progress": vars(progress), "lr": state.get("LR_Scheduler")}
    meta["scaler"] = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in scale.items()}
    arrays = {"meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)}
    # Paddle names parameters by counting the layers of the process; the model's names are stable.
    for name, parameter in model.state_dict().items():
        arrays[f"model/{name}"] = parameter.numpy()
        for key in state:
            if key.startswith(parameter.name + "_"):
                arrays[f"optimizer/{name}/{key[len(parameter.name) :]}"] = state[key].numpy()
    with utils.atomic_file(path, "wb") as file:
        utils.save_weights(file, arrays)


def load_state(path, identity, progress, model, optimizer, scaler):
    """Restores what save_state wrote. Rank 0 reads it for all: other machines need no copy.

    Returns False if nothing was saved yet; raises UserError if the state is of another run.
    """
    arrays = decided_by_rank_0(lambda: utils.load_weights(path) if path.exists() else None)
    if arrays is None:
        return False
    try:
        meta = json.loads(arrays.pop("meta").tobytes())
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: broken state; start anew in another --save_dir") from error
    hint = "changed since the run was stopped; use the same, or start anew in another --save_dir"
    check_identity(identity, meta["identity"], hint)
    own, weights = model.state_dict(), {}
    restored = {"LR_Scheduler": meta["lr"]} if meta["lr"] else {}
    for key, value in arrays.items():
        kind, name, *accumulator = key.split("/")
        if kind == "model":
            weights[name] = value
        else:
            restored[own[name].name + accumulator[0]] = paddle.to_tensor(value)
    set_weights(model, weights, path)
    optimizer.set_state_dict(restored)
    scaler.load_state_dict(meta["scaler"])
    vars(progress).update(meta["progress"])
    logger.info("Resume after step %d (epoch %d)", progress.global_step, progress.epoch + 1)
    return True


def is_finished(args):
    """True if --resume finds a finished run; a stopped one is not silently overwritten."""
    state, log = Path(args.save_dir) / STATE_FILE, Path(args.save_dir) / LOG_FILE
    if state.exists() and not args.resume:
        raise UserError(f"{state}: a stopped run; add --resume, or remove it to start anew")
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    if state.exists() or not lines or '"event": "end"' not in lines[-1]:
        return False
    if not args.resume:
        logger.warning("%s holds a finished run, which this one will replace", args.save_dir)
        return False
    hint = "changed since the run was finished; train in another --save_dir"
    check_identity(fingerprint(args), json.loads(lines[0])["flags"], hint)
    logger.info("%s holds a finished run; nothing to resume", args.save_dir)
    return True


# ------------------------------------------------------------------------------------------ logs
class TrainLog:
    """train_log.jsonl (flags, then an object per log or evaluation), VisualDL; rank 0 writes."""

    def __init__(self, path, size, flags, visualdl_dir):
        self.path, self.writer = path, None
        path.touch()
        os.truncate(path, min(size, path.stat().st_size))  # a killed run may have logged more
        self.file = open(path, "a", encoding="utf-8")
        if visualdl_dir:
            from visualdl import LogWriter  # takes seconds to import

            self.writer = LogWriter(logdir=visualdl_dir)
        if size == 0:
            self.file.write(json.dumps({"event": "start", "step": 0, "flags": flags}) + "\n")

    def write(self, event, step, **values):
        self.file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(tag=f"{event}/{name}", step=step, value=value)

    def sync(self):
        """Makes what was written durable; returns the size."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def plot(self, path):
        """The curves of loss and F1 as a PNG."""
        from matplotlib.figure import Figure  # takes a second to import

        records = [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]
        figure = Figure(figsize=(11, 4), layout="tight")
        axes = figure.subplots(1, 2)
        curves = (0, "train", "loss"), (0, "eval", "loss"), (1, "eval", "micro_f1")
        for column, event, name in (*curves, (1, "eval", "macro_f1")):
            points = [(r["step"], r[name]) for r in records if r["event"] == event]
            marker = "." if event == "eval" else ""
            axes[column].plot(*zip(*points or [(0, 0)]), marker=marker, label=f"{event} {name}")
            axes[column].set_xlabel("step")
            axes[column].legend()
        with utils.atomic_file(path, "wb") as file:
            figure.savefig(file, format="png")


@contextmanager
def lost_worker_message(save_dir):
    """Says what happened if this process of a launch dies, maybe without a Python exception.

    When a worker is lost, gloo ends the others with abort(); a child process notices and speaks.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.close(writing)
        if not os.read(reading, 1):  # the pipe was closed without a word
            message = (
                f"error: worker {dist.get_rank()} ended early: a worker was lost or the launch was "
                f"stopped; run the same command with --resume to continue from {save_dir}\n"
            )
            os.write(2, message.encode())
        os._exit(0)
    os.close(reading)
    word = b""
    try:
        yield
        word = b"1"
    except (UserError, OSError, KeyboardInterrupt):  # `cli` speaks of these
        word = b"1"
        raise
    finally:
        with suppress(BrokenPipeError):  # the child may have been killed
            os.write(writing, word)
        os.close(writing)
        os.waitpid(child, 0)


# --------------------------------------------------------------------------------------- training
def merit(result, name="macro_f1"):
    """What is compared: a higher F1 is better; while that is 0, a lower dev loss is."""
    f1 = 0.0 if name == "loss" else result[name]
    return f1, 0.0 if f1 else -result["loss"]


def positive_weights(label_ids, num_labels):
    """float32 [classes]: sqrt(negatives / positives), at least 1; 1 for a label without samples.

    The root, since the whole ratio of a rare label (100 and more) drowns all others.
    """
    positives = np.bincount([i for ids in label_ids for i in ids], minlength=num_labels)
    ratio = (len(label_ids) - positives) / np.maximum(positives, 1)
    return np.where(positives > 0, np.maximum(ratio, 1.0) ** 0.5, 1.0).astype(np.float32)


def make_loss(name, pos_weight=None):
    """loss(logits, targets), both float32 [batch, classes], to a scalar: the mean of all elements.

    focal: "Focal Loss for Dense Object Detection", Lin et al. 2017. asl: "Asymmetric Loss For
    Multi-Label Classification", Ridnik et al. 2021; negatives of a probability under the margin
    count nothing. pos_weight [classes] multiplies the loss of positives; None: 1.
    """
    weight = None if pos_weight is None else paddle.to_tensor(pos_weight)

    def loss(logits, targets):
        logits = logits.astype("float32")  # after --amp
        if name == "bce" and weight is None:
            return F.binary_cross_entropy_with_logits(logits, targets)
        # That function's pos_weight is wrong for negative logits (Paddle 2.6.2, CPU).
        positive, negative = -F.log_sigmoid(logits), -F.log_sigmoid(-logits)
        probs = F.sigmoid(logits)
        if name == "focal":
            positive *= (1 - probs) ** FOCAL_GAMMA
            negative *= probs**FOCAL_GAMMA
        elif name == "asl":
            shifted = F.relu(probs - ASL_MARGIN)
            negative = -(shifted**ASL_GAMMA) * paddle.log(1 - shifted)  # 1 - shifted >= the margin
        if weight is not None:
            positive = weight * positive
        return (targets * positive + (1 - targets) * negative).mean()

    return loss


def make_optimizer(args, model, total_steps):
    """(AdamW without decay on biases and norms, its schedule; None: a constant learning rate)."""
    schedule = None
    if args.warmup:
        decay = transformers.LinearDecayWithWarmup
        schedule = decay(args.learning_rate, total_steps, args.warmup_steps)
    named = model.named_parameters()
    decayed = {p.name for name, p in named if "bias" not in name and "norm" not in name}
    clip = paddle.nn.ClipGradByGlobalNorm(args.max_grad_norm) if args.max_grad_norm else None
    optimizer = paddle.optimizer.AdamW(
        learning_rate=schedule or args.learning_rate,
        parameters=model.parameters(),
        weight_decay=args.weight_decay,
        apply_decay_param_fun=decayed.__contains__,
        grad_clip=clip,
    )
    return optimizer, schedule


@contextmanager
def fast_dropout(seed):
    """Dropout on the CPU with masks drawn by NumPy inside the block.

    Paddle draws a float per element with a Mersenne twister, which takes a fifth of a step; here
    16 random bits decide, so a rate is rounded to a multiple of 1 / 65536.
    """
    original, rng = F.dropout, np.random.Generator(np.random.SFC64(seed))

    def dropout(x, p=0.5, axis=None, training=True, mode="upscale_in_train", name=None):
        if not training or p == 0:
            return x
        if axis is not None or mode != "upscale_in_train":
            return original(x, p, axis, training, mode, name)
        dropped = round(p * 65536)
        bits = np.frombuffer(rng.bytes(2 * x.size), dtype=np.uint16)
        scale = np.float32(65536 / max(1, 65536 - dropped))
        mask = (bits >= dropped).astype(np.float32).reshape(x.shape) * scale
        return x * paddle.to_tensor(mask)

    F.dropout = dropout  # layers look it up at every call
    try:
        yield
    finally:
        F.dropout = original


def train_step(args, loss_function, parallel, optimizer, scaler, examples, group, step, counts):
    """One optimizer step over the batches in `group`; returns their mean loss."""
    losses, outputs = [], []
    for position, index in enumerate(group):
        # Seeding from the position in the run leaves no generator state to save for --resume.
        place = np.random.SeedSequence((args.seed, step, position, dist.get_rank()))
        paddle.seed(int(place.generate_state(1)[0]))
        batch = utils.pad([examples[0][i] for i in index])
        targets = utils.multi_hot([examples[1][i] for i in index], len(counts.tp))
        dropout = fast_dropout(place) if args.device == "cpu" else nullcontext()
        with dropout, paddle.amp.auto_cast(enable=args.amp):
            logits = parallel(**{k: paddle.to_tensor(v) for k, v in batch.items()})
            loss = loss_function(logits, paddle.to_tensor(targets))
        # Gradients are exchanged once, with the last batch of the step.
        waits = dist.get_world_size() > 1 and position < len(group) - 1
        with parallel.no_sync() if waits else nullcontext():
            scaler.scale(loss / len(group)).backward()
        losses.append(loss.detach())
        outputs.append((logits.detach(), targets))
    scaler.step(optimizer)
    scaler.update()
    optimizer.clear_grad()
    for logits, targets in outputs:
        probs = metric.probabilities(logits.astype("float32").numpy())
        counts.update(metric.decode(probs), targets)
    return float(np.mean([float(loss) for loss in losses]))


def train(args, identity, model, num_labels, examples, dev_examples, tokenizer_dir):
    """Trains and leaves the best model, the log and the curves in args.save_dir.

    examples, dev_examples: (token ids, label ids) of the texts, as lists of arrays and of lists.
    Loss and F1 of the training log are those of rank 0's share of the batches.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    best = BEST[args.metric_for_best]
    shown = best if best == "loss" else f"{best} score"
    save_dir, state_path = Path(args.save_dir), Path(args.save_dir) / STATE_FILE
    lengths = [len(ids) for ids in examples[0]]
    batches_per_rank = -(-(-(-len(lengths) // args.batch_size)) // world_size)
    steps_per_epoch = -(-batches_per_rank // args.gradient_accumulation_steps)
    optimizer, schedule = make_optimizer(args, model, steps_per_epoch * args.epochs)
    scaler = paddle.amp.GradScaler(enable=args.amp)
    auto = args.pos_weight == "auto"
    weights = positive_weights(examples[1], num_labels) if auto else None
    loss_function = make_loss(args.loss, weights)
    progress = SimpleNamespace(  # goes into the training state
        epoch=0,  # finished epochs
        step=0,  # finished steps of the running epoch
        global_step=0,
        best=None,  # dev figures of the saved model
        stale_epochs=0,  # evaluations since the last improvement
        log_size=0,  # bytes of the log that belong to this state
        counts=None,  # of the running epoch, for its F1 on the training set
    )
    resumed = args.resume and load_state(state_path, identity, progress, model, optimizer, scaler)
    parallel = paddle.DataParallel(model) if world_size > 1 else model
    log = None
    if rank == 0:
        log = TrainLog(save_dir / LOG_FILE, progress.log_size, identity, args.visualdl_dir)

    def save():
        if rank == 0:
            progress.log_size = log.sync()
            save_state(state_path, identity, progress, model, optimizer, scaler)

    if not resumed:
        save()  # so that --resume never depends on files that the run itself may overwrite
    model.train()
    while progress.epoch < args.epochs:
        if args.early_stop and progress.stale_epochs >= args.early_stop_nums:
            logger.info("Early stop!")
            break
        epoch, rng = progress.epoch + 1, np.random.default_rng([args.seed, progress.epoch])
        plan = utils.batches(lengths, args.batch_size, rng, args.batching, group=world_size)
        groups = list(utils.chunks(plan[rank::world_size], args.gradient_accumulation_steps))
        counts = metric.MultiLabelCounts(num_labels)
        if progress.counts is not None:
            counts = counts.from_array(progress.counts)
        hidden = True if rank else None  # None: hidden where stderr is no terminal
        bar = tqdm(desc=f"epoch {epoch}", total=len(groups), initial=progress.step, disable=hidden)
        since, logged = time.time(), progress.global_step
        for group in groups[progress.step :]:
            step, lr = progress.global_step, optimizer.get_lr()
            stepped = (args, loss_function, parallel, optimizer, scaler, examples, group)
            loss = train_step(*stepped, step, counts)
            if schedule is not None:
                schedule.step()
            progress.step += 1
            progress.global_step += 1
            bar.update()
            if progress.global_step % args.logging_steps == 0 and rank == 0:
                speed = (progress.global_step - logged) / (time.time() - since)
                since, logged = time.time(), progress.global_step
                f1 = {"micro_f1": counts.micro_f1, "macro_f1": counts.macro_f1}
                logger.info(
                    "global step %d, epoch: %d, batch: %d, loss: %.5f, "
                    "micro f1 score: %.5f, macro f1 score: %.5f, speed: %.2f step/s",
                    *(progress.global_step, epoch, progress.step, loss, *f1.values(), speed),
                )
                values = {"epoch": epoch, "loss": loss, "lr": lr, **f1}
                log.write("train", progress.global_step, **values)
            if args.save_steps and progress.global_step % args.save_steps == 0:
                progress.counts = counts.to_array().tolist()
                save()
        bar.close()
        result = evaluate(model, *dev_examples, num_labels, args.batch_size)
        logger.info("eval loss: %.5f, micro f1 score: %.5f, macro f1 score: %.5f", *result.values())
        if not np.isfinite(result["loss"]):
            raise UserError(
                f"dev loss is {result['loss']} after epoch {epoch}: lower --learning_rate or set "
                "--max_grad_norm 1; the best model of the earlier epochs is kept"
            )
        progress.stale_epochs += 1
        chosen = args.metric_for_best
        if progress.best is None or merit(result, chosen) > merit(progress.best, chosen):
            progress.stale_epochs, progress.best = 0, result
        if rank == 0:
            log.write("eval", progress.global_step, epoch=epoch, **result)
            if progress.stale_epochs == 0:
                save_model(save_dir, model, tokenizer_dir)
        logger.info("Current best %s: %.5f", shown, progress.best[args.metric_for_best])
        progress.epoch, progress.step, progress.counts = epoch, 0, None
        save()
    if rank == 0:
        log.plot(save_dir / "train_curves.png")
        log.write("end", progress.global_step, **progress.best)
        state_path.unlink(missing_ok=True)
    logger.info("Final best %s: %.5f", shown, progress.best[args.metric_for_best])
    logger.info("Save best %s text classification model in %s", best, args.save_dir)


def remove_leftovers(save_dir):
    """Makes the folder; removes what a killed run was writing."""
    save_dir.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        for path in save_dir.glob(".*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(args):
    """Reads and encodes the data, builds the model, trains."""
    if decided_by_rank_0(is_finished, args):
        return
    data = Path(args.dataset_dir)
    labels = utils.read_labels(data / args.label_file)
    texts, label_ids = utils.read_examples(data / args.train_file, labels)
    dev_texts, dev_label_ids = utils.read_examples(data / args.dev_file, labels)
    identity = fingerprint(args)
    check_identity(identity, decided_by_rank_0(fingerprint, args), "differ(s) from rank 0's")
    paddle.seed(args.seed)
    with tempfile.TemporaryDirectory() as work_dir, logging_redirect_tqdm([logger]):
        model, folder = load_pretrained(args.model_name, labels, Path(work_dir))
        utils.check_length(args.max_seq_length, model.config.max_position_embeddings)
        if args.init_from_ckpt:
            set_weights(model, utils.load_weights(args.init_from_ckpt), args.init_from_ckpt)
        if args.dropout is not None:
            set_dropout(model, args.dropout)
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: i for i, name in enumerate(labels)}
        model.config.max_seq_length = args.max_seq_length
        model.config.thresholds = None  # of another training, if the folder had any
        model.config.min_labels, model.config.max_labels = 0, None
        tokenizer = utils.load_tokenizer(folder)
        ids, cut = utils.encode(texts, tokenizer, args.max_seq_length)
        dev_ids, dev_cut = utils.encode(dev_texts, tokenizer, args.max_seq_length)
        utils.warn_truncated(cut + dev_cut, len(ids) + len(dev_ids), args.max_seq_length)
        for name, encoded in (("Train", ids), ("Dev", dev_ids)):
            logger.info("%s set: %d texts, %d tokens", name, len(encoded), sum(map(len, encoded)))
        remove_leftovers(Path(args.save_dir))
        examples, dev_examples = (ids, label_ids), (dev_ids, dev_label_ids)
        train(args, identity, model, len(labels), examples, dev_examples, folder)


def main(argv=None):
    args = parse_args(argv)
    set_device(args.device)
    if dist.get_world_size() == 1:
        return run(args)
    with lost_worker_message(args.save_dir):
        dist.init_parallel_env()
        if dist.get_rank():
            logger.setLevel("WARNING")  # every rank would say the same
        run(args)


if __name__ == "__main__":
    utils.cli(main)
