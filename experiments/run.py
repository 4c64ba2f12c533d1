"""One command for every system that the paper names: training, exam and a row of a table.

    python -m experiments.run lora --seed 0             train the tiny size, examine it, write the row
    python -m experiments.run lora train --size 7b      one program alone: train, chat, evaluate or exam
    python -m experiments.run --compare mmca causal     a table of both, with five seeds each
    python -m experiments.run --list 7b                 what there is, and what it adds at 7b

The first and the third take more options of train.py, and go on after Ctrl-C or a kill. experiments.csv and all
results lie in out/experiments; chat, evaluate and exam find one with --model.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)                # Ctrl-C during the imports ends without a word

import hashlib
import importlib
import re
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from experiments import clip, cross, lessons, lora, released
from experiments.outside import Experiment, apply
from llama import LLAMA_2, Llama
from tiny.exam import comparison_text, read_marked, table, write_row
from visualchat import CONFIG, ModelConfig, VisualChat, build, readable
from vit import VisionConfig, VisionTransformer
from weights import printable, read_json, without_values

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
        added(experiment := lora.FACTORIES[kind](settings), "7b")       # raises where there is no such layer
        return experiment
    if name not in EXPERIMENTS:
        raise ValueError(f"no experiment {name!r}; --list shows them")
    return EXPERIMENTS[name]


def flags(given: list[str]) -> set[str]:
    """The names of the options among these words, as train.py spells them."""
    return {word.partition("=")[0].replace("_", "-") for word in given if word.startswith("--")}


def own_options(name: str, given: list[str]) -> list[str]:
    """The options that an experiment sets; raises ValueError where those of the user do not fit."""
    experiment = find(name)
    own = [*experiment.options, *["--attention", experiment.attention] * bool(experiment.attention)]
    if twice := {*flags(own), "--variant"} & flags(given) - {"--vit"}:
        raise ValueError(f"{name} sets {', '.join(twice)} itself: leave it out")
    if experiment.variant and (unfit := {"--plan", "--check-weights"} & flags(given)):
        raise ValueError(f"{', '.join(unfit)} knows the paper's model, not that of {name}: leave it out")
    if "--vit" in flags(own) - flags(given) and re.search(r"--size[= ](7b|13b|70b)", " ".join(given)):
        raise ValueError(f"{name} knows the tiny encoder alone: name another one's folder with --vit")
    return own


def check_results(name: str, program: str, given: list[str]):
    """Raises ValueError unless --model names results of this experiment: others have other models or templates."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", type=Path, nargs="+" if program == "evaluate" else 1)
    if not (folders := parser.parse_known_args(given)[0].model):
        raise ValueError(f"--model has to name a result of {name}, such as {OUT}/{name}-0")
    for folder in [folder for folder in folders if (folder / CONFIG).is_file()]:
        if (found := read_json(folder / CONFIG).get("variant", "")) != name:
            raise ValueError(f"{folder} is no result of {name}, but of {found or 'the main road'}, and opens with "
                             f"`python -m experiments.run {found or 'mmca'} {program}`")


def run_program(name: str, program: str, given: list[str]):
    """Run a program in this process, changed by the experiment; raises ValueError for options that do not fit."""
    experiment, own = find(name), own_options(name, given)
    if program == "train":
        own += ["--variant", name] * experiment.in_results
        out = [] if "--out" in flags(given) else ["--out", str(OUT / f"{name.replace(':', '-')}-train")]
        given = [*own, *out, *given]
    elif experiment.in_results and not {"--help", "-h"} & {*given}:
        check_results(name, program, given)
    # Names are changed before the program is imported, because recipe.py then lists the variants that there are;
    # constants after it, because they lie in files that import recipe.py.
    apply(name, experiment)
    module = importlib.import_module(PROGRAMS[program])
    for constant, value in experiment.values.items():
        file, _, attribute = constant.partition(".")
        setattr(importlib.import_module(file), attribute, value)
    if program == "train" and experiment.in_results:            # chat.py alone could not open the result
        module.print = lambda text: print(text.replace("python chat.py", f"python -m experiments.run {name} chat"))
    sys.argv = [PROGRAMS[program], *given]
    module.main()


def added(experiment: Experiment, size: str) -> int:
    """How many more parameters train than in the paper's model of this size."""
    def n_trained() -> int:
        model.freeze()
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    with without_values():
        model = (build(ModelConfig(), device="meta") if size == "tiny" else
                 VisualChat(VisionTransformer(VisionConfig()), Llama(LLAMA_2[size])))
        before = n_trained()
        if experiment.variant:
            experiment.variant.change(model)
        return n_trained() - before


