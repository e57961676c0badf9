"""Writes a small synthetic data set of Chinese marriage-and-family sentences.

The real data set (CAIL2019, "divorce") belongs to its owners and is not shipped. This is a stand-in
of the same form with the same 20 labels, so that the project can be tried offline:

    python data/make_sample.py                      # writes data/{train,dev,data,label}.txt
    python data/make_sample.py --output_dir small --num_train 200 --num_dev 50

It is built from the hand-written clauses in sample_templates.txt. The same arguments give the same
bytes on every machine.
"""

import random
import re
import sys
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import utils  # noqa: E402

TEMPLATES = (HERE / "sample_templates.txt").read_text(encoding="utf-8")
WORDS = {name: words.split() for name, words in re.findall(r"^=(\w+) (.*)$", TEMPLATES, re.M)}
LABELS, GOODS = WORDS["labels"], WORDS["goods"]
# Slots drawn anew each time; the others stay the same throughout one sample.
FREE_SLOTS = {
    "n": [str(n) for n in range(2, 16)],
    "fee": [f"{n}00" for n in range(3, 13)],
    "sum": [f"{n}{unit}元" for n in range(2, 61) for unit in ("万", "00", "000", "000")],
    "goods": ["、".join(GOODS[i : i + n]) for i in range(len(GOODS) - 2) for n in (1, 2, 3)],
    "W": ["双方", "双方", "原、被告"],
    "car": WORDS["cars"],
    "place": [name + part for name in WORDS["places"] for part in ("", "", "5号", "12号", "36号")],
}
SURNAMES = "王李张刘陈杨赵黄周吴徐孙马朱胡林郭何高罗郑梁谢宋唐许韩冯邓曹"
# Labels that two clauses of one sample may share: 生育一子, and then who has custody of him.
REPEATABLE = {"婚后有子女", "有夫妻共同财产"}

EMPTY_SHARE = 0.03  # samples without any label
LONG_SHARE = 0.06  # samples of six clauses: most of them longer than 126 characters
MORE_SHARE = 0.6  # chance of a further clause
FOLLOW_SHARE, DENIED_SHARE = 0.45, 0.1  # kinds of further clauses; the rest has no label


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--output_dir", default=str(HERE), help="folder to write the files to")
    add("--seed", type=int, default=3, help="seed of every random choice")
    for name, count in (("train", 2000), ("dev", 400), ("data", 40)):
        add(f"--num_{name}", type=utils.at_least(1), default=count, help=f"lines of {name}.txt")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    rng, seen = random.Random(args.seed), set()
    blocks = re.split("^@", TEMPLATES, flags=re.M)[1:]
    themes = {theme.name: theme for theme in map(Theme, range(len(blocks)), blocks)}
    lines = {"label.txt": LABELS}
    for name, count in (("train", args.num_train), ("dev", args.num_dev)):
        samples = make_split(rng, themes, count, seen)
        lines[f"{name}.txt"] = [f"{text}\t{labels}" for text, labels in samples]
    lines["data.txt"] = [text for text, _ in make_split(rng, themes, args.num_data, seen)]
    contents = {name: "".join(f"{line}\n" for line in lines[name]) for name in lines}
    utils.write_files(args.output_dir, contents)
    for name in lines:
        print(f"{Path(args.output_dir) / name}: {len(lines[name])} lines")


def make_facts(rng):
    """{slot: [wordings]}: the people and dates of one case."""

    def date(year):
        month, day = rng.randint(1, 12), rng.randint(1, 28)
        return [rng.choice([f"{year}年{month}月", f"{year}年{month}月{day}日", "××××年××月××日"])]

    p, d = (rng.choice(SURNAMES) + rng.choice(["某", "某某", "某甲", "×", "××"]) for _ in "pd")
    sides = [["原告", f"原告{p}"], ["被告", f"被告{d}"]]
    x = rng.randrange(2)  # X is the side that keeps the child or the thing, Y the other one
    family, (g, son) = rng.choice([p, d])[0], rng.choice([("子", "儿子"), ("女", "女儿")])
    now = rng.randint(2012, 2019)
    marry = now - rng.randint(4, 24)
    facts = {"p": [p], "P": sides[0], "D": sides[1], "X": sides[x], "Y": sides[1 - x]}
    facts |= {"g": [g], "son": [son], "K": [family + rng.choice(["某乙", "某1", "小某"])]}
    facts |= {"K2": [family + "某丙"], "age": [rng.choice("23456789"), rng.choice("三四五六七八")]}
    facts |= {"marry": date(marry), "born": date(rng.randint(marry + 1, now - 2))}
    facts |= {"left": date(now - 1) + [f"{now}年初", f"{now}年春节后"], "sued": date(now - 1)}
    facts |= {"left2": date(now - rng.randint(3, 4)), "years": [rng.choice("三四五") + "年"]}
    return facts | FREE_SLOTS


