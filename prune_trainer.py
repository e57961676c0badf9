"""Width pruning as in DynaBERT (Hou et al. 2020, "DynaBERT: Dynamic BERT with Adaptive Width and
Depth", section 2.1), for multi-label classification.

    importance -> reorder -> supernet at the wanted width -> distillation -> cut and export

The teacher is the fine-tuned model itself. Reordering puts the most important heads and neurons
first and changes no output; a width keeps the first ones.
"""

import contextlib
import copy
import gc
import math
import shutil
import time
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddleslim.nas.ofa import OFA, convert_super
from paddleslim.nas.ofa.convert_super import Convert, supernet

import metric
import model
import utils
from utils import UserError, logger

IMPORTANCE_TEXTS = 2048  # of the training set
LAMBDA_HIDDEN = 0.1  # weight of the hidden states' distance


# ---------------------------------------------------------------------------------- importance
def weight_importance(teacher, dataset, num_labels, batch_size):
    """How much the loss would change if a head or a neuron were left out, to first order.

    dataset: (token ids, label ids). Returns (heads [layers, heads], neurons [layers, inner]).
    A head h is masked by multiplying its rows of the output projection W with m_h = 1, so that
    d loss / d m_h = sum of W * d loss / d W over these rows: no mask has to run through the model.
    The same holds for a neuron's column of linear1 (with its bias) and its row of linear2.
    """
    teacher.eval()
    layers = teacher.base_model.encoder.layers
    heads = np.zeros((len(layers), layers[0].self_attn.num_heads))
    neurons = np.zeros((len(layers), layers[0].linear1.weight.shape[1]))

    def taylor(parameter):
        return (parameter * parameter.grad).numpy().astype(np.float64)

    plan = utils.batches(utils.lengths_of(dataset[0]), batch_size)
    for index in plan[dist.get_rank() :: dist.get_world_size()]:
        batch, targets = make_batch(dataset, index, num_labels)
        model.scaled_backward(F.binary_cross_entropy_with_logits(teacher(**batch), targets))
        model.unscale(teacher.parameters())
        for i, layer in enumerate(layers):
            rows = taylor(layer.self_attn.out_proj.weight).sum(axis=1)
            heads[i] += np.abs(rows.reshape(heads.shape[1], -1).sum(axis=1))
            inner = taylor(layer.linear1.weight).sum(axis=0) + taylor(layer.linear1.bias)
            neurons[i] += np.abs(inner) + np.abs(taylor(layer.linear2.weight).sum(axis=1))
        teacher.clear_gradients()
    return model.all_reduce(heads), model.all_reduce(neurons)


def reorder(teacher, heads, neurons):
    """Sorts heads and neurons by falling importance; what the model computes stays the same."""
    layers = teacher.base_model.encoder.layers
    for layer, head_scores, neuron_scores in zip(layers, heads, neurons):
        attention = layer.self_attn
        order = np.argsort(-head_scores, kind="stable")
        columns = order[:, None] * attention.head_dim + np.arange(attention.head_dim)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            take(linear.weight, columns.ravel(), axis=1)
            take(linear.bias, columns.ravel(), axis=0)
        take(attention.out_proj.weight, columns.ravel(), axis=0)
        order = np.argsort(-neuron_scores, kind="stable")
        take(layer.linear1.weight, order, axis=1)
        take(layer.linear1.bias, order, axis=0)
        take(layer.linear2.weight, order, axis=0)


def take(parameter, order, axis):
    parameter.set_value(np.take(parameter.numpy(), order, axis=axis))


