"""prune.py: parity of the supernet and the cut model, what a run leaves behind, bad input."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from fractions import Fraction

import infer
import numpy as np
import paddle
import paddle.nn.functional as F
import predictor
import pytest
from conftest import GRAPH_FILES, REPO, SAMPLE

import export_model
import metric
import model as models
import predict
import prune
import prune_trainer
import train
import utils

LABELS = utils.read_labels(SAMPLE / "label.txt")
BASE = ["--device", "cpu", "--learning_rate", "1e-3", "--logging_steps", "10"]
FILES = GRAPH_FILES | {
    "config.json",
    "model_config.json",
    "model_state.pdparams",
    "tokenizer_config.json",
    "vocab.txt",
}


def argv(data, params_dir, output_dir, *extra):
    paths = ["--dataset_dir", data, "--params_dir", params_dir, "--output_dir", output_dir]
    return [str(a) for a in [*BASE, *paths, *extra]]


@pytest.fixture(scope="module")
def pruned(checkpoint, tmp_path_factory):
    """3/4 and 1/2 of the demo's model, one epoch each."""
    folder = tmp_path_factory.mktemp("pruned")
    flags = ["--num_train_epochs", "1", "--width_mult", "3/4", "1/2"]
    prune.main(argv(SAMPLE, checkpoint, folder, *flags))
    return folder


@pytest.fixture
def teacher(checkpoint):
    """(model, encoded dev texts and label ids)."""
    model, info = models.load_checkpoint(checkpoint)
    texts, label_ids = utils.read_examples(SAMPLE / "dev.txt", info.labels)
    encoded, _ = utils.encode(texts, utils.load_tokenizer(checkpoint), info.max_seq_length)
    return model, (encoded, label_ids)


def logits_of(forward, encoded):
    return utils.logits_of(forward, encoded, 32, len(LABELS))


def supernet_forward(supernet):
    supernet.model.eval()

    def forward(**batch):
        with paddle.no_grad():
            return supernet(**{k: paddle.to_tensor(v) for k, v in batch.items()}).numpy()

    return forward


# --------------------------------------------------------------------------------------- parity
@pytest.mark.core
def test_importance_is_the_derivative_of_a_mask(teacher):
    """Against the difference of the loss when one head, one neuron is scaled a little."""
    model, examples = teacher
    index = [i for i in range(8)]
    chosen = tuple([part[i] for i in index] for part in examples)
    heads, neurons = prune_trainer.weight_importance(model, chosen, 20, 8)
    assert heads.shape == (2, 4) and neurons.shape == (2, 256)
    layer = model.base_model.encoder.layers[1]
    head_rows, step = slice(2 * 32, 3 * 32), 1e-2
    neuron = int(np.argmax(neurons[1]))

    def loss(parameter, rows, factor):
        original = parameter.numpy()
        changed = original.copy()
        changed[rows] *= factor
        parameter.set_value(changed)
        batch, targets = prune_trainer.make_batch(chosen, index, 20)
        with paddle.no_grad():
            value = float(F.binary_cross_entropy_with_logits(model(**batch), targets))
        parameter.set_value(original)
        return value

    def slope(parameter, rows):
        return (loss(parameter, rows, 1 + step) - loss(parameter, rows, 1 - step)) / (2 * step)

    out_proj = layer.self_attn.out_proj.weight
    assert abs(slope(out_proj, head_rows)) == pytest.approx(heads[1][2], rel=0.05, abs=1e-5)
    # A neuron counts twice: what it is given (linear1) and what it passes on (linear2).
    given = abs(slope(layer.linear2.weight, slice(neuron, neuron + 1)))
    assert 0 < given < neurons[1][neuron]


