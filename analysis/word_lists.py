"""Make the word lists of aug.py and sparse.py where PaddleNLP's cannot be downloaded.

    python word_lists.py --synonym_file synonyms.txt --output_dir ./word_lists
    python aug.py --dict_dir ./word_lists

The vocabulary is the dictionary that jieba brings along. The synonyms are read in the format of the
extended Tongyici Cilin (`Aa01A02= word word ...`; lines with `#` or `@` are no synonyms), which
several packages on the package indexes carry; mind their licences.
"""

import json
import re
import sys
from pathlib import Path

import jieba

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils  # noqa: E402
from utils import UserError, logger  # noqa: E402

# They stay as they are: negations (the labels depend on them), function words, punctuation.
STOP_WORDS = """
的 了 和 与 及 或 在 是 为 于 以 之 其 此 该 等 将 被 把 由 对 从 向 到 至 因 故 而 且 但 并 也 又
都 就 才 再 还 很 更 最 太 已 已经 曾 曾经 正 正在 仍 仍然 即 则 若 如 如果 虽 虽然 然而 但是 因为
所以 由于 因此 因而 从而 并且 而且 以及 或者 还是 不但 不仅 无论 不论 即使 尽管 只要 只有 除了 关于
对于 根据 按照 依照 依据 通过 经过 有 无 没 没有 不 未 非 否 勿 别 莫 不予 不能 不是 不同意 不存在
未能 未曾 尚未 并未 并非 拒绝 驳回 能 会 可 可以 应 应当 应该 须 必须 要 需 需要 愿 愿意 我 你 您
他 她 它 我们 你们 他们 她们 它们 自己 本人 这 那 这个 那个 这些 那些 这样 那样 哪 哪个 谁 什么
怎么 怎样 如何 多少 几 个 一 二 三 四 五 六 七 八 九 十 百 千 万 亿 年 月 日 时 分 秒 上 下 中 内
外 前 后 里 间 左 右 着 过 地 得 吗 呢 吧 啊 呀 们 所 者 第 每 各 某 同 另 其中 其他 其它 之间 以上
以下 以后 以前 ， 。 、 ； ： ？ ！ “ ” ‘ ’ （ ） 《 》 〈 〉 【 】 … — － ～ · , . ; : ? ! "
' ( ) [ ] < > / \\ - _ = + * # % & @
""".split()


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--output_dir", required=True, help="folder for the word lists, made if it is missing")
    add("--synonym_file", help="synonyms in Cilin's format; None: for delete and swap only")
    return parser.parse_args(argv)


def read_synonyms(path):
    """{word: [synonyms]} of words of two characters and more; UserError if there are none."""
    synonyms = {}
    for line in utils.read_texts(path):
        if match := re.fullmatch(r"\w{7}=\s+(.+)", line.strip()):
            # Single characters stand for too many things.
            words = [word for word in dict.fromkeys(match[1].split()) if len(word) > 1]
            for word in words:
                known = synonyms.setdefault(word, [])
                known += [other for other in words if other != word and other not in known]
    synonyms = {word: others for word, others in synonyms.items() if others}
    if not synonyms:
        raise UserError(f"{path}: no line like 'Aa01A02= word word'; is it in Cilin's format?")
    return synonyms


def main(argv=None):
    args = parse_args(argv)
    lists = {}
    if args.synonym_file:
        lists["word_synonym.json"] = read_synonyms(args.synonym_file)
    with jieba.get_dict_file() as file:
        words = [line.split(b" ")[0].decode("utf-8") for line in file]
    tokens = {word: i for i, word in enumerate(["[UNK]", *words])}
    lists["baidu_encyclopedia_w2v_vocab.json"] = {"token_to_idx": tokens, "unk_token": "[UNK]"}
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for name, content in lists.items():
        with utils.atomic_file(output / name) as file:
            json.dump(content, file, ensure_ascii=False)
    with utils.atomic_file(output / "stopwords.txt") as file:
        file.write("\n".join(STOP_WORDS) + "\n")
    logger.info(
        "%d words, %d of them with synonyms, %d stop words in %s",
        *(len(words), len(lists.get("word_synonym.json", ())), len(STOP_WORDS), output),
    )


if __name__ == "__main__":
    utils.cli(main)
