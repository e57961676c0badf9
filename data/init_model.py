"""Makes a small ERNIE with random weights as a local folder, for work without a model hub.

    python data/init_model.py --output_dir tiny_ernie --dataset_dir data

The vocabulary is either a given vocab.txt or made of the characters and words of train.txt. The
folder goes to `train.py --model_name`. Random weights know nothing: prefer pretrained ones.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils  # noqa: E402

# (layers, hidden size, heads, intermediate size); all but tiny and small are ERNIE 3.0's.
SHAPES = {
    "tiny": (2, 128, 4, 256),
    "small": (2, 256, 4, 1024),
    "nano": (4, 312, 12, 1248),
    "micro": (4, 384, 12, 1536),
    "mini": (6, 384, 12, 1536),
    "medium": (6, 768, 12, 3072),
    "base": (12, 768, 12, 3072),
}


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="model folder to write")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="size of the encoder")
    parser.add_argument("--dataset_dir", help="its train.txt gives the vocabulary")
    parser.add_argument("--vocab_file", help="take this vocabulary instead")
    parser.add_argument(
        "--min_count", type=utils.at_least(1), default=2, help="rarer characters are left out"
    )
    parser.add_argument(
        "--max_position", type=utils.at_least(3), default=2048, help="longest sequence"
    )
    parser.add_argument("--dropout", type=utils.at_least(0.0), default=0.1, help="dropout rate")
    parser.add_argument("--seed", type=utils.at_least(0), default=3, help="seed of the weights")
    return parser.parse_args(argv)


def make_vocab(path, min_count):
    """Special tokens, then characters and Latin / digit runs by falling frequency."""
    counts = Counter()
    for line in utils.read_texts(path):
        counts.update(re.findall(r"[a-z]+|[0-9]+|\S", line.split("\t")[0].lower()))
    pieces = {c for token in counts if token.isascii() and token.isalnum() for c in token}
    tokens = [t for t, n in sorted(counts.items(), key=lambda x: (-x[1], x[0])) if n >= min_count]
    tokens += sorted(pieces - set(tokens)) + ["##" + c for c in sorted(pieces)]
    return ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *tokens]


def random_weights(config, rng):
    """{parameter name: float32 array} of an ErnieModel.

    ERNIE's N(0, 0.02) suits 768 inputs and pretraining; narrow layers that start from scratch
    learn several times as slowly from it. Linear layers are N(0, 1 / fan-in) (LeCun et al. 1998,
    "Efficient BackProp"), words N(0, 0.1), so that they outweigh their positions, N(0, 0.02).
    """
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    weights = {}

    def normal(name, *shape, std=0.02):
        weights[f"ernie.{name}"] = rng.normal(0, std, shape).astype(np.float32)

    def linear(name, n_in, n_out):
        normal(f"{name}.weight", n_in, n_out, std=n_in**-0.5)
        weights[f"ernie.{name}.bias"] = np.zeros(n_out, np.float32)

    def layer_norm(name):
        weights[f"ernie.{name}.weight"] = np.ones(hidden, np.float32)
        weights[f"ernie.{name}.bias"] = np.zeros(hidden, np.float32)

    normal("embeddings.word_embeddings.weight", config["vocab_size"], hidden, std=0.1)
    normal("embeddings.position_embeddings.weight", config["max_position_embeddings"], hidden)
    normal("embeddings.token_type_embeddings.weight", config["type_vocab_size"], hidden)
    normal("embeddings.task_type_embeddings.weight", config["task_type_vocab_size"], hidden)
    layer_norm("embeddings.layer_norm")
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{part}", hidden, hidden)
        linear(f"{layer}.linear1", hidden, ffn)
        linear(f"{layer}.linear2", ffn, hidden)
        layer_norm(f"{layer}.norm1")
        layer_norm(f"{layer}.norm2")
    linear("pooler.dense", hidden, hidden)
    return weights


def main(argv=None):
    args = parse_args(argv)
    if bool(args.vocab_file) == bool(args.dataset_dir):
        raise utils.UserError("give either --dataset_dir or --vocab_file")
    if args.vocab_file:
        vocab = list(utils.read_texts(args.vocab_file))
    else:
        vocab = make_vocab(Path(args.dataset_dir) / "train.txt", args.min_count)
    layers, hidden, heads, ffn = SHAPES[args.shape]
    config = {
        "architectures": ["ErnieModel"],
        "model_type": "ernie",
        "vocab_size": len(vocab),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "hidden_act": "gelu",
        "hidden_dropout_prob": args.dropout,
        "attention_probs_dropout_prob": args.dropout,
        "max_position_embeddings": args.max_position,
        "type_vocab_size": 4,
        "task_type_vocab_size": 3,
        "use_task_id": True,
        "initializer_range": 0.02,
        "pad_token_id": 0,
    }
    weights = random_weights(config, np.random.default_rng(args.seed))
    with utils.atomic_folder(args.output_dir) as folder:
        (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer = {"tokenizer_class": "ErnieTokenizer", "do_lower_case": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer) + "\n")
        utils.load_tokenizer(folder)  # checks the vocabulary
        with open(folder / utils.WEIGHTS_FILE, "wb") as file:
            utils.save_weights(file, weights)
    size = sum(w.size for w in weights.values()) / 1e6
    utils.logger.info(
        "Random ERNIE (%s, %d tokens, %.1f M parameters) in %s",
        *(args.shape, len(vocab), size, args.output_dir),
    )


if __name__ == "__main__":
    utils.cli(main)
