"""The READMEs: commands, flags, links, twins; the benchmarks in a smaller form; the style."""

import functools
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPO

import utils

FIRST = ["README.md", "README_en.md"]
FOLDERS = ["analysis", "benchmarks", "data", "deploy"]
PAGES = FIRST + [
    str(path.relative_to(REPO))
    for folder in FOLDERS
    for path in sorted((REPO / folder).rglob("*.md"))
]
CHINESE = [page for page in PAGES if not page.endswith("_en.md")]
DEPLOY = "deploy/predictor/README.md"
ANALYSIS = "analysis/README.md"
# Every file that takes flags. hf_trainer.py needs torch, which this project does not install.
SCRIPTS = {
    path.name: path
    for folder in ["", *(f"{folder}/**/" for folder in FOLDERS)]
    for path in REPO.glob(f"{folder}*.py")
    if "__main__" in path.read_text("utf-8")
    and "parse_args(" in path.read_text("utf-8")
    and path.name != "hf_trainer.py"
}
LAUNCHER_FLAGS = {"gpus", "nproc_per_node", "backend", "nnodes", "master", "rank"}  # Paddle's
# The flags of the mission's commands.
MISSION = {
    "train.py": """device dataset_dir train_file dev_file label_file save_dir max_seq_length
        model_name batch_size learning_rate epochs early_stop early_stop_nums logging_steps
        weight_decay warmup warmup_steps init_from_ckpt seed""",
    "predict.py": """device dataset_dir data_file label_file output_file params_path max_seq_length
        batch_size""",
    "export_model.py": "params_path output_path",
    "prune.py": """output_dir device per_device_train_batch_size per_device_eval_batch_size
        learning_rate num_train_epochs logging_steps save_steps seed dataset_dir max_seq_length
        params_dir width_mult""",
}
# The script in a command, and what it must leave behind (None: it prints).
MADE = {
    "train.py": "checkpoint/config.json",
    "predict.py": "output.txt",
    "evaluate.py": "bad_case.txt",
    "init_model.py": "random_ernie/config.json",
    "export_model.py": "export/config.json",
    "prune.py": "prune/0.5/config.json",
    "infer.py": None,
    "baseline.py": None,
    "onnx_speed.py": None,
    "bundles.py": None,
    "long_text.py": None,
}


def read(page):
    return (REPO / page).read_text(encoding="utf-8")


def twin(page):
    """The English page of a Chinese one."""
    return page.removesuffix(".md") + "_en.md"


def blocks(text, language=r"\w*"):
    """The code blocks of a page, continuation lines joined."""
    for block in re.findall(rf"```{language}\n(.*?)```", text, re.S):
        yield block.replace("\\\n", " ")


def commands(page):
    """The shell commands of a page as lists of arguments."""
    for block in blocks(read(page), "shell"):
        for line in block.splitlines():
            if command := line.split("#")[0].strip():
                yield shlex.split(command)


def run_script(command):
    """Runs `python script.py ...` in this process."""
    importlib.import_module(Path(command[1]).stem).main(command[2:])


def smaller(argv, paths):
    """The command's own flags with the sample instead of the data and one epoch instead of 100."""
    replaced = {**paths, "--device": "cpu", "--epochs": "1", "--batch_size": "8"}
    argv = list(argv)
    for i, flag in enumerate(argv[:-1]):
        if flag in replaced:
            argv[i + 1] = str(replaced[flag])
    return argv


# ------------------------------------------------------------------------------------- commands
def test_the_four_commands(small_data, tiny_model, tmp_path, monkeypatch):
    """As they are pasted, one after the other; only the weights are not downloaded."""
    (tmp_path / "my_data").symlink_to(small_data)
    monkeypatch.chdir(tmp_path)
    install, *scripts = list(commands("README.md"))[:4]
    assert install[-1] == "requirements.txt" and (REPO / "requirements.txt").exists()
    for command in scripts:
        assert "my_data" in command
        run_script(smaller(command, {"--model_name": tiny_model}))
    assert (tmp_path / "bad_case.txt").exists()
    assert len((tmp_path / "output.txt").read_text("utf-8").splitlines()) == 11


