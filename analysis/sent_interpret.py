"""For each wrongly labelled text, the training texts that the model finds most similar to it.

    python sent_interpret.py --device cpu --dataset_dir ../data --params_path ../checkpoint

The evidence comes from TrustAI's FeatureSimilarityModel (cosine of the classifier's input).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from utils import UserError, at_least, logger

compat = utils.LazyModule("trustai_compat")

COLUMNS = ("text", "label", "prediction")
HINT = "evaluate.py --bad_case_path writes such a file"


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("data (all files are in dataset_dir)").add_argument
    add("--dataset_dir", required=True, help="folder of the files below")
    add("--train_file", default="train.txt", help="training set")
    add("--label_file", help="checked against the checkpoint; None: label.txt if it exists")
    add("--interpret_input_file", default="bad_case.txt", help="text[<TAB>label[<TAB>prediction]]")
    add("--interpret_result_file", default="sent_interpret.txt", help="result")
    add("--top_k", type=at_least(1), default=3, help="training texts for each text")
    add("--seed", type=at_least(0), default=3, help="has no effect: nothing here is random")
    utils.add_inference_flags(parser, "../checkpoint/")
    parser.set_defaults(batch_size=16)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    data = Path(args.dataset_dir)
    path, result = data / args.interpret_input_file, data / args.interpret_result_file
    inputs = [path, data / args.train_file, data / (args.label_file or "label.txt")]
    utils.check_outputs([result], [*inputs, *utils.model_files(args.params_path)])
    if not path.exists():
        raise UserError(f"{path}: No such file; {HINT}")
    records = read_input(path)
    labels = utils.read_model_info(args.params_path).labels
    check_columns(path, records, labels)
    utils.check_labels(data, args.label_file, labels)
    train_texts, train_ids = utils.read_examples(data / args.train_file, labels)
    encoder = compat.Encoder(args.params_path, args.device, args.max_seq_length, args.batch_size)
    similarity = encoder.similarity(encoder.features(train_texts, "train"))
    features = encoder.features([record["text"] for record in records], "input")
    indices, scores = compat.nearest(similarity, features, args.top_k, "evidence")
    with utils.atomic_file(result) as file:
        for record, row, row_scores in zip(records, indices, scores):
            file.write(f"text: {utils.cell(record['text'])}\n")
            file.write(f"predict label: {record['prediction']}\n")
            file.write(f"label: {record['label']}\n")
            file.write("examples with positive influence\n")
            for rank, (i, score) in enumerate(zip(row, row_scores), 1):
                names = ",".join(labels[j] for j in train_ids[i])
                text = f"{utils.cell(train_texts[i])}\tlabel: {names}\tscore: {score:.5f}"
                file.write(f"support{rank} text: {text}\n")
            file.write("\n")
    logger.info("Evidence for %d texts saved in %s", len(records), result)


def read_input(path):
    """[{"text": ..., "label": ..., "prediction": ...}]; what a line does not have is ''.

    A first line that consists of these names (in any order, case ignored) tells the columns'
    order, as evaluate.py's bad_case.txt has it. Raises UserError that names the line.
    """
    columns, records = COLUMNS, []
    for n, line in enumerate(utils.read_texts(path), 1):
        fields = [field.strip() for field in line.split("\t")]
        header = tuple(field.lower() for field in fields)
        if n == 1 and "text" in header and set(header) <= set(COLUMNS):
            columns = header
            continue
        if not any(fields):
            continue
        if len(fields) > len(columns):
            raise UserError(
                f"{path}:{n}: {len(fields)} fields separated by tabs; "
                f"{len(columns)} are expected: {', '.join(columns)}"
            )
        records.append({**dict.fromkeys(COLUMNS, ""), **dict(zip(columns, fields))})
        if columns[: len(fields)].count("text") == 0:
            raise UserError(f"{path}:{n}: {len(fields)} fields, no text; see the first line")
    if not records:
        raise UserError(f"{path}: no texts; {HINT}")
    return records


def check_columns(path, records, labels):
    """Raises UserError if the texts are label names, as in a bad_case.txt without its header."""
    known = set(labels)
    if all(record["text"] and set(record["text"].split(",")) <= known for record in records):
        raise UserError(f"{path}: the first column holds labels, not texts; keep the header line")


if __name__ == "__main__":
    utils.cli(main)
