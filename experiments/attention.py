"""MMCA against causal attention: the tiny size is trained with both and several seeds; one table compares them.

    python -m experiments.attention                 three seeds of each: six trainings, about half an hour
    python -m experiments.attention --seeds 0 1     two seeds

It runs train.py as a user would and reads the eval.csv of each run. Runs that are there already are not repeated.
The paper compares the two at 7b, on the same two datasets. Before: train.py.
"""
import csv
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import mean

COMPARED = ("mmca", "causal")
# The table's lines for each attention: a column of eval.csv, or its weakest topic, and what the line is called.
TITLES = {"exact": "", "weakest": ", weakest topic", "alone": ", asked in a first round",
          "blind": ", every image gray"}


def exam_of(attention: str, seed: int, out: Path) -> dict[tuple[str, str], dict[str, float]]:
    """A run's right answers, {(test set, images): {key of TITLES: share}}. A missing run is trained first."""
    folder = out / f"{attention}-{seed}"
    if not (folder / "eval.csv").exists():
        command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), "--size", "tiny",
                   "--attention", attention, "--seed", str(seed), "--out", str(folder), "--resume"]
        if subprocess.run(command).returncode:
            sys.exit(f"experiments/attention.py: {folder} did not end; the same command goes on with it")
    with open(folder / "eval.csv") as file:
        rows = list(csv.DictReader(file))
    shares = {(row["test"], row["images"]): {way: float(row[way]) for way in ("exact", "alone", "blind")}
              for row in rows if row["topic"] == "all"}
    for group in shares:
        topics = [float(row["exact"]) for row in rows if (row["test"], row["images"]) == group]
        shares[group]["weakest"] = min(topics)
    return shares


def main():
    """Train the runs that are missing and print the table, in Markdown: mean (least to greatest), in percent."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/ablations"))
    options = parser.parse_args()
    exams = {name: [exam_of(name, seed, options.out) for seed in options.seeds] for name in COMPARED}
    groups = list(exams[COMPARED[0]][0])
    print("| | " + " | ".join(f"{test}, {images}" for test, images in groups) + " |")
    print("|---" * (1 + len(groups)) + "|")
    for name, found in exams.items():
        for key, title in TITLES.items():
            percent = [[100 * shares[group][key] for shares in found] for group in groups]
            cells = [f"{mean(seeds):.1f} ({min(seeds):.1f} to {max(seeds):.1f})" for seeds in percent]
            print(f"| {name}{title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
