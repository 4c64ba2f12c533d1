"""MMCA against causal attention, or other experiments: the tiny size, several seeds; one table compares them.

    python -m experiments.attention                             five seeds of both: ten trainings with their exams
    python -m experiments.attention --compare mmca cross lora   other experiments (run.py)

Options that it does not know go to train.py. Runs that are there already are not repeated, so other options need
another --out. The paper compares the first two at 7b, on the same two datasets. Before: run.py.
"""
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import mean

from experiments.run import exam_of

COLUMNS = {"right": "", "weakest": ", weakest topic", "blind": ", gray images"}      # of `tiny.exam.table`


def main():
    """Train and examine what is missing and print the table, in Markdown: mean (least to greatest), in percent."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--compare", nargs="+", default=["mmca", "causal"], help="names of experiments")
    parser.add_argument("--out", type=Path, default=Path("out/attention"))
    options, more = parser.parse_known_args()
    exams = {name: [exam_of(name, seed, options.out, more) for seed in options.seeds]
             for name in options.compare}
    heads = [f"{name}{title}" for name in exams for title in COLUMNS.values()]
    print("| | questions | " + " | ".join(heads) + " |")
    print("|---" * (2 + len(heads)) + "|")
    for group, line in exams[options.compare[0]][0].items():
        values = [[found[group][column] for found in exams[name]] for name in exams for column in COLUMNS]
        cells = ["-" if None in seeds else f"{mean(seeds):.1f} ({min(seeds):.1f} to {max(seeds):.1f})"
                 for seeds in values]
        print(f"| {group} | {line['questions']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
