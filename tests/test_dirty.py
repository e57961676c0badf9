"""analysis/dirty.py: does it find wrong labels, and are its files complete?"""

import os
import shutil
import subprocess
import sys
import time

import dirty
import numpy as np
import pytest
from conftest import RARE_LABEL, REPO, SAMPLE
from label_noise import inject_noise

import utils

LABELS = utils.read_labels(SAMPLE / "label.txt")


@pytest.fixture
def data(hard_data, tmp_path):
    return shutil.copytree(hard_data, tmp_path / "data")


@pytest.fixture
def run(data, run_cli):
    def run(*flags, dataset_dir=data):
        own = ["--dataset_dir", dataset_dir, "--dirty_num", 20, "--device", "cpu"]
        return run_cli(dirty.main, [*own, *flags])

    return run


def pipe_with(path):
    """The path of a pipe that gives the file's content (up to 64 KiB) once."""
    reader, writer = os.pipe()
    os.write(writer, path.read_bytes())
    os.close(writer)
    return f"/dev/fd/{reader}"


def lines(path):
    return path.read_text("utf-8").splitlines()


def found_share(run, tmp_path, examples, labels, *flags):
    """The share of samples with wrong labels that the strategy finds among as many suspects."""
    texts, label_ids = examples
    noisy, chosen = inject_noise(label_ids, 0.1, "set", seed=1)
    folder = tmp_path / "noisy"
    folder.mkdir(exist_ok=True)
    lines = dirty.data_lines(texts, noisy, labels)
    (folder / "train.txt").write_text("".join(lines), "utf-8")
    with open(folder / "label.txt", "w", encoding="utf-8") as file:
        file.writelines(label + "\n" for label in labels)
    assert run("--dirty_num", len(chosen), *flags, dataset_dir=folder)[0] == 0
    wrong = {(texts[i], *noisy[i]) for i in chosen}
    suspects = zip(*utils.read_examples(folder / "train_dirty.txt", labels))
    return sum((text, *ids) in wrong for text, ids in suspects) / len(chosen)


def test_finds_wrong_labels(run, tmp_path, checkpoint):
    """Random picking finds 10 %."""
    examples = utils.read_examples(SAMPLE / "train.txt", LABELS)
    share = found_share(run, tmp_path, examples, LABELS)
    trustai = ["--strategy", "trustai", "--params_path", checkpoint]
    assert share > 0.6 and found_share(run, tmp_path, examples, LABELS, *trustai) < share / 2


def test_finds_wrong_labels_in_real_data(run, tmp_path, shared):
    folder = shared / "data" / "divorce"
    labels = utils.read_labels(folder / "label.txt")
    texts, label_ids = utils.read_examples(folder / "train.txt", labels)
    assert found_share(run, tmp_path, (texts[:4000], label_ids[:4000]), labels) > 0.6


@pytest.mark.parametrize("strategy", ["tfidf", "trustai"])
def test_files(run, data, checkpoint, strategy):
    status, error = run("--strategy", strategy, "--params_path", checkpoint)
    assert status == 0
    train, suspects = lines(data / "train.txt"), lines(data / "train_dirty.txt")
    rest = lines(data / "train_dirty_rest.txt")
    assert f"20 dirty samples saved in {data / 'train_dirty.txt'}, the rest in" in error
    assert len(suspects) == 20 and sorted(suspects + rest) == sorted(train)
    # Both keep the order of the training set.
    position = {line: i for i, line in enumerate(train)}
    for some in (suspects, rest):
        assert [position[line] for line in some] == sorted(position[line] for line in some)
    header, *scored = (line.split("\t") for line in lines(data / "train_dirty.scores.tsv"))
    columns = dict(zip(header, zip(*scored)))
    assert list(zip(columns["text"], columns["label"])) != []
    pairs = [f"{text}\t{label}" for text, label in zip(columns["text"], columns["label"])]
    assert sorted(pairs) == sorted(train) and sorted(pairs[:20]) == sorted(suspects)
    scores = ["score"] if strategy == "tfidf" else ["classes", "weight"]
    assert header == [*scores, "label", *["suggested_label"][: strategy == "tfidf"], "text"]
    keys = list(zip(*([float(v) for v in columns[name]] for name in scores)))
    assert keys == sorted(keys, reverse=True) and len(set(keys)) > 100


def test_suggested_labels(run, data):
    """A sample with another's labels gets its own suggested; a missing label is suggested."""
    train = lines(data / "train.txt")
    i = next(i for i, line in enumerate(train) if line.endswith("\t准予离婚"))
    train[i] = train[i].replace("\t准予离婚", "\t支付抚养费")
    (data / "train.txt").write_text("\n".join(train) + "\n", "utf-8")
    assert run()[0] == 0
    first = [line.split("\t") for line in lines(data / "train_dirty.scores.tsv")[1:21]]
    suggested = {text: label for _, _, label, text in first}
    assert suggested[train[i].split("\t")[0]] == "准予离婚"