def python_commands():
    for page in ["README.md", DEPLOY, "benchmarks/README.md"]:
        for command in commands(page):
            if command[0] == "python" and "-m" not in command and "my_data" not in command:
                yield pytest.param(command, id=f"{page}-{command[1]}")


@pytest.mark.parametrize("command", python_commands())
def test_readme_command(
    command, small_data, tiny_model, checkpoint, bundle, tmp_path, monkeypatch, capsys
):
    paths = {"--dataset_dir": small_data, "--model_name": tiny_model, "--params_path": checkpoint}
    paths["--save_dir"] = tmp_path / "checkpoint"
    paths |= {"--params_dir": checkpoint, "--num_train_epochs": 1, "--width_mult": "1/2"}
    paths["--model_path_prefix"] = shutil.copytree(bundle, tmp_path / "bundle") / "float32"
    shutil.copytree(bundle, tmp_path / "prune" / "0.6666666666666666")
    monkeypatch.chdir(tmp_path)
    run_script(smaller(command, paths))
    made = "output.txt" if "--output_file" in command else MADE[Path(command[1]).name]
    assert (tmp_path / made).exists() if made else capsys.readouterr().out


def test_commands_of_the_data_readme(tiny_model, tmp_path, monkeypatch):
    """In their order in one folder, as a reader gives them; the others would change data/."""
    (tmp_path / "data").symlink_to(REPO / "data")
    (tmp_path / "tiny_ernie").symlink_to(tiny_model)
    for name, old in (("doccano", ""), ("more", ""), ("valid", ""), ("dirty", "\t旧")):
        records = [
            {"id": i, "data": f"文{i}{old}", "label": ["甲", "乙"][i % 2 :]} for i in range(30)
        ]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    given = [c for c in commands("data/README.md") if c[1] in ("data/doccano.py", "data/check.py")]
    for command in given:
        importlib.import_module(Path(command[1]).stem).main(command[2:])
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("[mc]*/*")}
    names = "train dev test data label valid train_dirty".split()
    expected = {f"my_data/{name}.txt" for name in names}
    expected |= {f"my_data2/{name}.txt" for name in ("train", "dev", "data", "label")}
    plots = {f"check/{name}.png" for name in ("labels", "samples", "co_occurrence")}
    assert written == {*expected, *plots, "check/report.json"} and len(given) == 6


def test_commands_of_the_analysis_readme(checkpoint, bundle, word_lists, tmp_path, monkeypatch):
    """In their order, in a folder beside the data, the checkpoint and the bundle."""
    shutil.copytree(REPO / "data", tmp_path / "data")
    (tmp_path / "checkpoint").symlink_to(checkpoint)
    shutil.copytree(bundle, tmp_path / "export")
    (tmp_path / "analysis").mkdir()
    monkeypatch.chdir(tmp_path / "analysis")
    shutil.copytree(word_lists, "word_lists")
    shutil.copy(word_lists.parent / "synonyms.txt", "synonyms.txt")
    given = [c for c in commands(ANALYSIS) if c[0] != "pip"]
    for command in given:
        if command[0] == "python":
            importlib.import_module(Path(command[1]).stem).main(command[2:])
        else:  # awk and cat put files together
            *parts, arrow, target = command[1:]
            program = [command[0], *parts]
            output = subprocess.run(program, check=True, capture_output=True).stdout
            assert arrow == ">" and output
            Path(target).write_bytes(output)
    labels = utils.read_labels(tmp_path / "data" / "label.txt")
    sizes = {
        name: len(utils.read_examples(tmp_path / "data" / f"{name}.txt", labels)[0])
        for name in ("train_dirty", "train_clean", "support", "train_sparse_aug", "train_aug")
    }
    assert sizes["train_dirty"] == 100 and sizes["train_clean"] == 2000
    assert sizes["train_sparse_aug"] == 2000 + sizes["support"] and sizes["train_aug"] > 5500
    for name in ("to_label.txt", "sent_interpret.txt", "train_dirty.scores.tsv"):
        assert (tmp_path / "data" / name).stat().st_size > 100


