"""MMCA against causal attention: the tiny size is trained with both and five seeds; one table compares them.

    python -m experiments.attention                 five seeds of each: ten trainings with their exams
    python -m experiments.attention --seeds 0 1     two seeds

It runs train.py and tiny/exam.py as a user would and reads the eval.csv of each run. Options that it does not know
go to train.py. Runs that are there already are not repeated, so other options need another --out. The paper
compares the two at 7b, on the same two datasets. Before: train.py.
"""
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import mean

from tiny.exam import read_marked, table

COMPARED, ROOT = ("mmca", "causal"), Path(__file__).parents[1]
COLUMNS = {"right": "", "weakest": ", weakest topic", "blind": ", gray images"}      # of `tiny.exam.table`


def exam_of(attention: str, seed: int, out: Path, options: list[str]) -> dict[str, dict]:
    """The table of a run's exam. What is missing is trained and examined first; options: more of train.py's."""
    folder = out / f"{attention}-{seed}"
    train = [sys.executable, str(ROOT / "train.py"), "--size", "tiny", "--attention", attention,
             "--seed", str(seed), "--out", str(folder), "--resume", *options]
    for result, command in (("trained.safetensors", train),
                            ("eval.csv", [sys.executable, "-m", "tiny.exam", "--model", str(folder)])):
        unfinished = result == "trained.safetensors" and (folder / "checkpoints").exists()
        if (unfinished or not (folder / result).exists()) and subprocess.run(command).returncode:
            sys.exit(f"experiments/attention.py: {folder} did not end; the same command goes on with it")
    return table(read_marked(folder / "eval.csv"))


def main():
    """Train and examine what is missing and print the table, in Markdown: mean (least to greatest), in percent."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--attention", nargs="+", choices=COMPARED, default=list(COMPARED))
    parser.add_argument("--out", type=Path, default=Path("out/attention"))
    options, more = parser.parse_known_args()
    exams = {name: [exam_of(name, seed, options.out, more) for seed in options.seeds]
             for name in options.attention}
    heads = [f"{name}{title}" for name in exams for title in COLUMNS.values()]
    print("| | questions | " + " | ".join(heads) + " |")
    print("|---" * (2 + len(heads)) + "|")
    for group, line in exams[options.attention[0]][0].items():
        values = [[found[group][column] for found in exams[name]] for name in exams for column in COLUMNS]
        cells = ["-" if None in seeds else f"{mean(seeds):.1f} ({min(seeds):.1f} to {max(seeds):.1f})"
                 for seeds in values]
        print(f"| {group} | {line['questions']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
