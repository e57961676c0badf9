"""Model folders in Hugging Face's format: what is computed, what is kept, what is refused."""

import contextlib
import io
import json
import re
import shutil

import init_model
import make_repository
import numpy as np
import paddle
import predictor
import pretrained
import pytest
from conftest import SAMPLE, needs_package
from safetensors.numpy import load_file, save_file
from scipy.special import erf
from tokenizers import Tokenizer

import export_model
import model as models
import prune
import train
import utils

LABELS = utils.read_labels(SAMPLE / "label.txt")
TEXTS = list(utils.read_texts(SAMPLE / "data.txt"))[:10]
# As Hugging Face's config.json has it; return_dict and the like would change what a model returns.
SETTINGS = {
    "architectures": ["ErnieForSequenceClassification"],
    "position_embedding_type": "absolute",
    "output_hidden_states": True,
    "return_dict": True,
    "torch_dtype": "float16",
    "transformers_version": "4.22.0",
    "use_cache": True,
}


def reference(weights, input_ids, heads, epsilon):
    """(hidden states, pooled output) of BERT or ERNIE in float64, from Hugging Face's names.

    Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers".
    """
    weights = {name: array.astype(np.float64) for name, array in weights.items()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    batch, length = input_ids.shape
    x = weights["embeddings.word_embeddings.weight"][input_ids]
    x = x + weights["embeddings.position_embeddings.weight"][:length]
    for kind in ("token_type", "task_type"):
        x = x + weights.get(f"embeddings.{kind}_embeddings.weight", np.zeros((1, 1)))[0]
    x = norm("embeddings.LayerNorm", x)
    for i in range(len({name.split(".")[2] for name in weights if name.startswith("encoder")})):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            linear(f"{layer}.attention.self.{part}", x).reshape(batch, length, heads, -1)
            for part in ("query", "key", "value")
        )
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        scores = np.exp(np.where(input_ids[:, None, None] == 0, -np.inf, scores))
        scores /= scores.sum(-1, keepdims=True)
        context = np.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape)
        attended = linear(f"{layer}.attention.output.dense", context)
        x = norm(f"{layer}.attention.output.LayerNorm", x + attended)
        inner = linear(f"{layer}.intermediate.dense", x)
        inner = linear(f"{layer}.output.dense", inner * (1 + erf(inner / 2**0.5)) / 2)
        x = norm(f"{layer}.output.LayerNorm", x + inner)
    return x, np.tanh(linear("pooler.dense", x[:, 0]))


def hugging_face_names(weights, layers):
    """Paddle's parameters of an ERNIE classifier under Hugging Face's names."""
    result = {}

    def put(theirs, ours, transpose=False):
        for part in ("weight", "bias"):
            array = weights[f"{ours}.{part}"]
            result[f"{theirs}.{part}"] = array.T.copy() if transpose and array.ndim == 2 else array

    for kind in ("word", "position", "token_type", "task_type"):
        name = f"embeddings.{kind}_embeddings.weight"
        result[name] = weights[f"ernie.{name}"]
    put("embeddings.LayerNorm", "ernie.embeddings.layer_norm")
    put("pooler.dense", "ernie.pooler.dense", transpose=True)
    put("classifier", "classifier", transpose=True)
    for i in range(layers):
        theirs, ours = f"encoder.layer.{i}", f"ernie.encoder.layers.{i}"
        for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            put(f"{theirs}.attention.self.{part}", f"{ours}.self_attn.{letter}_proj", True)
        put(f"{theirs}.attention.output.dense", f"{ours}.self_attn.out_proj", True)
        put(f"{theirs}.attention.output.LayerNorm", f"{ours}.norm1")
        put(f"{theirs}.intermediate.dense", f"{ours}.linear1", True)
        put(f"{theirs}.output.dense", f"{ours}.linear2", True)
        put(f"{theirs}.output.LayerNorm", f"{ours}.norm2")
    return result