def test_reordering_changes_no_output_and_sorts(teacher):
    model, (encoded, label_ids) = teacher
    forward = models.dygraph_forward(model)
    before = logits_of(forward, encoded)
    scores = prune_trainer.weight_importance(model, (encoded[:64], label_ids[:64]), 20, 32)
    weight = model.base_model.encoder.layers[0].linear2.weight
    old = weight.numpy()
    prune_trainer.reorder(model, *scores)
    np.testing.assert_allclose(logits_of(forward, encoded), before, rtol=0, atol=1e-5)
    best = int(np.argmax(scores[1][0]))
    assert best != 0 and np.array_equal(weight.numpy()[0], old[best])
    again = prune_trainer.weight_importance(model, (encoded[:64], label_ids[:64]), 20, 32)
    for kind in again:
        assert (np.diff(kind, axis=1) <= 1e-3 * kind.max()).all()


@pytest.mark.core
@pytest.mark.parametrize("width", ["1", "3/4", "1/2", "1/4"])
def test_supernet_is_the_narrow_layers_and_at_full_width_the_teacher(teacher, checkpoint, width):
    model, (encoded, _) = teacher
    width = Fraction(width)
    expected = logits_of(models.dygraph_forward(model), encoded)
    supernet = prune_trainer.Supernet(model, width)
    found = logits_of(supernet_forward(supernet), encoded)
    if width == 1:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    else:
        assert np.abs(found - expected).max() > 0.1
    cut = prune_trainer.narrow_model(checkpoint, 20, width, "cpu")
    prune_trainer.set_student_weights(cut, supernet.weights())
    heads = {layer.self_attn.num_heads for layer in cut.base_model.encoder.layers}
    inner = {layer.linear1.weight.shape[1] for layer in cut.base_model.encoder.layers}
    assert (heads, inner) == ({4 * width}, {256 * width})
    np.testing.assert_allclose(
        logits_of(models.dygraph_forward(cut), encoded), found, rtol=0, atol=1e-5
    )


def test_losses():
    student = paddle.to_tensor([[0.5, -1.0, 2.0]])
    teacher = paddle.to_tensor([[3.0, -2.0, 0.0]])
    s, t = (1 / (1 + np.exp(-x.numpy().astype(float))) for x in (student, teacher))
    expected = -(t * np.log(s) + (1 - t) * np.log(1 - s)).sum()
    loss = prune_trainer.logits_loss(student, teacher, "sigmoid")
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    s, t = (np.exp(x.numpy()) / np.exp(x.numpy()).sum() for x in (student, teacher))
    loss = prune_trainer.logits_loss(student, teacher, "softmax")
    assert float(loss) == pytest.approx(-(t * np.log(s)).sum(), rel=1e-5)


# --------------------------------------------------------------------------------- a finished run
@pytest.mark.core
def test_files_and_accuracy(converter, pruned, checkpoint):
    assert {p.name for p in pruned.iterdir()} == {"0.75", "0.5"}
    texts, label_ids = utils.read_examples(SAMPLE / "dev.txt", LABELS)
    targets, sizes = utils.multi_hot(label_ids, 20), [checkpoint]
    for folder, floor in ((pruned / "0.75", 0.88), (pruned / "0.5", 0.80)):
        assert {p.name for p in folder.iterdir()} == FILES
        assert (folder / "config.json").read_text() == (folder / "model_config.json").read_text()
        info = utils.read_model_info(folder)
        assert (info.labels, info.max_seq_length) == (LABELS, 128)
        names, probs = predictor.Predictor(folder / "float32").predict(texts)
        (folder / "model.onnx").unlink()
        counts = metric.MultiLabelCounts(20)
        counts.update(metric.decode(probs), targets)
        assert counts.micro_f1 >= floor and any(names)
        sizes.append(folder)
    weights = [(folder / "model_state.pdparams").stat().st_size for folder in sizes]
    assert weights[0] > 1.1 * weights[1] > 1.1 * weights[2]