def test_same_result_without_paddle_and_for_any_hash_seed(data):
    """The default runs where neither Paddle nor TrustAI is installed."""
    code = (
        "import sys; sys.modules.update(paddle=None, trustai=None); "
        f"sys.path.insert(0, {str(REPO / 'analysis')!r}); import dirty; "
        f"dirty.main(['--dataset_dir', {str(data)!r}, '--dirty_num', '20'])"
    )
    results = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        results.append((data / "train_dirty.scores.tsv").read_bytes())
    assert results[0] == results[1]


def test_other_seed_other_folds(run, data):
    results = []
    for seed in (1, 2):
        run("--seed", seed)
        results.append(lines(data / "train_dirty.scores.tsv"))
    assert results[0] != results[1]


def test_equal_texts_share_a_fold():
    texts = [f"t{i % 7}" for i in range(100)]
    fold_of = dirty.folds_of(texts, 3, seed=1)
    assert set(fold_of) == {0, 1, 2}
    assert all(len(set(fold_of[i::7])) == 1 for i in range(7))


def test_suspicion():
    """Against a loop over samples and labels."""
    rng = np.random.default_rng(1)
    probs, targets = rng.random((50, 4)), (rng.random((50, 4)) < 0.3).astype(np.float32)
    targets[:, 3] = 0  # a label that no sample has
    probs[0] = (0, 1, 0.5, 0)
    loss = [
        [-np.log(max(p if t else 1 - p, 1e-6)) for p, t in zip(*row)] for row in zip(probs, targets)
    ]
    expected = np.zeros(50)
    for i, c in np.ndindex(50, 4):
        same = [loss[j][c] for j in range(50) if targets[j, c] == targets[i, c]]
        every = [loss[j][d] for j, d in np.ndindex(50, 4) if targets[j, d] == targets[i, c]]
        expected[i] += loss[i][c] - (sum(same) + 3 * np.mean(every)) / (len(same) + 3)
    np.testing.assert_allclose(dirty.suspicion(probs, targets), expected, rtol=1e-12)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_rare_label_given_wrongly(run, tmp_path, number):
    """Samples that nobody else shares the label with are no standard for each other."""
    folder = shutil.copytree(SAMPLE, tmp_path / "sample")
    train = lines(folder / "train.txt")
    for i in range(number):
        train[7 + 40 * i] += ",虚构标签" if train[7 + 40 * i].split("\t")[1] else "虚构标签"
    (folder / "train.txt").write_text("\n".join(train) + "\n", "utf-8")
    with open(folder / "label.txt", "a", encoding="utf-8") as file:
        file.write("虚构标签\n")
    assert run("--dirty_num", "100", dataset_dir=folder)[0] == 0
    assert sum("虚构标签" in line for line in lines(folder / "train_dirty.txt")) == number


def test_threshold_of_trustai(run, data, checkpoint):
    flags = ["--strategy", "trustai", "--params_path", checkpoint]
    counts = []
    for threshold in ("0", "1e-4", "1"):
        run(*flags, "--dirty_threshold", threshold)
        rows = [line.split("\t") for line in lines(data / "train_dirty.scores.tsv")[1:]]
        counts.append(sum(int(row[0]) for row in rows))
    assert counts[0] > counts[1] > 0 and counts[2] == 0


def test_max_seq_length_reaches_train(run, data, tiny_model):
    flags = ["--strategy", "finetune", "--folds", "2", "--folds_dir", data / "folds"]
    flags.append(f"--train_args=--model_name {tiny_model} --epochs 1 --batch_size 8")
    assert run(*flags, "--max_seq_length", "64")[0] == 0
    assert utils.read_model_info(data / "folds" / "1").max_seq_length == 64
    status, error = run(*flags, "--max_seq_length", "32")
    assert status == 2 and f"train.py on fold 1 in {data / 'folds' / '0'}, exit status 2: " in error


def test_rare_and_missing_labels(run, data):
    """One sample of a label, none of another: in its fold nothing can be learned about it."""
    train = [line for line in lines(data / "train.txt") if RARE_LABEL not in line]
    (data / "train.txt").write_text("\n".join([*train, f"婚前购房一套。\t{RARE_LABEL}"]), "utf-8")
    with open(data / "label.txt", "a", encoding="utf-8") as file:
        file.write("无样本\n")
    status, error = run()
    assert status == 0 and "Traceback" not in error and "Warning" not in error
    scores = [line.split("\t")[0] for line in lines(data / "train_dirty.scores.tsv")[1:]]
    assert np.isfinite(np.array(scores, dtype=float)).all()


