"""One command for every system that the paper names: training, exam and a row of a table.

    python -m experiments.run --list 7b                            what there is, and what it adds at 7b
    python -m experiments.run lora --size tiny --seed 0            train, examine, write the row
    python -m experiments.run lora train --size 7b                 one program alone, with its own options:
    python -m experiments.run lora chat examples/a.png             train, chat, evaluate or exam
    deepspeed --module experiments.run lora train --size 7b        on several GPUs

The second form takes train.py's options; results and experiments.csv lie in out/experiments. It can be repeated.
"""
import csv
import importlib
import subprocess
import sys
from pathlib import Path

from experiments import clip, cross, lessons, lora, released
from experiments.outside import Experiment, apply
from llama import LLAMA_2, Llama
from tiny.exam import read_marked, table
from visualchat import VisualChat, readable
from vit import VisionConfig, VisionTransformer
from weights import replacing, without_values

PROGRAMS = {"train": "train", "chat": "chat", "evaluate": "evaluate", "exam": "tiny.exam"}
EXPERIMENTS = {
    "mmca": Experiment("multi-modal causal attention: the main road", "4.1"),
    "causal": Experiment("causal attention, which reads image tokens as text", "4.1",
                         options=("--attention", "causal")),
    **{name: one for file in (cross, clip, lora, lessons, released) for name, one in file.EXPERIMENTS.items()}}
OUT = Path("out/experiments")


def find(name: str) -> Experiment:
    """The experiment of a name, such as `lora`, or `lora:16:q_proj` with settings; raises ValueError."""
    kind, _, settings = name.partition(":")
    if settings and kind in lora.FACTORIES:
        return lora.FACTORIES[kind](settings)
    if name not in EXPERIMENTS:
        raise ValueError(f"no experiment {name!r}; --list shows them")
    return EXPERIMENTS[name]


def start(name: str, program: str, given: list[str]):
    """Run a program in this process, changed by the experiment; raises ValueError for options that do not fit."""
    experiment = find(name)
    apply(name, experiment)
    if program == "train":
        own = set(experiment.options[::2])
        if experiment.in_results and (twice := own & set(given) - {"--vit"}):
            raise ValueError(f"{name} sets {', '.join(twice)} itself: leave it out")
        if "--vit" in own - set(given) and {"7b", "13b", "70b"} & set(given):
            raise ValueError(f"{name} knows the tiny encoder alone: name another one's folder with --vit")
        given = [*experiment.options, *["--attention", experiment.attention] * bool(experiment.attention),
                 *["--variant", name] * experiment.in_results, *given]
    sys.argv = [PROGRAMS[program], *given]
    module = importlib.import_module(PROGRAMS[program])
    for constant, value in experiment.values.items():
        file, _, attribute = constant.partition(".")
        setattr(importlib.import_module(file), attribute, value)
    module.main()


def added(experiment: Experiment, size: str) -> int:
    """How many more parameters train than in the paper's model of this size."""
    with without_values():
        model = VisualChat(VisionTransformer(VisionConfig()), Llama(LLAMA_2[size]))
        before = sum(p.numel() for p in model.parameters())
        experiment.variant.change(model)
    return sum(p.numel() for p in model.parameters()) - before


def list_text(size: str) -> str:
    """A line for each experiment."""
    return "\n".join([f"{'name':20}{'section':9}{f'adds at {size}':14}what it is", *(
        f"{name:20}{one.section:9}{readable(added(one, size)):14}{one.says}" for name, one in EXPERIMENTS.items())])


def exam_of(name: str, seed: int, out: Path, options: list[str]) -> dict[str, dict]:
    """The table of a run's exam. What is missing is trained and examined first; options: more of train.py's."""
    folder = out / f"{name.replace(':', '-')}-{seed}"
    this = [sys.executable, "-m", "experiments.run", name]
    train = [*this, "train", "--size", "tiny", "--seed", str(seed), "--out", str(folder), "--resume", *options]
    for result, command in (("trained.safetensors", train),
                            ("eval.csv", [*this, "exam", "--model", str(folder)])):
        unfinished = result == "trained.safetensors" and (folder / "checkpoints").exists()
        if (unfinished or not (folder / result).exists()) and subprocess.run(command).returncode:
            sys.exit(f"experiments: {folder} did not end; the same command goes on with it")
    return table(read_marked(folder / "eval.csv"))


def write_row(name: str, seed: int, options: list[str], lines: dict[str, dict]):
    """Put the percentages of a run into experiments.csv, in place of those of the same run."""
    path, run = OUT / "experiments.csv", {"name": name, "seed": str(seed), "options": " ".join(options)}
    rows = list(csv.DictReader(open(path, newline=""))) if path.exists() else []
    rows = [row for row in rows if any(row[key] != value for key, value in run.items())]
    shares = {group: line["right"] for group, line in lines.items()}
    rows.append(run | {group: "" if share is None else f"{share:.1f}" for group, share in shares.items()})
    with replacing(path) as new, open(new, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1])
        writer.writeheader()
        writer.writerows(rows)
    print("\n".join(f"{key}: {value}" for key, value in rows[-1].items()))


def main():
    """The command line; a wrong name ends the program with a line."""
    # DeepSpeed's launcher puts --local_rank before everything else.
    first = [text for text in sys.argv[1:2] if text.startswith("--local_rank")]
    name, *given = sys.argv[1 + len(first):] or ["--help"]
    try:
        if name == "--list":
            print(list_text(given[0] if given and given[0] in LLAMA_2 else "7b"))
        elif name in ("-h", "--help"):
            print(__doc__)
        elif given and given[0] in PROGRAMS:
            start(name, given[0], [*given[1:], *first])
        else:
            find(name)
            seed = given[given.index("--seed") + 1] if "--seed" in given else "0"
            more = [text for i, text in enumerate(given) if "--seed" not in given[max(i - 1, 0):i + 1]]
            OUT.mkdir(parents=True, exist_ok=True)
            write_row(name, int(seed), more, exam_of(name, int(seed), OUT, more))
    except ValueError as error:
        sys.exit(f"experiments: {error}")


if __name__ == "__main__":
    main()