@pytest.mark.core
def test_cut_weights_predict_like_the_exported_graph(converter, pruned, tmp_path):
    """predict.py loads the dynamic weights, infer.py the static graph; export_model.py again."""
    folder = pruned / "0.75"
    flags = ["--device", "cpu", "--dataset_dir", SAMPLE, "--params_path", folder]
    predict.main([str(a) for a in [*flags, "--output_file", tmp_path / "predict.txt"]])
    export = ["--params_path", folder, "--output_path", tmp_path / "export", "--onnx"]
    export_model.main([str(a) for a in export])
    flags = ["--device", "cpu", "--dataset_dir", SAMPLE]
    flags += ["--model_path_prefix", tmp_path / "export" / "float32"]
    infer.main([str(a) for a in [*flags, "--output_file", tmp_path / "infer.txt"]])
    assert (tmp_path / "predict.txt").read_bytes() == (tmp_path / "infer.txt").read_bytes()
    model, info = models.load_checkpoint(folder)
    texts, _ = utils.read_examples(SAMPLE / "dev.txt", LABELS)
    encoded, _ = utils.encode(texts, utils.load_tokenizer(folder), info.max_seq_length)
    dynamic = logits_of(models.dygraph_forward(model), encoded)
    static = logits_of(models.static_forward(folder / "float32"), encoded)
    np.testing.assert_allclose(static, dynamic, rtol=0, atol=1e-4)


def test_one_width_does_not_shrink_the_next(pruned, checkpoint, tmp_path):
    flags = ["--num_train_epochs", "1", "--width_mult", "1/2"]
    prune.main(argv(SAMPLE, checkpoint, tmp_path, *flags))
    alone, after = (models.load_weights(f / "0.5/model_state.pdparams") for f in (tmp_path, pruned))
    assert alone.keys() == after.keys()
    assert all(np.array_equal(alone[name], after[name]) for name in alone)


def test_log_lines(checkpoint, small_data, tmp_path, run_cli):
    flags = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"]
    flags += ["--width_mult", "3/4", "--distill_loss", "softmax", "--gold_weight", "0.5"]
    status, err = run_cli(prune.main, argv(small_data, checkpoint, tmp_path, *flags))
    assert status == 0, err
    assert err.count("teacher model, eval loss: ") == 1
    assert err.count("width_mult: 0.75, eval loss: ") == 3  # steps 2 and 4, the epoch's end
    for line in (
        "Pruning starts.",
        "DynaBERT training starts. This period will cost some time.",
        "global step 4, epoch: 1, batch: 0, loss: ",
        "eval done total : ",
        "width_mult: 0.75, Best macro f1 score: ",
        "DynaBERT training finished.",
    ):
        assert line in err, line


def test_while_f1_is_0_the_lowest_loss_is_saved(
    checkpoint, small_data, tmp_path, monkeypatch, run_cli
):
    monkeypatch.setattr(metric, "DEFAULT_THRESHOLD", 0.9999)
    flags = ["--max_steps", "6", "--save_steps", "1", "--width_mult", "1/2"]
    _, err = run_cli(prune.main, argv(small_data, checkpoint, tmp_path, *flags))
    assert {p.name for p in (tmp_path / "0.5").iterdir()} == FILES
    lines = [line for line in err.splitlines() if "width_mult: 0.5, eval loss" in line]
    losses = [float(re.search(r"loss: ([\d.]+)", line)[1]) for line in lines]
    assert len(lines) == 6 and all("macro f1 score: 0.00000" in line for line in lines)
    kept = utils.read_json(tmp_path / "0.5" / "config.json")["pruning"]
    assert kept["step"] == 1 + losses.index(min(losses)) and kept["total_steps"] == 6
    assert kept["loss"] == pytest.approx(min(losses), abs=1e-5) and kept["macro_f1"] == 0


