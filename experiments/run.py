"""One command for every system that the paper names: training, exam and a row of a table.

    python -m experiments.run --list 7b                 what there is, and what it adds at 7b
    python -m experiments.run lora --seed 0             train the tiny size, examine it, write the row
    python -m experiments.run lora train --size 7b      one program alone, with its own options:
    python -m experiments.run lora chat --model out/experiments/lora-0      train, chat, evaluate or exam
    deepspeed --module experiments.run lora train --size 7b     on several GPUs
    python -m experiments.run --compare mmca causal     a table of both, with five seeds each

The second and the last form take more options of train.py. Run again, they go on where they stopped. Results and
experiments.csv lie in out/experiments.
"""
import csv
import importlib
import re
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

import visualchat
from experiments import clip, cross, lessons, lora, released
from experiments.outside import Experiment, apply, swap
from llama import LLAMA_2, Llama
from tiny.exam import read_marked, table
from visualchat import VisualChat, readable
from vit import VisionConfig, VisionTransformer
from weights import without_values

PROGRAMS = {"train": "train", "chat": "chat", "evaluate": "evaluate", "exam": "tiny.exam"}
EXPERIMENTS = {
    "mmca": Experiment("multi-modal causal attention: the main road", "4.1"),
    "causal": Experiment("causal attention, which reads image tokens as text", "4.1",
                         options=("--attention", "causal")),
    **{name: one for file in (cross, clip, lora, lessons, released) for name, one in file.EXPERIMENTS.items()}}
OUT = Path("out/experiments")
COLUMNS = {"right": "", "weakest": ", weakest topic", "blind": ", gray images"}      # of `tiny.exam.table`


def find(name: str) -> Experiment:
    """The experiment of a name, such as `lora`, or `lora:16:q_proj` with settings; raises ValueError."""
    kind, _, settings = name.partition(":")
    if settings and kind in lora.FACTORIES:
        return lora.FACTORIES[kind](settings)
    if name not in EXPERIMENTS:
        raise ValueError(f"no experiment {name!r}; --list shows them")
    return EXPERIMENTS[name]


def flags(given: Iterable[str]) -> set[str]:
    """The names of the options among these words, as train.py spells them."""
    return {word.partition("=")[0].replace("_", "-") for word in given if word.startswith("--")}


def only(name: str, load: Callable) -> Callable:
    """`visualchat.load` that refuses results of anything but this experiment, whose template they may not know."""
    def load_own(folder, *settings):
        model, config = load(folder, *settings)
        if config.variant != name:
            raise ValueError(f"{folder} is no result of {name}, but of {config.variant or 'the main road'}")
        return model, config
    return load_own


def run_program(name: str, program: str, given: list[str]):
    """Run a program in this process, changed by the experiment; raises ValueError for options that do not fit."""
    experiment = find(name)
    own = [*experiment.options, *["--attention", experiment.attention] * bool(experiment.attention)]
    if twice := flags(own) & flags(given) - {"--vit"}:
        raise ValueError(f"{name} sets {', '.join(twice)} itself: leave it out")
    if "--vit" in flags(own) - flags(given) and re.search(r"--size[= ](7b|13b|70b)", " ".join(given)):
        raise ValueError(f"{name} knows the tiny encoder alone: name another one's folder with --vit")
    apply(name, experiment)
    if experiment.in_results:
        swap(visualchat.load, only(name, visualchat.load))
    if program == "train":
        own += ["--variant", name] * experiment.in_results
        out = [] if "--out" in flags(given) else ["--out", str(OUT / f"{name.replace(':', '-')}-train")]
        given = [*own, *out, *given]
    sys.argv = [PROGRAMS[program], *given]
    module = importlib.import_module(PROGRAMS[program])
    for constant, value in experiment.values.items():
        file, _, attribute = constant.partition(".")
        setattr(importlib.import_module(file), attribute, value)
    module.main()


