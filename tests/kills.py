"""Trainings that are killed again and again: does each end as the one that was left alone?

    python tests/kills.py --runs 10 --kills 10

Half of the runs have one rank, half two. Each is killed (SIGKILL, all of its processes) at random moments, goes on
with --resume after each, and is then left to its end, where it is compared with a run that nobody killed: for one
rank losses and result to the bit, for two, whose sums may be made in another order, the losses within 1e-3. Takes
about a quarter of an hour; tests/test_checkpoint.py has a short form.
"""
import argparse
import csv
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training import ROOT, at, begin, finish, kill

sys.path.insert(0, str(ROOT))

from tiny.world import write_world                  # noqa: E402

OPTIONS = ("--epochs", "6", "--save-steps", "1")    # 54 steps, each with a checkpoint
KEPT = {".lock", "best", "config.json", "log.csv", "loss.png", "trained.safetensors"}      # in a result's folder


def losses(folder: Path) -> list[float]:
    with open(folder / "log.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def killed_run(world: Path, number: int, kills: int) -> tuple[int, int, int]:
    """Kill a run `kills` times; returns its ranks, and how many kills met steps and a checkpoint being written."""
    ranks, chance, out = 1 + number % 2, random.Random(number), f"out/{number}"
    folder, met_steps, met_saving = world / out / "checkpoints", 0, 0
    for _ in range(kills):
        before = at(folder)[0]
        run = begin(world, out, *OPTIONS, "--resume", ranks=ranks)
        # Some kills come while the run starts, some at any moment after its first checkpoint, and half of them
        # when it has begun to write the next one.
        deadline = time.time() + (chance.uniform(0, 15) if chance.random() < .2 else 120)
        while at(folder)[0] <= before and time.time() < deadline and run.poll() is None:
            time.sleep(0.005)
        if chance.random() < .5:
            time.sleep(chance.uniform(0, 0.5))
        else:
            while not at(folder)[1] and time.time() < deadline and run.poll() is None:
                time.sleep(0.001)
        if run.poll() is not None:
            raise SystemExit(f"run {number} ended before it was killed:\n{run.communicate()[0]}")
        kill(run, world, out)
        newest, unfinished = at(folder)
        met_steps, met_saving = met_steps + (newest > before), met_saving + bool(unfinished)
    finish(begin(world, out, *OPTIONS, "--resume", ranks=ranks))
    return ranks, met_steps, met_saving


def main():
    """Print a row for each run; exits with 1 where one differs or leaves something behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=10, help="of each run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        world = Path(folder)
        (world / "weights").symlink_to(ROOT / "weights")
        write_world(world / "data/tiny", 110, seed=1)
        for ranks in (1, 2):
            finish(begin(world, f"out/whole-{ranks}", *OPTIONS, ranks=ranks))
        print("run  ranks  kills  while it made steps  while it saved  largest difference  left over", flush=True)
        good = True
        runs = range(options.runs)
        done = pool.map(lambda number: killed_run(world, number, options.kills), runs)
        for number, (ranks, steps, saving) in zip(runs, done):
            whole, killed = world / f"out/whole-{ranks}", world / f"out/{number}"
            differences = [abs(a - b) for a, b in zip(losses(whole), losses(killed), strict=True)]
            same = (whole / "trained.safetensors").read_bytes() == (killed / "trained.safetensors").read_bytes()
            left = sorted({path.name for path in killed.iterdir()} - KEPT)
            bound = 0 if ranks == 1 else 1e-3
            good &= all(one <= bound for one in differences) and (same or ranks == 2) and not left
            print(f"{number:>3} {ranks:>6} {options.kills:>6} {steps:>20} {saving:>15} {max(differences):>19.1e}  "
                  f"{', '.join(left) or 'nothing'}{', the same bits' * same}", flush=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