def test_gradients_are_averaged(monkeypatch):
    """Sums over two equal ranks must come out as the mean."""
    parameter = paddle.create_parameter([2], "float32")
    (parameter * paddle.to_tensor([2.0, 4.0])).sum().backward()
    other, without = (paddle.create_parameter([2, 3], "float32") for _ in range(2))
    (other * other).sum().backward()
    calls = []
    monkeypatch.setattr(models.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(models.dist, "all_reduce", lambda x: calls.append(x.set_value(x + x)))
    expected = 2 * other.numpy()
    models.average_gradients([parameter, without, other])
    assert parameter.grad.tolist() == [2, 4] and without.grad is None
    np.testing.assert_array_equal(other.grad.numpy(), expected)
    assert len(calls) == 1  # one exchange for all


def test_dropout_is_the_fast_one(checkpoint, small_data, tmp_path, monkeypatch):
    """Each step takes its masks from NumPy, with a seed of its own, as in train.py."""
    seeds, seed_dropout = [], models.seed_dropout
    monkeypatch.setattr(
        models, "seed_dropout", lambda seed: seeds.append(seed.entropy) or seed_dropout(seed)
    )
    flags = ["--max_steps", "2", "--width_mult", "1/2"]
    prune.main(argv(small_data, checkpoint, tmp_path, *flags))
    assert seeds == [(3, 0, 0), (3, 1, 0)]


def test_memory_does_not_grow_with_the_saves(checkpoint, small_data, tmp_path, monkeypatch):
    """Paddle keeps every model that was ever traced, so all saves must trace the same one."""
    traced, save_static = set(), models.save_static

    def watched(model, prefix):
        traced.add(model)
        save_static(model, prefix)

    monkeypatch.setattr(models, "save_static", watched)
    saves, save = [], prune_trainer.Pruner.save
    monkeypatch.setattr(prune_trainer.Pruner, "save", lambda *args: saves.append(1) or save(*args))
    scores = itertools.count(0, -1)  # each result is better
    monkeypatch.setattr(metric, "score", lambda result: next(scores))
    flags = ["--max_steps", "3", "--save_steps", "1", "--width_mult", "1/2"]
    prune.main(argv(small_data, checkpoint, tmp_path, *flags))
    assert len(saves) == 3 and len(traced) == 1


def test_launch_command(checkpoint, small_data, tmp_path):
    launch = ["-m", "paddle.distributed.launch", "--nproc_per_node=2", "--backend=gloo"]
    flags = ["--max_steps", "2", "--width_mult", "3/4", "1/2", "--per_device_train_batch_size", "8"]
    args = argv(small_data, checkpoint, tmp_path / "prune", *flags)
    command = [sys.executable, *launch, str(REPO / "prune.py"), *args]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("0.75", "0.5"):
        assert {p.name for p in (tmp_path / "prune" / name).iterdir()} == FILES


def test_two_processes_learn_what_one_does(checkpoint, small_data, tmp_path):
    """Half the batch on each of two ranks, averaged, is the step of one with the whole batch."""
    flags = ["--max_steps", "1", "--width_mult", "1/2", "--weight_decay", "0"]
    one = [*flags, "--per_device_train_batch_size", "96"]
    prune.main(argv(small_data, checkpoint, tmp_path / "one", *one))
    launch = ["-m", "paddle.distributed.launch", "--nproc_per_node=2", "--backend=gloo"]
    two = [*flags, "--per_device_train_batch_size", "48"]
    args = argv(small_data, checkpoint, tmp_path / "two", *two)
    command = [sys.executable, *launch, str(REPO / "prune.py"), *args]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    path = "0.5/model_state.pdparams"
    a, b = (models.load_weights(tmp_path / name / path) for name in ("one", "two"))
    # One step of AdamW moves a weight by the learning rate along the gradient's sign.
    for name in a:
        if name.endswith("weight") and "embedding" not in name:
            same = np.isclose(a[name], b[name], rtol=0, atol=2e-4)
            assert same.mean() > 0.95, name


# -------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--width_mult", "2/3"], "does not keep a whole number of the 4 heads; widths that fit: "),
        (["--width_mult", "2/3"], "1/4, 1/2, 3/4"),
        (["--width_mult", "0"], "--width_mult 0: give a fraction such as 2/3"),
        (["--width_mult", "3/2"], "--width_mult 3/2: give a fraction"),
        (["--width_mult", "1/0"], "--width_mult 1/0: give a fraction"),
        (["--width_mult", "__import__('os').getcwd()"], "give a fraction"),
        (["--params_dir", "no/such"], "no/such: no such folder"),
        (["--dataset_dir", "no/such"], "no/such/train.txt: No such file or directory"),
        (["--device", "gpu"], "--device gpu: this PaddlePaddle cannot use it"),
        (["--max_seq_length", "161"], "--max_seq_length 161: this model takes 3 to 160"),
        (["--fp16", "True"], "--fp16: unknown, or without effect on pruning"),
        (
            ["--no_such_flag", "1"],
            "--no_such_flag: unknown, or without effect on pruning",
        ),
        (["--num_train_epochs", "0"], "--num_train_epochs 0 is not a number above 0"),
        (["--num_train_epochs", "inf"], "--num_train_epochs: inf is not a number of at least 0.0"),
        (
            ["--lr_scheduler", "constant"],
            "--lr_scheduler: unknown, or without effect on pruning",
        ),
        (["--output_dir", "FILE/x"], "cannot write"),
        (["--save_steps", "0"], "argument --save_steps: 0 is not a number of at least 1"),
        (["--gold_weight", "1.5"], "--gold_weight 1.5 is not between 0 and 1"),
        (["--distill_loss", "mse"], "argument --distill_loss: invalid choice: 'mse'"),
    ],
)
def test_bad_flags(checkpoint, small_data, tmp_path, run_cli, flags, message):
    defaults = [] if "--width_mult" in flags else ["--width_mult", "1/2"]
    (tmp_path / "file").write_text("x")
    flags = [flag.replace("FILE", str(tmp_path / "file")) for flag in flags]
    args = argv(small_data, checkpoint, tmp_path / "prune", *defaults, *flags)
    status, err = run_cli(prune.main, args)
    assert status == 2 and message in err and "Traceback" not in err, err
    assert not (tmp_path / "prune").exists()


