"""Turns predict.py's JSON lines into tasks for Label Studio, to be corrected instead of annotated.

    python predict.py --dataset_dir data --output_file output.jsonl --output_scores
    python data/label_studio.py --input_file output.jsonl --output_file tasks.json > config.xml

The predictions of the tasks have the score of the least certain label: sort by it, and people see
the doubtful texts first. stdout gets the labelling configuration that the project needs.
"""

import json
import sys
from pathlib import Path
from xml.sax.saxutils import quoteattr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from utils import UserError, logger


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--input_file", default="output.jsonl", help="result of predict.py --output_file x.jsonl")
    add("--output_file", default="label_studio.json", help="tasks to import into Label Studio")
    add("--label_file", help="all labels, for the configuration; None: those of --output_scores")
    add("--from_name", default="label", help="name of the Choices control in the project")
    add("--to_name", default="text", help="name of the Text object in the project")
    add("--model_version", default="model", help="what Label Studio calls these predictions")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    labels = utils.read_labels(args.label_file) if args.label_file else None
    utils.check_outputs([args.output_file], filter(None, [args.input_file, args.label_file]))
    named, count = {}, 0
    with utils.atomic_file(args.output_file) as file:
        predictions = read_predictions(args.input_file, labels)
        for count, (text, names, scores) in enumerate(predictions, 1):
            task = as_task(text, names, scores, args)
            file.write(("[\n" if count == 1 else ",\n") + json.dumps(task, ensure_ascii=False))
            named.update(dict.fromkeys(scores or names))
        file.write("\n]\n")
    logger.info("Save %d tasks to %s.", count, args.output_file)
    print(configuration(labels or named, args))


def read_predictions(path, labels):
    """Yields (text, label names, {label: probability}); raises UserError at the first bad line."""
    lines = utils.Lines(path)
    for line in lines:
        try:
            record = json.loads(line)
            text, names, scores = record["text"], record["labels"], record.get("scores", {})
            if not (isinstance(text, str) and isinstance(names, list)):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            lines.bad("no prediction; predict.py --output_file x.jsonl writes such lines")
        else:
            unknown = [name for name in names if labels is not None and name not in labels]
            if unknown:
                lines.bad(f"label '{unknown[0]}' is not in --label_file; give the model's labels")
        lines.check()
        yield text, names, scores
    lines.check()
    if not lines.index:
        raise UserError(f"{path}: empty file; predict.py --output_file x.jsonl writes one")


def as_task(text, names, scores, args):
    prediction = {"model_version": args.model_version}
    if scores:
        prediction["score"] = min(max(score, 1 - score) for score in scores.values())
    choices = {"from_name": args.from_name, "to_name": args.to_name, "type": "choices"}
    choices["value"] = {"choices": names}
    return {
        "data": {"text": text},
        "predictions": [{**prediction, "result": [choices] if names else []}],
    }


def configuration(labels, args):
    choices = "".join(f"\n    <Choice value={quoteattr(name)}/>" for name in labels)
    name, to_name = quoteattr(args.from_name), quoteattr(args.to_name)
    return f"""<View>
  <Text name={to_name} value="$text"/>
  <Choices name={name} toName={to_name} choice="multiple">{choices}
  </Choices>
</View>"""


if __name__ == "__main__":
    utils.cli(main)