def added(experiment: Experiment, size: str) -> int:
    """How many more parameters there are than in the paper's model of this size."""
    with without_values():
        model = VisualChat(VisionTransformer(VisionConfig()), Llama(LLAMA_2[size]))
        before = sum(p.numel() for p in model.parameters())
        experiment.variant.change(model)
    return sum(p.numel() for p in model.parameters()) - before


def list_text(size: str) -> str:
    """A line for each experiment."""
    return "\n".join([f"{'name':20}{'section':9}{f'adds at {size}':14}what it is"] + [
        f"{name:20}{one.section:9}{readable(added(one, size)):14}{one.says}" for name, one in EXPERIMENTS.items()])


def exam_of(name: str, seed: int, out: Path, options: list[str]) -> dict[str, dict]:
    """The table of a run's exam. What is missing is trained and examined first; options: more of train.py's."""
    folder = out / "-".join([re.sub("[^a-z0-9.,_]+", "-", " ".join([name, *options])), str(seed)])
    this = [sys.executable, "-m", "experiments.run", name]
    train = [*this, "train", "--size", "tiny", "--seed", str(seed), "--out", str(folder), "--resume", *options]
    for result, command in (("trained.safetensors", train),
                            ("eval.csv", [*this, "exam", "--model", str(folder)])):
        unfinished = result == "trained.safetensors" and (folder / "checkpoints").exists()
        if (unfinished or not (folder / result).exists()) and subprocess.run(command).returncode:
            sys.exit(f"experiments: {folder} did not end; the same command goes on with it")
    return table(read_marked(folder / "eval.csv"))


def write_row(name: str, seed: int, options: list[str], lines: dict[str, dict]):
    """Add the percentages of a run to experiments.csv, and print them."""
    shares = {group: "" if line["right"] is None else f"{line['right']:.1f}" for group, line in lines.items()}
    row, path = {"name": name, "seed": seed, "options": " ".join(options)} | shares, OUT / "experiments.csv"
    is_first = not path.exists()
    with open(path, "a", newline="") as file:
        csv.writer(file).writerows([row.keys()] * is_first + [row.values()])
    print("\n".join(f"{key}: {value}" for key, value in row.items()))


def compare(names: list[str], seeds: list[int], options: list[str]) -> str:
    """A table in Markdown: mean (least to greatest) over the seeds, in percent; makes the missing runs."""
    exams = {name: [exam_of(name, seed, OUT, options) for seed in seeds] for name in names}
    heads = [f"{name}{title}" for name in names for title in COLUMNS.values()]
    lines = ["| | questions | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for group, line in exams[names[0]][0].items():
        values = [[found[group][column] for found in exams[name]] for name in names for column in COLUMNS]
        cells = ["-" if None in v else f"{mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in values]
        lines.append(f"| {group} | {line['questions']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """The command line; a wrong name or option ends the program with a line."""
    # DeepSpeed's launcher puts --local_rank before everything else.
    first = [word for word in sys.argv[1:2] if word.startswith("--local_rank")]
    name, *given = sys.argv[1 + len(first):] or ["--help"]
    try:
        if given and given[0] in PROGRAMS:
            return run_program(name, given[0], [*given[1:], *first])
        parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
        parser.add_argument("name", nargs="?")
        parser.add_argument("--list", nargs="?", const="7b", choices=list(LLAMA_2))
        parser.add_argument("--compare", nargs="+")
        parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
        parser.add_argument("--size", choices=["tiny"])
        parser.add_argument("--seed", type=int, default=0)
        options, more = parser.parse_known_args()
        if options.list:
            return print(list_text(options.list))
        for name in options.compare or [options.name or ""]:
            find(name)                                          # before anything is trained
        if "--out" in flags(more):
            raise ValueError("a whole run goes into out/experiments; `train` alone takes --out")
        OUT.mkdir(parents=True, exist_ok=True)
        if options.compare:
            print(compare(options.compare, options.seeds, more))
        else:
            write_row(name, options.seed, more, exam_of(name, options.seed, OUT, more))
    except ValueError as error:
        sys.exit(f"experiments: {error}")


if __name__ == "__main__":
    main()