def test_finetune(run, data, tiny_model):
    """train.py for each fold; with --folds_dir the same command does not train again."""
    folds = data / "folds"
    flags = ["--strategy", "finetune", "--folds", "2", "--folds_dir", folds]
    flags.append(f"--train_args=--model_name {tiny_model} --epochs 1 --batch_size 8")
    once = [f"--{name}_file={pipe_with(data / f'{name}.txt')}" for name in ("dev", "label")]
    status, error = run(*flags, *once)  # pipes: each is read once, whatever the number of folds
    assert status == 0 and "Fold 2 of 2" in error and "global step" in error, error
    result = lines(data / "train_dirty.scores.tsv")
    parts = [set(lines(folds / str(fold) / "train.txt")) for fold in range(2)]
    train = set(lines(data / "train.txt"))
    assert parts[0] | parts[1] == train and not parts[0] & parts[1]
    status, error = run(*flags)
    assert status == 0 and error.count("nothing to resume") == 2 and "global step" not in error
    assert lines(data / "train_dirty.scores.tsv") == result


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """fake_train(code): the code runs in the place of train.py."""

    def write(code):
        (tmp_path / "train.py").write_text(code)

    monkeypatch.setattr(dirty, "ROOT", tmp_path)
    return write


def test_what_train_says_last_is_the_message(run, fake_train):
    fake_train("import sys; print('error: a.txt:1: bad\\nb.txt:2: bad', file=sys.stderr); exit(2)")
    status, error = run("--strategy", "finetune")
    assert status == 2 and error.endswith(", exit status 2: a.txt:1: bad b.txt:2: bad\n")
    fake_train("import os; os.kill(os.getpid(), 9)")
    status, error = run("--strategy", "finetune")
    assert status == 2 and "train.py on fold 1 in " in error and ", exit status -9: " in error


def test_ctrl_c_stops_train(run, fake_train, tmp_path):
    """Also where the terminal's signal reaches dirty.py alone."""
    fake_train(
        "import os, pathlib, signal, time\n"
        "pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(600)\n"
    )
    start = time.monotonic()
    status, error = run("--strategy", "finetune")
    assert status == 130 and "interrupted" in error and time.monotonic() - start < 300
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_folds_do_not_replace_inputs(run, data):
    folder = shutil.copytree(data, data / "folds" / "1")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    flags = ["--strategy", "finetune", "--folds_dir", data / "folds", "--folds", "2"]
    status, error = run(*flags, dataset_dir=folder)
    assert status == 2 and f"cannot write {folder / 'train.txt'}: it is an input" in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_checkpoint_is_not_replaced(run, checkpoint):
    before = (checkpoint / "config.json").read_bytes()
    flags = ["--strategy", "trustai", "--params_path", checkpoint]
    status, error = run(*flags, "--dirty_file", checkpoint / "config.json")
    assert status == 2 and "config.json: it is an input of this command" in error
    assert (checkpoint / "config.json").read_bytes() == before


FAULTS = {
    "too many": (["--dirty_num", "300"], "--dirty_num 300: train.txt has only 300 samples"),
    "no train": (["--train_file", "x.txt"], "x.txt: No such file"),
    "no label": (["--label_file", "x.txt"], "x.txt: No such file"),
    "no folder": (["--rest_file", "x/r.txt"], "r.txt: no folder"),
    "too few texts": (["--folds", "301"], "train.txt: fewer different texts than --folds 301"),
    "no checkpoint": (["--strategy", "trustai", "--params_path", "none"], "none: no such folder"),
    "over an input": (["--rest_file", "train.txt"], "train.txt: it is an input of this command"),
    "twice": (["--rest_file", "train_dirty.txt"], "train_dirty.txt: it is another result"),
    "open quotation": (["--train_args", "'x"], "argument --train_args: invalid split value"),
    "train.py's error": (
        ["--strategy", "finetune", "--train_args", "--model_name none"],
        "--model_name none: neither a folder nor one of",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors(run, data, fault):
    before = sorted(path.name for path in data.iterdir())
    flags, message = FAULTS[fault]
    status, error = run(*flags)
    assert status == 2 and message in error and "Traceback" not in error
    assert sorted(path.name for path in data.iterdir()) == before


def test_texts_too_short_for_ngrams(run, data):
    (data / "train.txt").write_text("".join(f"{c}\t\n" for c in "甲乙丙丁戊己庚辛"), "utf-8")
    status, error = run("--dirty_num", "2")
    assert status == 2 and "train.txt: too few or too short texts" in error


def test_checkpoint_of_other_labels(run, data, checkpoint):
    (data / "label.txt").write_text("\n".join(LABELS[::-1]), "utf-8")
    status, error = run("--strategy", "trustai", "--params_path", checkpoint)
    assert status == 2 and "label.txt:1: " in error and "where the model has" in error