@pytest.fixture(scope="module")
def source(tiny_model):
    """(config.json, Paddle's weights) of an ERNIE classifier in which no two parameters agree."""
    rng = np.random.default_rng(3)
    config = utils.read_json(tiny_model / "config.json")
    config |= {"layer_norm_eps": 1e-12, "id2label": {str(i): x for i, x in enumerate(LABELS)}}
    weights = init_model.random_weights(models.build_model(tiny_model, len(LABELS)), rng)
    weights |= {"classifier.weight": np.zeros((128, 20), "f4"), "classifier.bias": np.zeros(20)}
    noisy = {k: (v + rng.normal(0, 0.1, v.shape)).astype("f4") for k, v in weights.items()}
    return config, noisy


@pytest.fixture
def write(source, tiny_model, tmp_path):
    """write(arrays, **config) makes a Hugging Face folder; returns its path."""

    def write(arrays, file="model.safetensors", **changes):
        folder = tmp_path / "hugging_face"
        folder.mkdir(exist_ok=True)
        config = json.dumps({**source[0], **SETTINGS, **changes})
        (folder / "config.json").write_text(config, encoding="utf-8")
        shutil.copyfile(tiny_model / "vocab.txt", folder / "vocab.txt")
        if file:
            save_file(arrays, folder / file, metadata={"format": "pt"})
        return folder

    return write


@pytest.fixture
def arrays(source):
    return hugging_face_names(source[1], source[0]["num_hidden_layers"])


def batch_of(folder, texts=TEXTS):
    encoded, _ = utils.encode(texts, utils.load_tokenizer(folder), 128)
    return utils.pad(encoded)


def logits_of(model, batch):
    model.eval()
    return models.dygraph_forward(model)(**batch)


# -------------------------------------------------------------------------------- what is computed
@pytest.mark.core
@pytest.mark.parametrize("use_task_id", [True, False])
def test_ernie_gives_the_logits_of_the_paddle_folder(
    source, arrays, write, tiny_model, tmp_path, use_task_id
):
    folder = write(arrays, use_task_id=use_task_id)
    paddle_folder = shutil.copytree(tiny_model, tmp_path / "paddle")
    config = json.dumps({**source[0], "use_task_id": use_task_id})
    (paddle_folder / "config.json").write_text(config, encoding="utf-8")
    weights = dict(source[1])
    if not use_task_id:
        del weights["ernie.embeddings.task_type_embeddings.weight"]
    with open(paddle_folder / utils.WEIGHTS_FILE, "wb") as file:
        models.save_weights(file, weights)
    ours, theirs = (
        logits_of(models.load_folder(place, LABELS), batch_of(place))
        for place in (folder, paddle_folder)
    )
    assert np.array_equal(ours, theirs) and ours.std() > 0.1


def old_names(key):
    return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"ernie.{key}" if "classifier" not in key else key,
        lambda key: f"module.bert.{key}" if "classifier" not in key else f"module.{key}",
        old_names,
    ],
)
def test_names_of_other_conversions(arrays, write, rename):
    expected = load_state(write(arrays))
    extra = {
        "embeddings.position_ids": np.arange(160)[None],
        "cls.predictions.bias": np.zeros(3, "f4"),
        "cls.predictions.transform.LayerNorm.gamma": np.zeros(3, "f4"),
        "qa_outputs.weight": np.zeros((2, 128), "f4"),
        "lm_head.decoder.weight": np.zeros((2, 128), "f4"),
    }
    assert_equal(
        load_state(write({rename(k): v for k, v in {**arrays, **extra}.items()})), expected
    )


def load_state(folder, labels=LABELS):
    model = models.load_folder(folder, labels)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not np.array_equal(a[name], b[name])] == []