def list_text(size: str) -> str:
    """A line for each experiment; another encoder, whose size is its folder's, has "-" for what it adds."""
    return "\n".join([f"{'name':20}{'section':9}{f'adds at {size}':14}what it is"] + [
        f"{name:20}{one.section:9}{'-' if '--vit' in one.options else readable(added(one, size)):14}{one.says}"
        for name, one in EXPERIMENTS.items()])


def finish(command: list[str], folder: Path):
    """Run a command to its end, and end with its status where that is not 0; the command writes into the folder.

    Ctrl-C and SIGTERM are passed on to it, and then it takes its time: a training writes its checkpoint first.
    """
    child = subprocess.Popen(command)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: child.send_signal(number))
    if status := child.wait():
        if 0 < status < 128:
            sys.exit(f"experiments: {folder} did not end, for the reason above")
        print(f"experiments: {folder} was stopped; the same command goes on with it", file=sys.stderr)
        sys.exit(130)


def folder_of(name: str, seed: int, options: list[str]) -> Path:
    """Where a run lies: no two runs in one folder, so a digest stands for signs that no name should have."""
    text = " ".join([name.replace(":", "-"), *options])
    digest = [hashlib.sha256(text.encode()).hexdigest()[:8]] * bool(re.search(r"[^\w., -]", text, re.ASCII))
    return OUT / "-".join([re.sub(r"[^\w.,]+", "-", text, flags=re.ASCII), *digest, str(seed)])


def exam_of(name: str, seed: int, options: list[str]) -> dict[str, dict]:
    """The table of a run's exam. What is missing is trained and examined first; options: more of train.py's."""
    folder, this = folder_of(name, seed, options), [sys.executable, "-m", "experiments.run", name]
    if (folder / "checkpoints").exists() or not (folder / "trained.safetensors").exists():
        finish([*this, "train", "--seed", str(seed), "--out", str(folder), "--resume", *options], folder)
    if not (folder / "eval.csv").exists():
        finish([*this, "exam", "--model", str(folder)], folder)
    return table(read_marked(folder / "eval.csv"))


def check_run(name: str, seed: int, options: list[str]):
    """Raises ValueError for options that a whole run cannot have; those that train.py lacks end the program."""
    if unfit := flags(options) & {"--size", "--out", "--overwrite", "--plan", "--check-weights", "--show-config"}:
        raise ValueError(f"a whole run is tiny and ends in {OUT}: `train` alone takes {', '.join(unfit)}")
    own_options(name, options)
    sys.argv = ["experiments", *options, "--seed", str(seed)]
    importlib.import_module("recipe").command_line("")          # not earlier: see run_program


def main():
    """The command line; a wrong name or option ends the program with a line."""
    # DeepSpeed's launcher puts --local_rank before everything else.
    first = [word for word in sys.argv[1:2] if word.startswith("--local_rank")]
    words = sys.argv[1 + len(first):] or ["--help"]
    names = [] if words[0].startswith("-") else words[:1]
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seed", "--seeds", nargs="+", type=int)
    parser.add_argument("--compare", nargs="+", metavar="NAME")
    parser.add_argument("--list", nargs="?", const="7b", choices=["tiny", *LLAMA_2])
    try:
        if names and words[1:2] and words[1] in PROGRAMS:
            return run_program(*words[:2], [*words[2:], *first])
        options, more = parser.parse_known_args(words[len(names):])
        if options.list:
            return print(list_text(options.list))
        if bool(names) == bool(options.compare):
            raise ValueError("expected one name first, or --compare and names, or --list")
        seeds = options.seed or range(5 if options.compare else 1)
        for name in names or options.compare:                   # all of them before anything is trained
            for seed in seeds:
                check_run(name, seed, more)
        OUT.mkdir(parents=True, exist_ok=True)
        exams = {name: [exam_of(name, seed, more) for seed in seeds] for name in names or options.compare}
        if options.compare:
            return print(comparison_text(exams))
        for seed, exam in zip(seeds, *exams.values()):
            write_row(OUT / "experiments.csv", dict(name=words[0], seed=seed, options=" ".join(more)), exam)
    except ValueError as error:
        sys.exit(f"experiments: {printable(str(error))}")


if __name__ == "__main__":
    main()