def fill(rng, facts, template):
    """Chooses one way at every [a|b], innermost first, then fills the slots."""
    while "[" in template:
        template = re.sub(r"\[([^][]*)\]", lambda m: rng.choice(m[1].split("|")), template)
    return re.sub(r"\{(\w+)\}", lambda m: rng.choice(facts[m[1]]), template)


class Theme:
    """One block of sample_templates.txt."""

    def __init__(self, order, block):
        head, _, clauses = block.partition(" :")
        head, _, follow = head.partition(">")
        self.name, weight, *labels = head.split()
        self.order, self.weight = order, float(weight)
        self.labels = set() if self.name[0] == "-" else set(labels)
        self.forbidden = set(labels) - self.labels
        self.follow, self.clauses = follow.split(), clauses.split()

    def clashes(self, other):
        """Whether one sample cannot have both: the same thing would be settled twice, or denied."""
        return bool(self.forbidden & other.labels or self.labels & other.labels - REPEATABLE)


def choose_themes(rng, themes, first):
    """`first` and the themes told with it, in the order of a record."""
    long = rng.random() < LONG_SHARE
    chosen = [first, *(themes[name] for name in ("intro", "outro") if long and first.labels)]
    denied = [name for name in themes if name[0] == "-"]
    for _ in range(12 if long else 3):
        if len(chosen) == 6 or not (long or rng.random() < MORE_SHARE):
            break
        kind = rng.random() if first.labels else 1.0
        names = ["intro", "outro"]
        if kind < FOLLOW_SHARE + DENIED_SHARE:
            names = first.follow if kind < FOLLOW_SHARE else denied
        theme = themes[rng.choice(names)]
        if not any(theme is t or theme.clashes(t) or t.clashes(theme) for t in chosen):
            chosen.append(theme)
    return sorted(chosen, key=lambda theme: theme.order)


def make_sample(rng, themes, first):
    """(text, labels joined in the order of label.txt)"""
    facts, chosen = make_facts(rng), choose_themes(rng, themes, first)
    clauses = [fill(rng, facts, rng.choice(theme.clauses)) for theme in chosen]
    told = [clause for clause in clauses if clause[0] != "#"]
    items = [clause[1:] for clause in clauses if clause[0] == "#"]
    text = "".join(clause + rng.choice("。。；，，") for clause in told)[:-1]
    if told and rng.random() < 0.45:
        court = re.search("本院|不予|予以|准许|准予", text)  # a party cannot say these
        text = (
            fill(rng, facts, rng.choice(WORDS["court"] + ([] if court else WORDS["parties"])))
            + text
        )
    if told and items:
        ruling = re.search("判决|驳回|准|受理费", "".join(items))  # no part of an agreement
        text += "。" + rng.choice(WORDS["rulings"] + ([] if ruling else WORDS["agreements"]))
    digits = rng.choice(["一二三四五六七八", "一二三四五六七八", "12345678"])
    start = 0 if told or len(items) > 1 else rng.randrange(5)
    text += "；".join(f"{digits[start + i]}、{item}" for i, item in enumerate(items))
    labels = set().union(*(theme.labels for theme in chosen))
    return text + rng.choice("。。。；"), ",".join(label for label in LABELS if label in labels)


def make_split(rng, themes, count, seen):
    """`count` samples whose texts are not in `seen`; their texts are added to it."""
    # First themes are dealt out at even steps of the summed weights rather than drawn, so that
    # the rare labels get their share in a small split too.
    labelled = [theme for theme in themes.values() if theme.labels]
    empty = [theme for theme in themes.values() if not theme.labels]
    steps = list(accumulate(theme.weight for theme in labelled))
    samples, full = [], count - round(count * EMPTY_SHARE)
    for i in range(count):
        position = (i + 0.5) / full * steps[-1]
        first = labelled[bisect_right(steps, position)] if i < full else rng.choice(empty)
        while (sample := make_sample(rng, themes, first))[0] in seen:
            pass
        seen.add(sample[0])
        samples.append(sample)
    rng.shuffle(samples)
    return samples


if __name__ == "__main__":
    utils.cli(main)