# ------------------------------------------------------------------------------------ supernet
class Supernet:
    """PaddleSlim's OFA around a copy of the model; only the encoder's linear layers are elastic."""

    def __init__(self, teacher, width_mult):
        # The width of the norms stays, and PaddleSlim's elastic one does not run on this Paddle.
        convert_super.SuperLayerNorm = paddle.nn.LayerNorm
        self.model = copy.deepcopy(teacher)
        weights = {name: value.numpy() for name, value in teacher.state_dict().items()}
        encoder = self.model.base_model.encoder
        Convert(supernet(expand_ratio=[1.0])).convert(encoder)
        for name, parameter in self.model.named_parameters():
            parameter.set_value(weights[name.replace(".fn.", ".")])
        self.ofa = OFA(self.model, elastic_order=["width"])
        self.ofa.set_task("width")
        self.ofa.set_net_config(self._net_config(encoder, width_mult))
        for layer in encoder.layers:
            layer.self_attn.num_heads = int(layer.self_attn.num_heads * width_mult)

    def _net_config(self, encoder, width_mult):
        """{layer: {"expand_ratio"}} for the layers whose outputs are heads or neurons."""
        heads = encoder.layers[0].self_attn.num_heads
        config = {}
        for name, choices in self.ofa.ofa_layers.items():
            config[name] = {"expand_ratio": 1.0} if "expand_ratio" in choices else {}
            part = name.split(".")[-1]
            if part in ("q_proj", "k_proj", "v_proj", "linear1"):
                outputs = dict(self.model.named_sublayers())[name].fn.weight.shape[1]
                unit = outputs if part == "linear1" else heads
                # Half a unit more, because PaddleSlim rounds the product down in floating point.
                kept = int(unit * width_mult) * (outputs // unit)
                config[name] = {"expand_ratio": (kept + 0.5) / outputs}
        return config

    def __call__(self, **batch):
        return self.ofa(**batch)

    def weights(self):
        """{parameter name of the plain model: float32 array}, of full width."""
        return {k.replace(".fn.", "."): v.numpy() for k, v in self.model.state_dict().items()}


def narrow_model(params_path, num_labels, width_mult, device):
    """A model of this width on the device, in eval mode; `set_student_weights` gives it weights."""
    model.set_device(device)
    student = model.build_model(params_path, num_labels)
    model.narrow_layers(student, width_mult)
    student.eval()
    return student


def set_student_weights(student, weights):
    """Sets a narrow model to the first heads and neurons of full-width `weights`."""
    shapes = {name: value.shape for name, value in student.state_dict().items()}
    kept = {name: weights[name][tuple(map(slice, shape))] for name, shape in shapes.items()}
    model.set_weights(student, kept, "the supernet")


# --------------------------------------------------------------------------------- distillation
@contextlib.contextmanager
def hidden_states(network):
    """`with hidden_states(network) as states`: the outputs of the embeddings and of every encoder
    layer of the forward pass in the block are in the list `states`."""
    states = []
    base = network.base_model
    hooks = [
        layer.register_forward_post_hook(lambda _layer, _inputs, output: states.append(output))
        for layer in (base.embeddings, *base.encoder.layers)
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def logits_loss(student, teacher, kind):
    """Cross-entropy between the teacher's and the student's predictions, mean over the texts.

    kind "sigmoid": every label is a yes-or-no question of its own. "softmax": the labels compete,
    as in DynaBERT and in the original application.
    """
    if kind == "softmax":
        return -(F.softmax(teacher) * F.log_softmax(student)).sum(axis=-1).mean()
    return bce(student, F.sigmoid(teacher))


def bce(logits, targets):
    """Binary cross-entropy, summed over the labels, mean over the texts."""
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return loss.sum(axis=-1).mean()


def make_batch(dataset, index, num_labels):
    """(model inputs, 0/1 targets [batch, classes]) as tensors."""
    batch = utils.pad([dataset[0][i] for i in index])
    targets = utils.multi_hot([dataset[1][i] for i in index], num_labels)
    return {k: paddle.to_tensor(v) for k, v in batch.items()}, paddle.to_tensor(targets)


def log_evaluation(name, result, seconds):
    logger.info("%s, %s", name, metric.describe(result))
    logger.info("eval done total : %s s", seconds)


# -------------------------------------------------------------------------------------- training
class Pruner:
    """One teacher, any number of widths; each starts from the teacher, none shrinks the next.

    args: the flags of prune.py.
    train_set, dev_set: (token ids, label ids) of the texts, see utils.EncodedSet.
    """

    def __init__(self, args, teacher, labels, train_set, dev_set):
        self.args, self.teacher, self.labels = args, teacher, labels
        self.train_set, self.dev_set = train_set, dev_set
        self.num_labels = len(labels)
        start = time.time()
        result = self.dev_figures(teacher)
        log_evaluation("teacher model", result, time.time() - start)
        rng = np.random.default_rng(args.seed)
        some = rng.permutation(len(train_set[0]))[:IMPORTANCE_TEXTS]
        chosen = tuple([part[i] for i in some] for part in train_set)
        batch_size = args.per_device_eval_batch_size
        scores = weight_importance(teacher, chosen, self.num_labels, batch_size)
        reorder(teacher, *scores)

    def dev_figures(self, network):
        batch_size = self.args.per_device_eval_batch_size
        forward = model.dygraph_forward(network)
        return model.evaluate(forward, *self.dev_set, self.num_labels, batch_size)

    def prune(self, width_mult):
        """Distils a student of this width; leaves the best one in its folder, returns its figures.

        width_mult: fractions.Fraction. Raises UserError if the loss is not finite.
        """
        args, world_size = self.args, dist.get_world_size()
        # One model for all evaluations and one for all exports: Paddle never frees what it has
        # traced. The export is checked on the CPU, since GPUs may compute with TF32.
        students = [
            narrow_model(args.params_dir, self.num_labels, width_mult, device)
            for device in ("cpu", args.device)
        ]
        supernet = Supernet(self.teacher, width_mult)
        supernet.model.train()
        lengths = utils.lengths_of(self.train_set[0])
        batch_size = args.per_device_train_batch_size
        steps_per_epoch = -(-(-(-len(lengths) // batch_size)) // world_size)
        total_steps = math.ceil(args.num_train_epochs * steps_per_epoch)
        total_steps = args.max_steps if args.max_steps > 0 else total_steps
        warmup_steps = args.warmup_steps or math.ceil(args.warmup_ratio * total_steps)
        decay = model.transformers.LinearDecayWithWarmup
        schedule = decay(args.learning_rate, total_steps, warmup_steps)
        optimizer = model.make_optimizer(
            supernet.model, schedule, args.weight_decay, args.max_grad_norm
        )
        best, step, since = None, 0, time.time()
        logger.info("DynaBERT training starts. This period will cost some time.")
        while step < total_steps:
            epoch = step // steps_per_epoch
            rng = np.random.default_rng([args.seed, epoch])
            plan = utils.batches(lengths, batch_size, rng, group=world_size)
            for batch, indices in enumerate(plan[dist.get_rank() :: world_size]):
                loss = self.train_step(supernet, optimizer, indices, step)
                schedule.step()
                step += 1
                if step % args.logging_steps == 0:
                    speed = args.logging_steps / (time.time() - since)
                    message = "global step %d, epoch: %d, batch: %d, loss: %f, speed: %.2f step/s"
                    logger.info(message, step, epoch, batch, loss, speed)
                    since = time.time()
                last = step == total_steps
                if step % args.save_steps == 0 or step % steps_per_epoch == 0 or last:
                    progress = {"step": step, "total_steps": total_steps}
                    best = self.keep_best(supernet, students, width_mult, progress, best)
                if last:
                    break
        width = float(width_mult)
        logger.info("width_mult: %s, Best macro f1 score: %.4f", width, best["macro_f1"])
        logger.info("DynaBERT training finished.")
        del supernet, optimizer
        gc.collect()  # PaddleSlim's and Paddle's objects refer to each other
        return best

    def train_step(self, supernet, optimizer, indices, step):
        """One step on a batch (an index array); returns its loss."""
        seed = np.random.SeedSequence((self.args.seed, step, dist.get_rank()))
        model.seed_dropout(seed)
        batch, targets = make_batch(self.train_set, indices, self.num_labels)
        with paddle.no_grad(), hidden_states(self.teacher) as teacher_states:
            teacher_logits = self.teacher(**batch)
        with model.fast_layers(), hidden_states(supernet.model) as student_states:
            logits = supernet(**batch)
        hidden_loss = sum(map(F.mse_loss, student_states, teacher_states))
        soft = logits_loss(logits, teacher_logits, self.args.distill_loss)
        gold = self.args.gold_weight
        loss = LAMBDA_HIDDEN * hidden_loss + (1 - gold) * soft
        if gold:
            loss = loss + gold * bce(logits, targets)
        model.scaled_backward(loss)
        model.average_gradients(optimizer._parameter_list)
        model.unscale(optimizer._parameter_list)
        optimizer.step()
        optimizer.clear_grad()
        return float(loss)

    def keep_best(self, supernet, students, width_mult, progress, best):
        """Evaluates the cut student; saves it if it is the best; returns the best figures."""
        start, weights = time.time(), supernet.weights()
        exported, student = students
        set_student_weights(student, weights)
        result = self.dev_figures(student)
        log_evaluation(f"width_mult: {float(width_mult)}", result, time.time() - start)
        if not np.isfinite(result["loss"]):
            raise UserError(f"dev loss is {result['loss']}: lower --learning_rate")
        if best is not None and metric.score(result) <= metric.score(best):
            return best
        if dist.get_rank() == 0:
            set_student_weights(exported, weights)
            self.save(exported, width_mult, {**progress, **result})
        model.meet()
        return result

    def save(self, student, width_mult, dev_figures):
        """Writes the student's folder: a checkpoint with cut weights, and the bundle."""
        source = Path(self.args.params_dir)
        target = Path(self.args.output_dir) / str(float(width_mult))
        config = utils.read_json(source / utils.CONFIG_FILE)
        config["width_mult"], config["thresholds"] = str(width_mult), None
        config["id2label"] = {str(i): name for i, name in enumerate(self.labels)}
        config["label2id"] = {name: i for i, name in enumerate(self.labels)}
        config["max_seq_length"] = self.args.max_seq_length
        config["pruning"] = dev_figures
        model.set_device("cpu")
        with utils.atomic_folder(target) as folder:
            model.write_weights(folder / utils.WEIGHTS_FILE, student)
            model.write_bundle(folder, student, config, source)
            shutil.copyfile(folder / utils.CONFIG_FILE, folder / "model_config.json")
            new_files = {file.name for file in folder.iterdir()}
        model.remove_old_graphs(target, new_files)
        model.set_device(self.args.device)  # the static graph also took the threads away
        logger.info("Save the best student of width %s in %s", width_mult, target)
