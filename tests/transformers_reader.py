"""What Hugging Face's transformers make of folders; test_hugging_face_out.py runs it.

    python transformers_reader.py OUTPUT.npz FOLDER ... < texts.json

Needs torch and transformers, nothing of this project. texts.json: {"ids": texts to tokenise,
"logits": texts to label, "code": a Python file to run}.
"""

import json
import runpy
import sys

import numpy as np
import torch
import transformers

BATCH = 32


def logits_of(model, tokenizer, texts):
    """float32 [texts, labels]; the longest texts come first."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    logits = np.zeros((len(texts), model.config.num_labels), dtype=np.float32)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = [texts[i] for i in rows]
        batch = tokenizer(batch, truncation=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits[rows] = model(**batch).logits.numpy()
    return logits


def main():
    output, *folders = sys.argv[1:]
    wanted, arrays = json.load(sys.stdin), {}
    for i, folder in enumerate(folders):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(wanted["ids"], truncation=True)["input_ids"]
        arrays[f"ids{i}"] = np.array([token for row in ids for token in row])
        arrays[f"lengths{i}"] = np.array([len(row) for row in ids])
        auto = transformers.AutoModelForSequenceClassification
        model, report = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report  # no parameter is missing, superfluous or misshapen
        arrays[f"logits{i}"] = logits_of(model.eval(), tokenizer, wanted["logits"])
        settings = {"top_k": None, "function_to_apply": "sigmoid", "truncation": True}
        classify = transformers.pipeline(
            "text-classification", model=model, tokenizer=tokenizer, **settings
        )
        names = list(model.config.id2label.values())
        scores = [{x["label"]: x["score"] for x in row} for row in classify(wanted["logits"][:5])]
        arrays[f"scores{i}"] = np.array([[row[name] for name in names] for row in scores])
        print(json.dumps([type(model).__name__, model.config.problem_type, names]))
    np.savez(output, **arrays)
    runpy.run_path(wanted["code"])


if __name__ == "__main__":
    main()
