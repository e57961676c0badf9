"""What are pretrained weights worth? train.py from a model folder and from random weights.

    python benchmarks/pretrained.py --model_name all-MiniLM-L6-v2

The folder holds an English encoder. The data are synthetic: each clause of a text names two things
of a topic, and the dev texts name other things than the training texts. What these have to do with
a topic is nowhere to be learned, so only an encoder that knows the language can label them. Both
runs have the same shape, vocabulary, data, seed and flags; the random weights are those of
data/init_model.py.
"""

import random
import shutil
from pathlib import Path

import common
import init_model
import numpy as np

import utils

model = utils.LazyModule("model")

# label: things in the training texts | things in the dev texts
TOPICS = {
    "sport": "football tennis goalkeeper marathon referee swimming stadium hockey athlete coach"
    " | basketball championship cyclist tournament rugby boxing sprinter gymnastics",
    "food": "bread cheese soup chef restaurant butter recipe chicken salad oven"
    " | pasta bakery dessert potato kitchen sandwich spice beef",
    "music": "guitar song orchestra piano concert singer melody drum violin choir"
    " | trumpet opera jazz composer flute album band symphony",
    "medicine": "doctor hospital surgery vaccine nurse pill illness patient bandage clinic"
    " | physician disease antibiotic therapy diagnosis pharmacy infection surgeon",
    "transport": "train bus airport bicycle driver railway truck ferry motorway passenger"
    " | tram aircraft taxi subway ship locomotive van highway",
    "animals": "dog cat horse elephant bird wolf fish rabbit lion sheep"
    " | tiger cow monkey goat eagle bear snake whale",
    "weather": "rain snow sunshine storm wind cloud frost thunder fog temperature"
    " | hurricane drizzle hail lightning blizzard heatwave humidity forecast",
    "money": "bank loan salary tax investment coin budget debt invoice profit"
    " | mortgage currency income credit wealth payment savings dividend",
}
CLAUSES = (
    "they saw the {} and the {}",
    "a {} is better than a {}",
    "he drew the {} or the {}",
    "no {} without {}",
)
FLAGS = "--warmup --warmup_steps 8 --max_grad_norm 1 --dropout 0".split()  # of train.py


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--model_name", required=True, help="local folder of a pretrained English encoder")
    add("--work_dir", default="pretrained", help="for data and models; finished runs are reused")
    add("--num_train", type=utils.at_least(1), default=256, help="training texts")
    add("--num_dev", type=utils.at_least(1), default=200, help="dev texts")
    add("--epochs", type=utils.at_least(1), default=12, help="of train.py")
    add("--batch_size", type=utils.at_least(1), default=16, help="of train.py")
    add("--learning_rate", type=utils.at_least(0.0), default=3e-4, help="of train.py")
    add("--seed", type=utils.at_least(0), default=3, help="of data, random weights and train.py")
    add("--device", default="cpu", help="of train.py")
    return parser.parse_args(argv)


def make_texts(count, part, rng):
    """`count` lines text<TAB>labels, each of one or two topics; part: 0 for train, 1 for dev."""
    lines = []
    for _ in range(count):
        topics = rng.sample(sorted(TOPICS), rng.randint(1, 2))
        words = (rng.sample(TOPICS[topic].split("|")[part].split(), 2) for topic in topics)
        clauses = "; ".join(rng.choice(CLAUSES).format(*pair) for pair in words)
        lines.append(f"{clauses}.\t{','.join(topics)}")
    return lines


def random_twin(source, target, seed):
    """A model folder like `source`, tokenizer included, with random weights."""
    with utils.atomic_folder(target) as folder:
        utils.copy_tokenizer(source, folder)
        shutil.copyfile(source / utils.CONFIG_FILE, folder / utils.CONFIG_FILE)
        net = model.build_model(folder, len(TOPICS))
        weights = init_model.random_weights(net, np.random.default_rng(seed))
        with open(folder / utils.WEIGHTS_FILE, "wb") as file:
            model.save_weights(file, weights)


def main(argv=None):
    args = parse_args(argv)
    work, rng = Path(args.work_dir), random.Random(args.seed)
    content = {"train": make_texts(args.num_train, 0, rng), "dev": make_texts(args.num_dev, 1, rng)}
    content["label"] = list(TOPICS)
    files = {f"{name}.txt": "".join(f"{x}\n" for x in lines) for name, lines in content.items()}
    utils.write_files(work / "data", files)
    names = ("epochs", "batch_size", "learning_rate", "seed", "device")
    given = {name: getattr(args, name) for name in names}
    random_twin(Path(args.model_name), work / "random_model", args.seed)
    for name, folder in (("pretrained", args.model_name), ("random", work / "random_model")):
        figures = common.train(work / "data", work / name, *FLAGS, model_name=folder, **given)
        common.print_row(start=name, **figures)


if __name__ == "__main__":
    utils.cli(main)
