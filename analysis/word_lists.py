"""Make the word lists of aug.py and sparse.py where PaddleNLP's cannot be downloaded.

    python word_lists.py --synonym_file synonyms.txt --output_dir ./word_lists
    python aug.py --dict_dir ./word_lists

The vocabulary is the dictionary that comes with jieba. The synonyms are read in the format of the
extended Tongyici Cilin (`Aa01A02= word word ...`; lines with `#` or `@` are not synonyms), which
several packages on the package indexes carry; check their licences. The words of stop_words.txt
(negations, on which the labels depend, function words, punctuation) are never changed.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from utils import UserError, logger

jieba = utils.LazyModule("jieba")


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--output_dir", required=True, help="folder for the word lists, made if it is missing")
    add("--synonym_file", help="synonyms in Cilin's format; None: for delete and swap only")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    output, synonyms = Path(args.output_dir), {}
    stop_words = Path(__file__).with_name("stop_words.txt").read_text(encoding="utf-8")
    with jieba.get_dict_file() as file:
        words = [line.split(b" ")[0].decode("utf-8") for line in file]
    tokens = {word: i for i, word in enumerate(["[UNK]", *words])}
    vocabulary = {"token_to_idx": tokens, "unk_token": "[UNK]"}
    contents = {
        "stopwords.txt": stop_words,
        "baidu_encyclopedia_w2v_vocab.json": json.dumps(vocabulary, ensure_ascii=False),
    }
    if args.synonym_file:
        synonyms = read_synonyms(args.synonym_file)
        contents["word_synonym.json"] = json.dumps(synonyms, ensure_ascii=False)
        if output.is_dir():
            utils.check_outputs([output / name for name in contents], [args.synonym_file])
    utils.write_files(output, contents)
    message = "%d words, %d of them with synonyms, %d stop words in %s"
    logger.info(message, len(words), len(synonyms), stop_words.count("\n"), output)


def read_synonyms(path):
    """{word: [synonyms]} of words of two characters and more; UserError if there are none."""
    synonyms = {}
    for line in utils.read_texts(path):
        if match := re.fullmatch(r"\w{7}=\s+(.+)", line.strip()):
            # A single character has too many meanings.
            words = [word for word in dict.fromkeys(match[1].split()) if len(word) > 1]
            for word in words:
                known = synonyms.setdefault(word, [])
                known += [other for other in words if other != word and other not in known]
    synonyms = {word: others for word, others in synonyms.items() if others}
    if not synonyms:
        raise UserError(f"{path}: no line like 'Aa01A02= word word'; is it in Cilin's format?")
    return synonyms


if __name__ == "__main__":
    utils.cli(main)