def test_targets(checkpoint, small_data, tmp_path, run_cli):
    """A model that is there is replaced with a warning; the teacher itself never."""
    teacher = shutil.copytree(checkpoint, tmp_path / "0.5")
    flags = ["--width_mult", "1/2", "--max_steps", "1", "--max_seq_length", "64"]
    status, err = run_cli(prune.main, argv(small_data, teacher, tmp_path, *flags))
    assert status == 2 and "0.5 is the checkpoint itself; give another folder" in err
    status, err = run_cli(prune.main, argv(small_data, checkpoint, tmp_path, *flags))
    assert status == 0 and "0.5 holds a model; the new one will replace it" in err
    assert "--max_seq_length 64, but the checkpoint was trained with 128" in err


def test_a_running_pruning_is_not_disturbed(checkpoint, small_data, tmp_path, run_cli, monkeypatch):
    """A second one of the same width, or a training there, is told so; another width may run."""
    args, saves = ["--width_mult", "1/2", "--max_steps", "1"], []

    def save(*given, save=prune_trainer.Pruner.save):
        if not saves:
            saves.append(1)
            advice = "wait until it ends, or give another folder"
            who = f"{tmp_path / '0.5'}: a pruning is running here (process {os.getpid()})"
            for other in (args, ["--width_mult", "3/4", "1/2"]):
                found = run_cli(prune.main, argv(small_data, checkpoint, tmp_path, *other))
                assert found == (2, f"error: --output_dir {who}; {advice}\n")
            flags = ["--dataset_dir", small_data, "--model_name", checkpoint, "--device", "cpu"]
            found = run_cli(train.main, [*flags, "--save_dir", tmp_path / "0.5"])
            assert found == (2, f"error: --save_dir {who}; {advice}\n")
            assert os.listdir(tmp_path) == ["0.5"]
            flags = ["--width_mult", "3/4", "--max_steps", "1"]
            prune.main(argv(small_data, checkpoint, tmp_path, *flags))
        save(*given)

    monkeypatch.setattr(prune_trainer.Pruner, "save", save)
    prune.main(argv(small_data, checkpoint, tmp_path, *args))
    assert saves and {p.name for p in (tmp_path / "0.5").iterdir()} == FILES


