"""Fine-tune ERNIE for multi-label classification, evaluate each epoch, keep the best model.

    python train.py --device cpu --dataset_dir data --model_name ernie-3.0-medium-zh --early_stop
    python -m paddle.distributed.launch --nproc_per_node=2 --backend=gloo train.py --device cpu ...

Every random choice is a function of --seed, the epoch and the step, so a run that was stopped at
any moment continues with --resume to bit-identical weights.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import metric
import utils
from utils import UserError, at_least, logger

model, paddle = utils.LazyModule("model"), utils.LazyModule("paddle")

MODEL_NAMES = [
    *(f"ernie-3.0-{size}-zh" for size in ("xbase", "base", "medium", "micro", "mini", "nano")),
    "ernie-2.0-base-en",
    "ernie-2.0-large-en",
]
STATE_FILE = "training_state.pdparams"  # everything --resume needs; removed when the run is done
LOG_FILE = "train_log.jsonl"
# How the log names what --metric_for_best can be.
BEST = {"macro_f1": "macro f1 score", "micro_f1": "micro f1 score", "loss": "loss"}
HIGH_RATE = 1e-3  # for weights without pretraining; far above what pretrained ones bear
FOCAL_GAMMA = 2.0  # Lin et al. 2017, section 5
ASL_GAMMA, ASL_MARGIN = 4.0, 0.05  # of the negatives; 0 of the positives; Ridnik et al. 2021, 3.3
# Flags that may differ between a stopped run and its continuation: they do not change the weights,
# or it is the content of what they name that counts (see identity_of).
FREE_FLAGS = {"resume", "logging_steps", "save_steps", "visualdl_dir", "save_dir", "dataset_dir"}
FREE_FLAGS |= {"model_name", "train_file", "dev_file", "label_file", "cache_dir"}


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset_dir", required=True, help="folder of the files below")
    add("--train_file", default="train.txt", help="training set")
    add("--dev_file", default="dev.txt", help="development set")
    add("--label_file", default="label.txt", help="label names, one per line")
    add("--cache_dir", help="keep the encoded texts there for other runs; None: for --resume alone")

    add = parser.add_argument_group("model").add_argument
    add(
        "--model_name",
        default="ernie-3.0-medium-zh",
        help="local folder in PaddleNLP's or Hugging Face's (safetensors) format, or one of "
        + ", ".join(MODEL_NAMES),
    )
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
    add(
        "--loss",
        choices=["bce", "focal", "asl"],
        default="bce",
        help="bce: cross-entropy; focal, asl: less weight on labels that are easy",
    )
    add(
        "--pos_weight",
        choices=["none", "auto"],
        default="none",
        help="auto: a label's positives count sqrt(negatives / positives) times",
    )
    add(
        "--metric_for_best",
        choices=list(BEST),
        default="macro_f1",
        help="dev figure that decides which epoch is the best",
    )
    add(
        "--batching",
        choices=["sorted", "random"],
        default="sorted",
        help="sorted: texts of like length share a batch; random: plain shuffle",
    )
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
    is_folder = Path(args.model_name).is_dir()
    if is_folder and os.path.realpath(args.save_dir) == os.path.realpath(args.model_name):
        raise UserError(
            f"--save_dir {args.save_dir} is the --model_name folder, whose weights the training "
            "would replace; give another folder"
        )
    if not is_folder and args.model_name not in MODEL_NAMES:
        names = ", ".join(MODEL_NAMES)
        raise UserError(f"--model_name {args.model_name}: neither a folder nor one of {names}")
    return args


def main(argv=None):
    args = parse_args(argv)
    data = Path(args.dataset_dir)
    labels = utils.read_labels(data / args.label_file)
    model.set_device(args.device)
    rank, _ = model.init_processes()
    if rank > 0:
        logger.setLevel("WARNING")  # every rank would say the same
    with contextlib.ExitStack() as stack:
        model.on_rank_0(lock_folders, args, stack)
        finished = model.on_rank_0(finished_run, args)
        paddle.seed(args.seed)
        work_dir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(logging_redirect_tqdm([logger]))
        net, tokenizer_dir = load_pretrained(args.model_name, labels, Path(work_dir))
        start = start_sha256(net)
        configure(net, args, labels)
        tokenizer = utils.load_tokenizer(tokenizer_dir)
        stack.callback(remove_cache, args)
        cache = args.cache_dir or Path(args.save_dir) / utils.CACHE_FOLDER
        files = [data / args.train_file, data / args.dev_file]
        sets = model.read_sets(files, labels, tokenizer, args.max_seq_length, cache)
        train_set, dev_set = sets
        identity = identity_of(args, start, labels, train_set, dev_set)
        check_identity(identity, model.on_rank_0(lambda: identity), "differ(s) from rank 0's")
        if finished is not None:
            hint = "changed since the run was finished; train in another --save_dir"
            check_identity(identity, finished, hint)
            logger.info("%s holds a finished run; nothing to resume", args.save_dir)
            return
        cut, total = sum(part.cut for part in sets), sum(len(part[0]) for part in sets)
        utils.log_truncation(cut, total, args.max_seq_length)
        for name, part in zip(("Train", "Dev"), sets):
            logger.info("%s set: %d texts, %d tokens", name, len(part[0]), part.num_tokens)
        if rank == 0:
            remove_leftovers(Path(args.save_dir))
        token_ids = np.unique(np.concatenate([[0], *(part.occurring for part in sets)]))
        rows = model.EmbeddingRows(net, token_ids, args.max_seq_length)
        Trainer(args, net, rows, len(labels), train_set, dev_set, tokenizer_dir, identity).run()


# ------------------------------------------------------------------------------------ the model
def load_pretrained(name, labels, work_dir):
    """Returns (model, folder with its tokenizer files) for a local folder or a PaddleNLP name.

    Of a local folder's classifier, what it knows of these labels is kept.
    """
    if Path(name).is_dir():
        return model.load_folder(Path(name), labels), Path(name)
    auto = model.transformers
    try:
        net = auto.AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(labels))
        auto.AutoTokenizer.from_pretrained(name).save_pretrained(str(work_dir))
    except Exception as error:  # PaddleNLP raises OSError, RuntimeError, requests' errors ...
        raise UserError(
            f"--model_name {name}: cannot be downloaded ({type(error).__name__}); without network "
            f"give a local folder with {utils.CONFIG_FILE}, vocab.txt and {utils.WEIGHTS_FILE} or "
            "model.safetensors"
        ) from error
    return net, work_dir


def configure(net, args, labels):
    """What the flags say of the model, and what its config.json shall say."""
    utils.check_length(args.max_seq_length, net.config.max_position_embeddings)
    if args.init_from_ckpt:
        model.set_weights(net, initial_weights(net, args, labels), args.init_from_ckpt)
    if args.dropout is not None:
        for layer in net.sublayers(include_self=True):
            if isinstance(layer, paddle.nn.Dropout):
                layer.p = args.dropout
            elif isinstance(layer, paddle.nn.MultiHeadAttention):
                layer.dropout = args.dropout
        net.config.hidden_dropout_prob = net.config.attention_probs_dropout_prob = args.dropout
    net.config.id2label = dict(enumerate(labels))
    net.config.label2id = {name: i for i, name in enumerate(labels)}
    net.config.max_seq_length = args.max_seq_length
    net.config.thresholds = None  # of another training, if the folder had any
    net.config.min_labels, net.config.max_labels = 0, None


def initial_weights(net, args, labels):
    """The weights of --init_from_ckpt, its classifier in the order of the labels. Raises UserError
    if it was trained with others."""
    path = Path(args.init_from_ckpt)
    weights, names = model.load_weights(path), model.read_label_names(path.parent, labels)
    if names is None:
        message = "%s: no %s with label names beside it; only the number of labels can be compared"
        logger.warning(message, path, utils.CONFIG_FILE)
        return weights
    label_file, config = Path(args.dataset_dir) / args.label_file, path.parent / utils.CONFIG_FILE
    advice = "use the label file that it was trained with"
    if path.name == utils.WEIGHTS_FILE:
        advice += f", or --model_name {path.parent} instead of --init_from_ckpt"
        if os.path.realpath(path.parent) == os.path.realpath(args.save_dir):
            advice += " and another --save_dir"
        advice += ", which keeps the weights of the labels that both have"
    model.check_same_labels(label_file, labels, names, config, advice)
    return model.fit_classifier(weights, net, names, labels, path)


# --------------------------------------------------------------------------------- the training
class Trainer:
    """Trains and leaves the best model, the log and the curves in args.save_dir.

    rows: model.EmbeddingRows of `net`.
    train_set, dev_set: (token ids, label ids) of the texts, see utils.EncodedSet.
    identity: see identity_of.
    """

    def __init__(self, args, net, rows, num_labels, train_set, dev_set, tokenizer_dir, identity):
        self.args, self.net, self.rows, self.num_labels = args, net, rows, num_labels
        self.train_set, self.dev_set = train_set, dev_set
        self.tokenizer_dir, self.identity = tokenizer_dir, identity
        self.rank, self.world_size = (
            paddle.distributed.get_rank(),
            paddle.distributed.get_world_size(),
        )
        self.save_dir = Path(args.save_dir)
        self.lengths = utils.lengths_of(train_set[0])
        weights = positive_weights(train_set[1], num_labels) if args.pos_weight == "auto" else None
        self.loss_function = make_loss(args.loss, weights)
        self.schedule = None  # a constant learning rate
        if args.warmup:
            batches = -(-(-(-len(self.lengths) // args.batch_size)) // self.world_size)  # of a rank
            steps = -(-batches // args.gradient_accumulation_steps) * args.epochs
            decay = model.transformers.LinearDecayWithWarmup
            self.schedule = decay(args.learning_rate, steps, args.warmup_steps)
        rate = self.schedule or args.learning_rate
        self.optimizer = model.make_optimizer(net, rate, args.weight_decay, args.max_grad_norm)
        self.scaler = paddle.amp.GradScaler(enable=args.amp)
        self.progress = SimpleNamespace(  # goes into the training state
            epoch=0,  # finished epochs
            step=0,  # finished steps of the running epoch
            global_step=0,
            decay=1.0,  # of a weight without gradients, by --weight_decay
            best=None,  # dev figures of the saved model
            stale_epochs=0,  # evaluations since the last improvement
            log_size=0,  # bytes of the log that belong to this state
            counts=None,  # of the running epoch, for its F1 on the training set
        )

    def run(self):
        args, progress = self.args, self.progress
        resumed = args.resume and self.load_state()
        self.replicas = model.Replicas(self.net, args.batch_size)
        if self.rank == 0:
            self.log = TrainLog(self.save_dir / LOG_FILE, progress.log_size, args.visualdl_dir)
            if progress.log_size == 0:
                sizes = {"train_texts": len(self.lengths), "dev_texts": len(self.dev_set[0])}
                start = {"model_name": args.model_name, **sizes, "flags": self.identity}
                self.log.write("start", 0, **start)
        if not resumed:
            self.save_state()  # --init_from_ckpt may be what the first best model replaces
        while progress.epoch < args.epochs:
            if args.early_stop and progress.stale_epochs >= args.early_stop_nums:
                logger.info("Early stop!")
                break
            with model.fast_layers():
                self.train_epoch()
                self.keep_best()
            progress.epoch, progress.step, progress.counts = progress.epoch + 1, 0, None
            self.save_state()
        if self.rank == 0:
            self.log.plot(self.save_dir / "train_curves.png")
            self.log.write("end", progress.global_step, **progress.best)
            (self.save_dir / STATE_FILE).unlink(missing_ok=True)
        self.log_best("Final")
        best = BEST[args.metric_for_best].removesuffix(" score")
        logger.info("Save best %s text classification model in %s", best, args.save_dir)
        if progress.best["micro_f1"] == 0 and self.rank == 0:
            self.log_remedies()

    def log_remedies(self):
        """Two lines for a model that gives no dev text a right label."""
        args, progress = self.args, self.progress
        if not any(map(len, self.dev_set[1])):
            logger.warning("F1 is 0 because no sample of %s has a label", args.dev_file)
            logger.warning("Give a --dev_file with labels; data/check.py counts them")
            return
        done = f"{progress.epoch} epoch(s), {progress.global_step} steps"
        learn = ["more --epochs"]
        if progress.epoch < args.epochs:
            learn = [f"a higher --early_stop_nums than {args.early_stop_nums}"]
        rate = f"--learning_rate than {args.learning_rate:g}"
        if args.learning_rate < HIGH_RATE:
            learn.append(f"a higher {rate} (random weights need about {HIGH_RATE:g})")
        else:
            learn.append(f"a lower {rate}, --max_grad_norm 1")
        steps = max(1, progress.global_step // 10)
        learn += [] if args.warmup else [f"--warmup --warmup_steps {steps}"]
        message = "F1 is 0: no dev text got a right label after %s; try %s"
        logger.warning(message, done, ", ".join(learn))
        rare = [] if args.loss == "asl" else ["--loss asl"]
        rare += [] if args.pos_weight == "auto" else ["--pos_weight auto"]
        rare = f"Rare labels: {' '.join(rare)}. " if rare else ""
        message = "%sOnly too cautious: analysis/evaluate.py --tune_thresholds --save_thresholds"
        logger.warning(message, rare)

    def log_best(self, when):
        name = self.args.metric_for_best
        logger.info("%s best %s: %.5f", when, BEST[name], self.progress.best[name])

    def train_epoch(self):
        """The steps of the running epoch that are still to do."""
        args, progress, epoch = self.args, self.progress, self.progress.epoch + 1
        rng = np.random.default_rng([args.seed, progress.epoch])
        plan = utils.batches(
            self.lengths, args.batch_size, rng, args.batching, group=self.world_size
        )
        own, size = plan[self.rank :: self.world_size], args.gradient_accumulation_steps
        num_steps = -(-len(own) // size)
        counts = metric.MultiLabelCounts(self.num_labels)
        if progress.counts is not None:
            counts = counts.from_array(progress.counts)
        self.replicas.train()
        hidden = True if self.rank else None  # None: hidden where stderr is no terminal
        bar = tqdm(desc=f"epoch {epoch}", total=num_steps, initial=progress.step, disable=hidden)
        since, logged = time.time(), progress.global_step
        for step in range(progress.step, num_steps):
            batches = own[step * size : (step + 1) * size]
            rate, loss = self.optimizer.get_lr(), self.train_step(batches, counts)
            progress.decay *= 1 - rate * args.weight_decay
            if self.schedule is not None:
                self.schedule.step()
            progress.step += 1
            progress.global_step += 1
            bar.update()
            if progress.global_step % args.logging_steps == 0 and self.rank == 0:
                speed = (progress.global_step - logged) / (time.time() - since)
                since, logged = time.time(), progress.global_step
                micro, macro = counts.micro_f1, counts.macro_f1
                logger.info(
                    "global step %d, epoch: %d, batch: %d, loss: %.5f, %s, speed: %.2f step/s",
                    progress.global_step,
                    epoch,
                    progress.step,
                    loss,
                    f"micro f1 score: {micro:.5f}, macro f1 score: {macro:.5f}",
                    speed,
                )
                values = {"loss": loss, "lr": rate, "micro_f1": micro, "macro_f1": macro}
                self.log.write("train", progress.global_step, epoch=epoch, **values)
            if args.save_steps and progress.global_step % args.save_steps == 0:
                progress.counts = counts.to_array().tolist()
                self.save_state()
        bar.close()

    def train_step(self, batches, counts):
        """One optimizer step over some batches (index arrays); returns their mean loss.

        Loss and F1 of the training log are those of rank 0's share of the batches.
        """
        results, parameters = [], self.net.parameters()
        for i, indices in enumerate(batches):
            # Seeding from the step leaves no generator state to save for --resume.
            seed = np.random.SeedSequence((self.args.seed, self.progress.global_step, i, self.rank))
            weight = 1 / (len(batches) * len(indices))
            results += self.replicas.map(partial(self.backward, weight=weight), indices, seed)
        self.replicas.collect_gradients()
        model.average_gradients(parameters)
        model.unscale(parameters)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.clear_grad(set_to_zero=False)
        for logits, targets, _ in results:
            counts.update(metric.decode(metric.probabilities(logits)), targets)
        return sum(loss for _, _, loss in results)

    def backward(self, net, indices, weight):
        """Adds the gradients of `weight` times the texts' losses to those of `net`.

        Returns logits, targets (float32 [texts, classes]) and that loss.
        """
        batch = utils.pad([self.train_set[0][i] for i in indices])
        targets = utils.multi_hot([self.train_set[1][i] for i in indices], self.num_labels)
        with paddle.amp.auto_cast(enable=self.args.amp):
            logits = net(**{k: paddle.to_tensor(v) for k, v in batch.items()})
            loss = self.loss_function(logits, paddle.to_tensor(targets)) * (weight * len(indices))
        model.scaled_backward(self.scaler.scale(loss))
        return logits.astype("float32").numpy(), targets, float(loss)

    def keep_best(self):
        """Evaluates on dev; saves the model if it is the best so far."""
        args, progress = self.args, self.progress
        result = model.evaluate(
            self.replicas.forward, *self.dev_set, self.num_labels, args.batch_size
        )
        logger.info(metric.describe(result))
        if not np.isfinite(result["loss"]):
            raise UserError(
                f"dev loss is {result['loss']} after epoch {progress.epoch + 1}: lower "
                "--learning_rate or set --max_grad_norm 1; the best model of the earlier epochs is "
                "kept"
            )
        score, best = metric.score(result, args.metric_for_best), progress.best
        progress.stale_epochs += 1
        if best is None or score > metric.score(best, args.metric_for_best):
            progress.stale_epochs, progress.best = 0, result
        if self.rank == 0:
            self.log.write("eval", progress.global_step, epoch=progress.epoch + 1, **result)
            if progress.stale_epochs == 0:
                weights = self.rows.weights(progress.decay)
                model.save_checkpoint(self.save_dir, self.net, self.tokenizer_dir, weights)
        self.log_best("Current")

    def save_state(self):
        """One file with all that a run needs to go on, in the format of the weights."""
        if self.rank > 0:
            return
        self.progress.log_size = self.log.sync()
        state, scale = self.optimizer.state_dict(), self.scaler.state_dict()
        meta = {"identity": self.identity, "progress": vars(self.progress)}
        meta["lr"] = state.get("LR_Scheduler")
        meta["scaler"] = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in scale.items()}
        arrays = {"meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)}
        # Paddle names parameters by counting the layers of the process; the model's names stay.
        for name, parameter in self.net.state_dict().items():
            arrays[f"model/{name}"] = parameter.numpy()
            for key in state:
                if key.startswith(parameter.name + "_"):
                    moment = key[len(parameter.name) :]
                    arrays[f"optimizer/{name}/{moment}"] = state[key].numpy()
        with utils.atomic_file(self.save_dir / STATE_FILE, "wb") as file:
            model.save_weights(file, arrays)

    def load_state(self):
        """Restores what save_state wrote. Rank 0 reads it for all: other machines need no copy.

        Returns False if nothing was saved yet; raises UserError if the state is of another run.
        """
        path = self.save_dir / STATE_FILE
        arrays = model.on_rank_0(lambda: model.load_weights(path) if path.exists() else None)
        if arrays is None:
            return False
        try:
            meta = json.loads(arrays.pop("meta").tobytes())
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: broken state; start anew in another --save_dir") from error
        hint = (
            "changed since the run was stopped; use the same, or start anew in another --save_dir"
        )
        check_identity(self.identity, meta["identity"], hint)
        own, weights = self.net.state_dict(), {}
        restored = {"LR_Scheduler": meta["lr"]} if meta["lr"] else {}
        for key, value in arrays.items():
            kind, name, *moment = key.split("/")
            if kind == "model":
                weights[name] = value
            else:
                restored[own[name].name + moment[0]] = paddle.to_tensor(value)
        model.set_weights(self.net, weights, path)
        self.optimizer.set_state_dict(restored)
        self.scaler.load_state_dict(meta["scaler"])
        vars(self.progress).update(meta["progress"])
        step, epoch = self.progress.global_step, self.progress.epoch + 1
        logger.info("Resume after step %d (epoch %d)", step, epoch)
        return True


# ----------------------------------------------------------------------------------- the losses
def positive_weights(label_ids, num_labels):
    """float32 [classes]: sqrt(negatives / positives), at least 1; 1 for a label without samples.

    The root, since the whole ratio of a rare label (100 and more) drowns all others.
    """
    ragged = isinstance(label_ids, utils.Ragged)
    values = label_ids.values if ragged else [i for ids in label_ids for i in ids]
    positives = np.zeros(num_labels, dtype=np.int64)
    for start in range(0, len(values), utils.CHUNK):
        positives += np.bincount(values[start : start + utils.CHUNK], minlength=num_labels)
    ratio = (len(label_ids) - positives) / np.maximum(positives, 1)
    return np.where(positives > 0, np.maximum(ratio, 1.0) ** 0.5, 1.0).astype(np.float32)


def make_loss(name, pos_weight=None):
    """loss(logits, targets), both float32 [batch, classes], to a scalar: the mean of all elements.

    focal: "Focal Loss for Dense Object Detection", Lin et al. 2017. asl: "Asymmetric Loss For
    Multi-Label Classification", Ridnik et al. 2021; negatives of a probability under the margin
    count nothing. pos_weight [classes] multiplies the loss of positives; None: 1.
    """
    weight = None if pos_weight is None else paddle.to_tensor(pos_weight)
    F = paddle.nn.functional

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


# -------------------------------------------------------------------------------- the save folder
def lock_folders(args, stack):
    """No other run may write to the folders of this one; `stack` unlocks them when it is closed."""
    folders = {os.path.realpath(args.save_dir): ("--save_dir", args.save_dir)}
    if args.visualdl_dir:
        name = os.path.realpath(args.visualdl_dir)
        folders.setdefault(name, ("--visualdl_dir", args.visualdl_dir))
    for flag, folder in folders.values():
        stack.enter_context(utils.run_lock(flag, folder, "training"))


def finished_run(args):
    """What --resume compares if save_dir holds a finished run (see identity_of), else None.

    Raises UserError for a stopped run without --resume: it is not silently overwritten.
    """
    state, log = Path(args.save_dir) / STATE_FILE, Path(args.save_dir) / LOG_FILE
    if state.exists() and not args.resume:
        raise UserError(f"{state}: a stopped run; add --resume, or remove it to start anew")
    lines = log.read_bytes().splitlines() if log.exists() else []
    if state.exists() or not lines or b'"event": "end"' not in lines[-1]:
        return None
    if not args.resume:
        logger.warning("%s holds a finished run, which this one will replace", args.save_dir)
        return None
    try:
        return dict(json.loads(lines[0])["flags"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{log}:1: damaged line; train in another --save_dir") from error


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def start_sha256(net):
    """Of a model as it was loaded: its description and its weights, a new classifier's included."""
    digest = hashlib.sha256(json.dumps(net.config.to_dict(), sort_keys=True).encode())
    for name, parameter in net.state_dict().items():
        digest.update(name.encode())
        digest.update(parameter.numpy().tobytes())
    return digest.hexdigest()