def test_launch_command(small_data, tiny_model, tmp_path):
    command = next(c for c in commands("README.md") if "-m" in c and "train.py" in c)
    paths = {"--dataset_dir": small_data, "--model_name": tiny_model}
    paths["--save_dir"] = tmp_path / "checkpoint"
    argv = [str(REPO / a) if a == "train.py" else a for a in smaller(command[1:], paths)]
    run = subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert utils.read_model_info(tmp_path / "checkpoint").labels


# ---------------------------------------------------------------------------------------- flags
@functools.cache
def flags_of(script):
    """{flag: its help} of a script, as a user sees it."""
    environment = {**os.environ, "COLUMNS": "200"}
    run = subprocess.run(
        [sys.executable, SCRIPTS[script], "--help"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    flags = {}
    for entry in re.split(r"\n  (?=\S)", run.stdout)[1:]:
        name, _, text = " ".join(entry.split("\n\n")[0].split()).partition(" ")
        flags[name.strip(",-")] = text
    del flags["h"]  # -h, --help
    return flags


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_every_help_ends_in_its_default(script):
    without = {
        flag for flag, text in flags_of(script).items() if not re.search(r"\(default: .*\)$", text)
    }
    assert without == set()


def named_in_commands(text):
    """(script, flag) of the commands in a page's blocks and in its prose."""
    lines = [line for block in blocks(text) for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for line in lines + re.findall(r"`([^`\n]+)`", prose):
        for value in re.findall(r'"(--\w+ [^"]*)"', line):  # of --train_args, --train_flags
            for flag in re.findall(r"--(\w+)", value):
                yield "train.py", flag
        script = None
        for word in re.sub(r'"[^"]*"', "", line).split():
            if Path(word).name in SCRIPTS:
                script = Path(word).name
            elif word == "--":  # what follows is for another program
                break
            elif script and (flag := re.match(r"--(?!help)(\w+)", word)):
                yield script, flag[1]


def named_in_lists(text):
    """(scripts of the section, flag) of the lists and tables of flags."""
    for section in re.split(r"^#+ ", text, flags=re.M):
        scripts = {script for script in SCRIPTS if re.search(rf"\b{script}", section)}
        named = []
        for line in re.findall(r"^\* (`\w+`.*)", section, re.M):
            named += re.findall(r"((?:`\w+`(?:、|, )?)+)(?:：|: )", line)
        for table in re.findall(r"^\| (?:参数|flag) \|.*\n((?:\|.*\n)+)", section, re.M):
            named += re.findall(r"^\| (.*?) \|", table, re.M)
        for flag in re.findall(r"`(\w+)`", " ".join(named)):
            yield scripts, flag


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    text = read(page)
    unknown = {
        f"{script} --{flag}"
        for script, flag in named_in_commands(text)
        if flag not in flags_of(script)
    }
    for scripts, flag in named_in_lists(text):
        if not any(flag in flags_of(script) for script in scripts):
            unknown.add(flag)
    scripts = {script for script in SCRIPTS if re.search(rf"\b{script}", text)}
    known = LAUNCHER_FLAGS.union({"help"}, *(flags_of(script) for script in scripts))
    unknown |= set(re.findall(r"`--(\w+)(?![\w-])", text)) - known
    assert unknown == set()


@pytest.mark.parametrize("page", FIRST)
def test_flags_of_the_mission(page):
    listed = list(named_in_lists(read(page)))
    for script, flags in MISSION.items():
        named = {flag for scripts, flag in listed if script in scripts}
        assert set(flags.split()) - named == set(), script


# ---------------------------------------------------------------------------------------- pages
@pytest.mark.parametrize("page", CHINESE)
def test_twins(page):
    first, second = read(page), read(twin(page))
    limit = 260 if page in FIRST else 150
    assert max(len(text.splitlines()) for text in (first, second)) <= limit
    assert list(commands(page)) == list(commands(twin(page)))

    def outline(text):
        """Levels of the headings, and the fractional numbers in the tables."""
        text = re.sub(r"```.*?```", "", text, flags=re.S)
        rows = " ".join(re.findall(r"^\|.*\|$", text, re.M))
        return re.findall(r"^#+ ", text, re.M), re.findall(r"\d+\.\d+", rows)

    assert outline(first) == outline(second)


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links(page):
    """They lead somewhere, and to a page in the same language."""
    for target in re.findall(r"\]\(([^)]+)\)", read(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (REPO / page).parent / name if name else REPO / page
        assert path.exists(), target
        if name.endswith(".md") and name != "CHANGELOG.md" and Path(name).parent != Path():
            assert name.endswith("_en.md") == page.endswith("_en.md"), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, target


# ----------------------------------------------------------------------------------- benchmarks
def test_baseline_on_the_real_set(shared, capsys):
    """The figures that the README compares with."""
    import baseline

    baseline.main(["--dataset_dir", str(shared / "data" / "divorce")])
    result = json.loads(capsys.readouterr().out)
    assert (result["micro_f1"], result["macro_f1"]) == (88.87, 72.54)


def test_predict_speed_benchmark(small_data, checkpoint, capsys):
    import predict_speed

    predict_speed.main(["--dataset_dir", str(small_data), "--params_path", str(checkpoint)])
    result = json.loads(capsys.readouterr().out)
    assert result["texts_with_other_labels"] == 0 and result["largest_logit_difference"] < 1e-4


@pytest.fixture
def one_process(monkeypatch):
    """The benchmarks run scripts in this process: each new one takes seconds to import Paddle."""
    import common

    def run(script, *words, log=None, **flags):
        importlib.import_module(script.stem).main(common.argv(*words, **flags))

    monkeypatch.setattr(common, "run", run)


def test_losses_benchmark(small_data, tiny_model, tmp_path, capsys, one_process):
    import losses

    flags = ["--dataset_dir", str(small_data), "--model_name", str(tiny_model), "--seeds", "1", "2"]
    flags += ["--work_dir", str(tmp_path), "--recipes", "bce", "asl_pos_weight"]
    losses.main([*flags, "--train_flags", "--epochs 2 --learning_rate 1e-3 --batch_size 8"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rules = ["threshold 0.5", "tuned for macro_f1", "tuned for both"]
    assert [(r["loss"], r["rule"]) for r in rows] == [
        (loss, rule) for loss in ("bce", "asl_pos_weight") for rule in rules
    ]
    for row in rows[1:]:
        pairs = zip(row["macro_f1"]["seeds"], rows[0]["macro_f1"]["seeds"])
        expected = [round(value - base, 2) for value, base in pairs]
        assert row["macro_f1_gain"]["seeds"] == pytest.approx(expected, abs=0.011)


def test_many_labels_benchmark(tmp_path, monkeypatch):
    import common
    import many_labels

    def in_this_process(script, **flags):
        importlib.import_module(script.stem).main(common.argv(**flags))
        if script.stem == "predict":
            assert len(flags["output_file"].read_text("utf-8").splitlines()) == 51
        return 2.0, 300.0

    seconds, memory = many_labels.measured("-c", "x = b'1' * 2**28; print(sum(range(10**7)))")
    own = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )  # which a new process begins with
    assert 0.05 < seconds < 30 and 256 < memory < max(600, own + 100)
    with pytest.raises(utils.UserError, match="ZeroDivisionError"):
        many_labels.measured("-c", "1 / 0")
    monkeypatch.setattr(many_labels, "measured", in_this_process)
    assert list(many_labels.run_size(300, 50)) == [
        ["300", "50", "train.py", "2", "25", "300", "0"],
        ["300", "50", "evaluate.py", "2", "28", "300", "0"],
        ["300", "50", "predict.py", "2", "25", "300", "0"],
    ]
    many_labels.make_set(tmp_path, 2000, 3000)
    labels = utils.read_labels(tmp_path / "label.txt")
    texts, label_ids = utils.read_examples(tmp_path / "train.txt", labels)
    counts = Counter(i for ids in label_ids for i in ids)
    assert len(texts) == 3000 and counts[0] > 5 * counts[20] > 0 and max(counts) > 1900
    with pytest.raises(SystemExit):
        many_labels.parse_args(["--sizes", "10x"])


def test_long_text_benchmark(checkpoint, capsys):
    """Truncation misses the tails, windows find them."""
    import long_text

    flags = ["--dataset_dir", str(REPO / "data"), "--params_path", str(checkpoint)]
    long_text.main([*flags, "--tails"])
    cut, windows = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert cut["long_text"] == "truncate" and windows["long_text"] == "window"
    assert cut["texts"] == cut["windows"] == windows["texts"] > 300
    assert windows["windows"] >= 2 * windows["texts"]
    assert windows["micro_recall"] > cut["micro_recall"] + 30
    long_text.main(flags)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["texts"] for row in rows] == [6, 6] and rows[1]["windows"] >= 12


def test_data_quality_benchmarks(small_data, tiny_model, word_lists, tmp_path, capsys, one_process):
    import label_noise
    import sparse_support

    train_args = f"--model_name {tiny_model} --epochs 1 --batch_size 8"
    flags = ["--dataset_dir", small_data, "--folds", "2", "--train_args", train_args]
    for retrain, strategies in (("svm", ["finetune", "trustai"]), ("finetune", ["tfidf"])):
        own = ["--work_dir", tmp_path / "noise", "--retrain", retrain, "--seeds", "1"]
        label_noise.main([str(f) for f in (*flags, *own, "--strategies", *strategies)])
        *lines, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        assert len(lines) == 2 + len(strategies) and set(last["mean"]) == set(strategies)
        assert all(0 <= line.get("precision_and_recall", 0) <= 1 for line in lines)

    flags = ["--dataset_dir", small_data, "--num_train", 40, "--num", 5, "--seeds", 1, 2]
    flags += ["--work_dir", tmp_path / "support", "--dict_dir", word_lists]
    kinds = ["duplicate", "substitute", "annotate", "random", "aug_mix"]
    flags += ["--train_args", train_args, "--kinds", *kinds]
    sparse_support.main([str(flag) for flag in flags])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["train"] for line in lines] == ["base", *kinds] * 3
    mean = (lines[1]["svm_macro_f1"] + lines[7]["svm_macro_f1"]) / 2
    assert lines[13]["svm_macro_f1"]["mean"] == pytest.approx(mean, abs=0.011)
    sizes = {
        kind: len(
            (tmp_path / "support" / "1" / f"train_{kind}.txt").read_text("utf-8").splitlines()
        )
        for kind in kinds
    }
    assert set(sizes.values()) > {45} and sizes["aug_mix"] > 100


@pytest.mark.parametrize("kind", ["set", "drop", "add"])
def test_injected_noise(kind):
    from label_noise import inject_noise

    label_ids = [[i % 5, 5 + i % 3][: 1 + i % 2] if i % 10 else [] for i in range(200)]
    noisy, chosen = inject_noise(label_ids, 0.1, kind, seed=1)
    changed = [i for i in range(200) if set(noisy[i]) != set(label_ids[i])]
    assert changed == chosen.tolist() and len(changed) == 20
    for i in changed:
        new, old = set(noisy[i]), set(label_ids[i])
        if kind == "set":
            assert any(new == set(other) for other in label_ids)
        else:
            assert len(new ^ old) == 1 and (new < old) == (kind == "drop")
    assert inject_noise(label_ids, 0.1, kind, seed=1)[0] == noisy
    # Where only one sample can be given another label, only that is.
    if kind == "add":
        assert inject_noise([[0, 1], [0]], 1.0, kind, seed=1)[1].tolist() == [1]


def test_resume_benchmark(small_data, tiny_model, capsys):
    import resume

    flags = ["--epochs", "2", "--save_steps", "1", "--kills", "1", "--spread", "0.1"]
    resume.main(["--dataset_dir", str(small_data), "--model_name", str(tiny_model), *flags])
    assert json.loads(capsys.readouterr().out)["bit_identical_weights"]


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]])
def test_ruff(command):
    run = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=REPO, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_framework_in_the_shared_pipeline():
    """Deployments import utils and metric where there is no Paddle."""
    code = "import sys, utils, metric; print([m for m in sys.modules if m.startswith('paddle')])"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_gpu_requirements_follow_the_cpu_ones():
    def names(path):
        lines = (REPO / path).read_text().splitlines()
        found = [re.match(r"[\w.-]+", line.split("#")[0]) for line in lines if line[:1].isalpha()]
        return [m.group().removesuffix("-gpu") for m in found]

    assert sorted(names("requirements.txt")) == sorted(names("requirements-gpu.txt"))