def test_labels_of_the_label_file(checkpoint, small_data, tmp_path, run_cli):
    """In another order they are the student's, too; others are refused."""
    data = shutil.copytree(small_data, tmp_path / "data")
    flags = ["--width_mult", "1/2", "--max_steps", "1", "--learning_rate", "0"]
    prune.main(argv(data, checkpoint, tmp_path / "a", *flags))
    labels = LABELS[::-1]
    (data / "label.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    status, err = run_cli(prune.main, argv(data, checkpoint, tmp_path / "b", *flags))
    line = "the same 20 labels in another order; the classifier takes the label file's\n"
    assert status == 0 and err.count(f"{checkpoint / utils.WEIGHTS_FILE}: {line}") == 1
    config = utils.read_json(tmp_path / "b" / "0.5" / "config.json")
    assert utils.read_model_info(tmp_path / "b" / "0.5").labels == labels
    assert config["label2id"] == {name: i for i, name in enumerate(labels)}
    results = []
    for name in ("a", "b"):
        model, _ = models.load_checkpoint(tmp_path / name / "0.5")
        encoded = [np.arange(2, 20), np.arange(30, 40)]
        results.append(logits_of(models.dygraph_forward(model), encoded))
    assert np.abs(results[0] - results[0][:, ::-1]).max() > 0.1
    np.testing.assert_allclose(results[1], results[0][:, ::-1], rtol=0, atol=1e-4)

    (data / "label.txt").write_text("\n".join([*labels[:-1], "新标签"]) + "\n", encoding="utf-8")
    status, err = run_cli(prune.main, argv(data, checkpoint, tmp_path / "c", *flags))
    known = f"is not among the 20 labels of {checkpoint / 'config.json'}"
    message = f"error: {data / 'label.txt'}:20: label '新标签' {known}; give the label file that it"
    assert status == 2 and err.endswith(f"{message} was trained with\n")
    assert not (tmp_path / "c").exists()


def test_same_width_twice_is_pruned_once():
    flags = ["--output_dir", "o", "--dataset_dir", "d", "--width_mult", "1/2", "0.5"]
    widths = prune.parse_args([*flags, "--width_mult", "'3/4'"]).width_mult
    assert widths == [Fraction(1, 2), Fraction(3, 4)]


def test_flags_have_the_readme_s_defaults():
    args = prune.parse_args(["--output_dir", "o", "--dataset_dir", "d"])
    values = [args.per_device_train_batch_size, args.per_device_eval_batch_size, args.seed]
    values += [args.learning_rate, args.num_train_epochs, args.logging_steps, args.save_steps]
    assert values == [32, 32, 3, 3e-5, 10, 5, 100] and args.max_seq_length == 128
    assert (args.device, args.params_dir) == ("gpu", "./checkpoint/")
    assert args.width_mult == [Fraction(2, 3)]


def test_a_pruned_model_is_not_pruned_again(pruned, small_data, tmp_path, run_cli):
    args = argv(small_data, pruned / "0.5", tmp_path / "again", "--width_mult", "1/2")
    status, err = run_cli(prune.main, args)
    assert status == 2 and "pruned already; give the checkpoint of full width" in err


def test_paddleslim_is_missing(checkpoint, small_data, tmp_path, run_cli, monkeypatch):
    monkeypatch.delitem(sys.modules, "prune_trainer")
    monkeypatch.setitem(sys.modules, "paddleslim.nas.ofa", None)
    args = argv(small_data, checkpoint, tmp_path / "prune", "--width_mult", "1/2")
    status, err = run_cli(prune.main, args)
    assert status == 2 and "Cannot import paddleslim, please install paddleslim==2.6.0" in err