def identity_of(args, start, labels, train_set, dev_set):
    """What a run's weights depend on: flags, number of ranks, and the content of the files.

    start: see start_sha256. The sets count as token ids and class ids, so that the tokenizer is
    part of them.
    """
    identity = {key: value for key, value in vars(args).items() if key not in FREE_FLAGS}
    identity["number of processes"] = paddle.distributed.get_world_size()
    identity["label_file"] = sha256(json.dumps(labels).encode())
    identity["model_name"] = start
    identity["train_file"], identity["dev_file"] = train_set.sha256, dev_set.sha256
    return identity


def check_identity(identity, expected, hint):
    changed = [key for key in identity if expected.get(key) != identity[key]]
    if changed:
        raise UserError(f"{', '.join(changed)} {hint}")


def remove_cache(args):
    """The encoded sets in save_dir are for a run that can be continued, so they go with its state.

    Other machines have no state in their save_dir, unless it is the same folder.
    """
    save_dir = Path(args.save_dir)
    if model.local_rank() == 0 and not (save_dir / STATE_FILE).exists():
        shutil.rmtree(save_dir / utils.CACHE_FOLDER, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            save_dir.rmdir()


def remove_leftovers(save_dir):
    """Removes what a killed run was writing."""
    for path in save_dir.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class TrainLog:
    """train_log.jsonl (an object per log line or evaluation) and VisualDL; rank 0 writes."""

    def __init__(self, path, size, visualdl_dir):
        self.path, self.visualdl = path, None
        path.touch()
        os.truncate(path, min(size, path.stat().st_size))  # a killed run may have logged more
        self.file = open(path, "a", encoding="utf-8")
        if visualdl_dir:
            from visualdl import LogWriter  # takes seconds to import

            self.visualdl = LogWriter(logdir=visualdl_dir)

    def write(self, event, step, **values):
        self.file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self.file.flush()
        if self.visualdl and event != "start":
            for name, value in values.items():
                self.visualdl.add_scalar(tag=f"{event}/{name}", step=step, value=value)

    def sync(self):
        """Makes what was written durable; returns the size."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def plot(self, path):
        """The curves of loss and F1 as a PNG."""
        from matplotlib.figure import Figure  # takes a second to import

        records = []
        for index, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                records.append(json.loads(line))
            except ValueError:
                logger.warning("%s:%d: damaged line; the curves are without it", self.path, index)
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


if __name__ == "__main__":
    utils.cli(main)
