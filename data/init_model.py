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
import utils
from utils import at_least, logger

model = utils.LazyModule("model")

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
    add = parser.add_argument
    add("--output_dir", required=True, help="model folder to write")
    add("--shape", choices=SHAPES, default="tiny", help="size of the encoder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset_dir", help="its train.txt gives the vocabulary")
    source.add_argument("--vocab_file", help="take this vocabulary instead")
    add("--min_count", type=at_least(1), default=2, help="rarer characters are left out")
    add("--max_position", type=at_least(3), default=2048, help="longest sequence")
    add("--dropout", type=at_least(0.0), default=0.1, help="dropout rate")
    add("--seed", type=at_least(0), default=3, help="seed of the weights")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    output = Path(args.output_dir)
    if args.vocab_file and output.is_dir():  # a pretrained model's folder would be overwritten
        utils.check_outputs([output / "vocab.txt"], [args.vocab_file])
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
    tokenizer = {"tokenizer_class": "ErnieTokenizer", "do_lower_case": True}
    with utils.atomic_folder(output) as folder:
        (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer) + "\n")
        utils.load_tokenizer(folder)  # checks the vocabulary
        net = model.build_model(folder, num_labels=2)
        weights = random_weights(net, np.random.default_rng(args.seed))
        with open(folder / utils.WEIGHTS_FILE, "wb") as file:
            model.save_weights(file, weights)
    millions = sum(w.size for w in weights.values()) / 1e6
    message = "Random ERNIE (%s, %d tokens, %.1f M parameters) in %s"
    logger.info(message, args.shape, len(vocab), millions, output)


def make_vocab(path, min_count):
    """Special tokens, then characters and Latin / digit runs by falling frequency."""
    counts = Counter()
    for line in utils.read_texts(path):
        counts.update(re.findall(r"[a-z]+|[0-9]+|\S", line.split("\t")[0].lower()))
    pieces = {c for token in counts if token.isascii() and token.isalnum() for c in token}
    tokens = [t for t, n in sorted(counts.items(), key=lambda x: (-x[1], x[0])) if n >= min_count]
    tokens += sorted(pieces - set(tokens)) + ["##" + c for c in sorted(pieces)]
    return ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *tokens]


def random_weights(net, rng):
    """{parameter name: float32 array} for the encoder of a model.

    ERNIE's N(0, 0.02) suits 768 inputs and pretraining; narrow layers that start from scratch
    learn several times as slowly from it. Linear layers are N(0, 1 / fan-in) (LeCun et al. 1998,
    "Efficient BackProp"), words N(0, 0.1), so that they outweigh their positions, N(0, 0.02).
    """
    weights = {}
    for name, value in net.state_dict().items():
        if name.startswith("classifier."):
            continue
        if name.endswith("bias"):
            array = np.zeros(value.shape)
        elif "norm" in name:
            array = np.ones(value.shape)
        elif "embeddings" in name:
            array = rng.normal(0, 0.1 if "word_embeddings" in name else 0.02, value.shape)
        else:
            array = rng.normal(0, value.shape[0] ** -0.5, value.shape)
        weights[name] = array.astype(np.float32)
    return weights


if __name__ == "__main__":
    utils.cli(main)
