"""Training runs side by side: one setting changed, several seeds, one table. So far: who may look at whom.

    python ablations.py attention                 the tiny size, three seeds each of MMCA and causal attention
    python ablations.py attention --seeds 0 1     two seeds; runs that are there already are read, not repeated

It calls train.py, as anybody would, and reads the eval.csv of each run. Before: train.py.
"""
import argparse
import csv
import subprocess
import sys
from pathlib import Path
from statistics import mean

VARIANTS = {                    # name of the comparison: name of a run: what train.py is told
    "attention": {"mmca": ["--attention", "mmca"], "causal": ["--attention", "causal"]},
}


COLUMNS = {"exact": "", "weakest": ", weakest topic", "alone": ", asked in a first round",
           "blind": ", every picture gray"}


def run(name: str, settings: list[str], seed: int, out: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Train one run unless its result is there; returns {(test, images): {column of COLUMNS: share}}."""
    folder = out / f"{name}-{seed}"
    if not (folder / "eval.csv").exists():
        command = [sys.executable, str(Path(__file__).with_name("train.py")), "--size", "tiny", *settings]
        if subprocess.run([*command, "--seed", str(seed), "--out", str(folder), "--resume"]).returncode:
            sys.exit(f"ablations.py: {folder} did not end; the same command goes on with it")
    with open(folder / "eval.csv") as file:
        rows = list(csv.DictReader(file))
    table = {(row["test"], row["images"]): {way: float(row[way]) for way in ("exact", "alone", "blind")}
             for row in rows if row["topic"] == "all"}
    for group, shares in table.items():
        shares["weakest"] = min(float(row["exact"]) for row in rows if (row["test"], row["images"]) == group)
    return table


def spread(values: list[float]) -> str:
    """Mean, and the least and greatest of the seeds, in percent."""
    return f"{100 * mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def main():
    """Run what is missing and print exact match, in percent, over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/ablations"))
    options = parser.parse_args()
    results = {name: [run(name, settings, seed, options.out) for seed in options.seeds]
               for name, settings in VARIANTS[options.comparison].items()}
    groups = list(next(iter(results.values()))[0])
    print("| | " + " | ".join(f"{test}, {images}" for test, images in groups) + " |")
    print("|---" * (1 + len(groups)) + "|")
    for name, found in results.items():
        for column, title in COLUMNS.items():
            cells = [spread([table[group][column] for table in found]) for group in groups]
            print(f"| {name}{title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