def write_bfloat16(path, arrays):
    """The upper halves of float32s; NumPy has no such type, so safetensors.numpy cannot do it."""
    halves = {
        k: (np.ascontiguousarray(v).view("<u4") >> 16).astype("<u2") for k, v in arrays.items()
    }
    header, offset = {}, 0
    for name, array in halves.items():
        place = [offset, offset := offset + array.nbytes]
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": place}
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in halves.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.core
def test_half_precision_and_several_files(arrays, write):
    """Every float16 and every bfloat16 is a float32."""
    expected = load_state(write(arrays))
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    found = load_state(write(half))
    assert_equal(found, {name: v.astype("f2").astype("f4") for name, v in expected.items()})
    folder = write(arrays)
    write_bfloat16(folder / "model.safetensors", arrays)
    upper = {name: (v.view("u4") >> 16 << 16).view("f4") for name, v in expected.items()}
    assert_equal(load_state(folder), upper)

    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(arrays)}
    for file in set(files.values()):
        save_file({name: arrays[name] for name in arrays if files[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert_equal(load_state(folder), expected)


@pytest.mark.parametrize("model_type", ["ernie", "bert"])
def test_epsilon_reaches_every_reader(arrays, write, small_data, tmp_path, model_type):
    """PaddleNLP's ERNIE ignores layer_norm_eps; it shows where what is normalised is small."""
    if model_type == "bert":
        del arrays["embeddings.task_type_embeddings.weight"]
    small = {name: 0.2 * array for name, array in arrays.items() if "_embeddings" in name}
    arrays |= small
    folder = write(arrays, layer_norm_eps=1e-3, model_type=model_type)
    batch = batch_of(folder)
    _, pooled = reference(arrays, batch["input_ids"], 4, 1e-3)
    expected = pooled @ arrays["classifier.weight"].T + arrays["classifier.bias"]
    _, other = reference(arrays, batch["input_ids"], 4, 1e-12)
    assert np.abs(other - pooled).max() > 0.01
    flags = f"--device cpu --dataset_dir {small_data} --model_name {folder} --epochs 1"
    train.main(f"{flags} --learning_rate 0 --save_dir {tmp_path / 'checkpoint'}".split())
    export(tmp_path)
    assert_all_agree(tmp_path, batch, expected)
    if model_type == "bert":  # a supernet of full width that learns nothing is the teacher
        flags = f"--device cpu --dataset_dir {small_data} --params_dir {tmp_path / 'checkpoint'}"
        flags += f" --output_dir {tmp_path} --width_mult 1 --max_steps 1 --learning_rate 0"
        prune.main(flags.split())
        forward = models.load_labeller(tmp_path / "1.0", "cpu").forward
        np.testing.assert_allclose(forward(**batch), expected, rtol=0, atol=1e-4)


def export(folder):
    paths = ["--params_path", str(folder / "checkpoint"), "--output_path", str(folder / "export")]
    export_model.main([*paths, "--onnx"])


def assert_all_agree(folder, batch, expected):
    """The checkpoint in the folder, predict.py's graph, the bundle and its ONNX file."""
    prefix = folder / "export" / "float32"
    forwards = [
        models.dygraph_forward(models.load_checkpoint(folder / "checkpoint")[0]),
        models.load_labeller(folder / "checkpoint", "cpu").forward,
        models.static_forward(prefix),
        predictor.onnx_forward(predictor.open_session(prefix)),
    ]
    for forward in forwards:
        np.testing.assert_allclose(forward(**batch), expected, rtol=0, atol=1e-4)


# --------------------------------------------------------------------- a real pretrained encoder
ENGLISH = [
    *["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."],
    *["", "Hi", "naïve café — $1,250.50 ½ 中文", "Shares of the bank fell by 3% on Monday. " * 30],
]


@pytest.fixture(scope="module")
def encoder(minilm):
    model = models.load_folder(minilm, ["a", "b"])
    model.eval()
    return model


def hidden_states(model, batch):
    with paddle.no_grad():
        return [x.numpy() for x in model.bert(*(paddle.to_tensor(x) for x in batch.values()))]


@pytest.mark.core
def test_minilm_computes_what_bert_is_defined_to_compute(minilm, encoder):
    weights = load_file(minilm / "model.safetensors")
    one_by_one = [batch_of(minilm, [text]) for text in ENGLISH]
    for batch in (batch_of(minilm, ENGLISH), *one_by_one):
        expected = reference(weights, batch["input_ids"], 12, 1e-12)
        states, pooled = hidden_states(encoder, batch)
        real = batch["input_ids"] > 0
        np.testing.assert_allclose(states[real], expected[0][real], rtol=0, atol=1e-4)
        np.testing.assert_allclose(pooled, expected[1], rtol=0, atol=1e-4)


@pytest.mark.core
def test_minilm_gives_the_published_similarities(minilm, encoder):
    """The example on the first page of Sentence Transformers' documentation (www.sbert.net)."""
    batch = batch_of(minilm, ENGLISH[:3])
    states, _ = hidden_states(encoder, batch)
    real = (batch["input_ids"] > 0)[..., None]
    vectors = (states * real).sum(axis=1) / real.sum(axis=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, published, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def english(minilm, tmp_path_factory):
    """A folder with a MiniLM checkpoint and its bundle, and the figures of the benchmark."""
    folder = tmp_path_factory.mktemp("english")
    flags = ["--model_name", minilm, "--work_dir", folder]
    flags += ["--num_train", 640, "--num_dev", 48, "--epochs", 1, "--learning_rate", 5e-4]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        pretrained.main([str(flag) for flag in flags])
    lines = map(json.loads, out.getvalue().splitlines())
    (folder / "pretrained").rename(folder / "checkpoint")
    export(folder)
    return folder, {line["start"]: line for line in lines}


def test_fine_tuning_beats_random_weights(english):
    folder, figures = english
    things = {word for lists in pretrained.TOPICS.values() for word in re.findall(r"\w+", lists)}
    train_words, dev_words = (
        set(re.findall(r"\w+", (folder / "data" / f"{name}.txt").read_text())) & things
        for name in ("train", "dev")
    )
    assert len(train_words) > 70 and len(dev_words) > 40
    assert not train_words & dev_words
    assert figures["pretrained"]["micro_f1"] >= figures["random"]["micro_f1"] + 20


def test_minilm_checkpoint_bundle_and_onnx_agree(english):
    """Its weights in the reference are the checkpoint's, so nothing else can explain the logits."""
    folder, _ = english
    batch = batch_of(folder / "checkpoint", ENGLISH[:5])
    weights = models.load_weights(folder / "checkpoint" / utils.WEIGHTS_FILE)
    renamed = {k.replace("bert.", "ernie."): v for k, v in weights.items()}
    task = {"ernie.embeddings.task_type_embeddings.weight": np.zeros((1, 384))}
    arrays = hugging_face_names({**renamed, **task}, 6)
    _, pooled = reference(arrays, batch["input_ids"], 12, 1e-12)
    expected = pooled @ weights["classifier.weight"] + weights["classifier.bias"]
    assert_all_agree(folder, batch, expected)


def test_every_consumer_tokenises_as_the_published_tokenizer(minilm, english, tmp_path):
    folder, _ = english
    published = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    published.no_padding()
    published.enable_truncation(128)
    expected = [encoding.ids for encoding in published.encode_batch(ENGLISH)]
    prefix = folder / "export" / "float32"
    repository = tmp_path / "repository"
    make_repository.main(["--model_path_prefix", str(prefix), "--output_dir", str(repository)])
    triton = Tokenizer.from_file(str(repository / "tokenizer" / "1" / "tokenizer.json"))
    encoded = [
        utils.encode(ENGLISH, utils.load_tokenizer(folder / "checkpoint"), 128)[0],
        predictor.Predictor(prefix).encode(ENGLISH),
        utils.encode(ENGLISH, triton, 128)[0],
    ]
    for ours in encoded:
        assert [ids.tolist() for ids in ours] == expected
    needs_package("paddle_serving_app")
    import convert

    server = tmp_path / "server"
    convert.main(
        ["--dirname", str(folder / "export"), "--serving_server", str(server)]
        + ["--serving_client", str(tmp_path / "client")]
    )
    ours, _ = utils.encode(ENGLISH, utils.load_tokenizer(server), 128)
    assert [ids.tolist() for ids in ours] == expected


# ------------------------------------------------------------------------------- what is kept
def test_classifier_is_kept_for_the_same_labels_only(source, arrays, write):
    folder, head = write(arrays), "classifier.weight"
    assert np.array_equal(load_state(folder)[head], source[1][head])
    assert not np.array_equal(load_state(folder, LABELS[::-1])[head], source[1][head])
    assert load_state(folder, LABELS[:3])[head].shape == (128, 3)
    del arrays["classifier.bias"], arrays[head]
    assert load_state(write(arrays, id2label=None))[head].shape == (128, 20)


def test_missing_pooler_is_told_once(source, arrays, write, capsys):
    bare = {name: array for name, array in arrays.items() if "pooler" not in name}
    state = load_state(write(bare))
    assert capsys.readouterr().err.count("no pooler; it starts from random weights") == 1
    pooler = [name for name in state if "pooler" in name]
    assert len(pooler) == 2 and state["ernie.pooler.dense.weight"].std() > 0.01
    assert_equal(
        {name: array for name, array in state.items() if name not in pooler},
        {name: array for name, array in source[1].items() if name not in pooler},
    )
    load_state(write(arrays))
    assert "pooler" not in capsys.readouterr().err


# ------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not supported; use one of gelu,"),
        ({"hidden_act": ["gelu"]}, "hidden_act ['gelu'] is not supported"),
        ({"pad_token_id": 1}, "pad_token_id 1 is not supported; use one of 0"),
        (
            {"model_type": "roberta"},
            "model_type 'roberta' is not supported; use one of ernie, bert",
        ),
        ({"num_hidden_layers": 1}, "superfluous parameter encoder.layer.1"),
        ({"num_hidden_layers": 3}, "no parameter encoder.layer.2.attention.self.query.weight"),
        ({"hidden_size": 64}, "has shape"),
        ({"layer_norm_eps": 0.1}, "layer_norm_eps 0.1 is not between 0 and 1e-3"),
        ({"num_attention_heads": 3}, "no valid model description"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob 1.5 is not a rate of at least 0"),
        ({"attention_probs_dropout_prob": "a"}, "attention_probs_dropout_prob 'a' is not a rate"),
        ({"width_mult": "1/0"}, "no valid model description"),
    ],
)
def test_descriptions_that_do_not_fit(
    arrays, write, small_data, run_cli, tmp_path, changes, message
):
    assert_refused(write(arrays, **changes), small_data, run_cli, tmp_path, message)


def assert_refused(folder, small_data, run_cli, tmp_path, message):
    flags = ["--device", "cpu", "--dataset_dir", small_data, "--model_name", folder]
    status, err = run_cli(train.main, [*flags, "--save_dir", tmp_path / "checkpoint"])
    assert status == 2 and message in err and "Traceback" not in err, err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("names", [[], ["../x.safetensors"], ["/dev/zero"], ["x\0.safetensors"]])
def test_shards_elsewhere(arrays, write, small_data, run_cli, tmp_path, names):
    folder = write(arrays)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {str(i): name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = "index.json: weight_map does not name files of this folder"
    assert_refused(folder, small_data, run_cli, tmp_path, message)


def test_tokenizer_settings_that_are_no_booleans(arrays, write, small_data, run_cli, tmp_path):
    folder = write(arrays)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": "false"}')
    message = "tokenizer_config.json: a tokenizer setting is not true or false"
    assert_refused(folder, small_data, run_cli, tmp_path, message)


def test_files_that_cannot_be_read(arrays, write, small_data, run_cli, tmp_path):
    missing = {k: v for k, v in arrays.items() if k != "encoder.layer.1.output.dense.bias"}
    message = "model.safetensors: no parameter encoder.layer.1.output.dense.bias, which"
    assert_refused(write(missing), small_data, run_cli, tmp_path, message)
    folder = write(arrays)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    message = "model.safetensors: broken weights file ("
    assert_refused(folder, small_data, run_cli, tmp_path, message)
    (folder / "model.safetensors").unlink()
    message = "neither model_state.pdparams nor model.safetensors"
    assert_refused(folder, small_data, run_cli, tmp_path, message)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    message = "pytorch_model.bin: a pickle, which can run any code when it is read; convert it to"
    assert_refused(folder, small_data, run_cli, tmp_path, message)
