"""What does the paper set, for each size and mixture? The options of `deepspeed train.py`, a field for each flag.

What is not set on the command line is None here, and `for_size` fills it in: for the real sizes as in section
4.2.1 of DeepSpeed-VisualChat, for the tiny one as its world needs it. Side room of train.py. Next: zero.py.
"""
import argparse
import math
import os
from dataclasses import dataclass, field, fields, replace

import torch

from mmca import ATTENTION
from sources import MIXTURES, SOURCES, dataset_names
from visualchat import REPOSITORIES, VARIANTS


def option(default, help: str, choices: list | None = None, least: float | None = None, type_: type | None = None):
    """A flag: one of `choices`, or a finite number not below `least`; type_: its own, where default is None."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least,
                                            "type": type_ or type(default)})


@dataclass(frozen=True)
class Options:
    """Everything that the command line sets."""
    # What is trained?
    size: str = option("tiny", "size of the language model", list(REPOSITORIES))
    attention: str = option("mmca", "who attends to whom; written: mmca by the formula as it is written, slower",
                            list(ATTENTION))
    llama: str = option("", "folder of the LLaMA-2 weights; looked for if not given")
    vit: str = option("", "folder of the QWen-VL weights; looked for if not given")
    variant: str = option("", "a model that differs from the paper's, of a program that builds on this one",
                          list(VARIANTS))
    # On what?
    data: str = option(None, "data folder; default data/tiny for tiny, else data", type_=str)
    datasets: tuple[str, ...] = option((), "datasets or mixtures of them; default: as the paper for this size",
                                       [*SOURCES, *MIXTURES])
    skip_bad: bool = option(False, "leave out records that cannot be read, and say how many, instead of stopping")
    cache_features: str = option(None, "folder that keeps what the ViT makes of each image, so that it runs once; "
                                       "default out/features for tiny, else none", type_=str)
    seed: int = option(0, "of the validation split, the order and the projection's first values", least=0)
    # How?
    epochs: int = option(None, "passes over the data; default 2 for tiny, else as in the paper", least=1,
                         type_=int)
    batch: int = option(None, "conversations per step, over all ranks; default 16 for tiny, else 128", least=1,
                        type_=int)
    positions: int = option(4096, "positions that a rank computes at a time, filled with whole conversations; "
                                  "longer ones lose their last rounds", least=1)
    lr: float = option(None, "peak learning rate, reached after a tenth of the steps, followed by a cosine; "
                             "default 2e-3 for tiny, else 1e-3", least=0, type_=float)
    embedding_lr: float = option(None, "that of the token embedding; default --lr / 4 for tiny, else --lr",
                                 least=0, type_=float)
    workers: int = option(2, "processes per rank that open images", least=0)
    # Where?
    zero: int = option(3, "ZeRO stage: what the ranks share out among them", [0, 1, 2, 3])
    precision: str = option(None, "default fp16 on a GPU, fp32 on a CPU", ["fp16", "bf16", "fp32"], type_=str)
    offload: str = option("", "where what a rank holds waits while the GPU does not need it", ["", "cpu", "nvme"])
    nvme: str = option("/local_nvme", "folder for --offload nvme")
    recompute: bool = option(False, "keep only each layer's input; compute the rest again in the backward pass")
    deepspeed_config: str = option("", "JSON file laid over the settings that DeepSpeed gets from here")
    show_config: bool = option(False, "print those settings and end")
    out: str = option(None, "folder for the result; default out/<size>", type_=str)
    save_steps: int = option(100, "steps between checkpoints for --resume; each epoch ends with one, too", least=1)
    keep: int = option(2, "how many of the newest checkpoints to keep", least=1)
    resume: bool = option(False, "go on where a run into the same folder was stopped or killed")
    overwrite: bool = option(False, "replace the result of a run into the same folder that has ended")
    monitor: tuple[str, ...] = option((), "who else is told the figures, through DeepSpeed",
                                      ["tensorboard", "wandb", "csv_monitor"])
    plan: bool = option(False, "print what each GPU will hold and how much there is to compute, and end")
    check_weights: bool = option(False, "say in one screen what this machine has and lacks for the training: "
                                        "weights, data, memory, disk; and end")
    gpus: int = option(8, "how many GPUs --plan plans for, and --check-weights where there is none", least=1)
    gpu_memory: float = option(80.0, "what each of them has, in 10^9 bytes", least=1)
    length: int = option(1024, "positions of a conversation that --plan expects, a third of them answers", least=1)
    local_rank: int = option(0, "set by the launcher")


# The mixture of datasets for each size, as in the paper.
MIXTURE_OF_SIZE = {"tiny": "single", "7b": "attention", "13b": "set2", "70b": "set2"}


def paper_epochs(size: str, datasets: tuple[str, ...]) -> int:
    """On LLaVA's two datasets 5 at 7b (the attention comparison) and 10 at larger sizes (Single); on others 6."""
    if set(dataset_names(datasets)) == set(MIXTURES["single"]):
        return 5 if size == "7b" else 10
    return 6


def for_size(options: Options) -> Options:
    """Options with what is None filled in. --plan is about GPUs, so it plans for FP16 where there is none, too.

    So does --check-weights, but for the tiny size, which trains on a CPU as well.
    """
    datasets = options.datasets or (MIXTURE_OF_SIZE[options.size],)
    usual = (dict(data="data/tiny", cache_features="out/features", epochs=2, batch=16, lr=2e-3)
             if options.size == "tiny" else
             dict(data="data", cache_features="", epochs=paper_epochs(options.size, datasets), batch=128, lr=1e-3))
    on_gpu = (options.plan or options.check_weights and options.size != "tiny" or
              torch.accelerator.current_accelerator(check_available=True) is not None
              and os.environ.get("DS_ACCELERATOR") != "cpu")                         # DeepSpeed's own switch
    usual |= dict(out=f"out/{options.size}", precision="fp16" if on_gpu else "fp32")
    options = replace(options, datasets=datasets, **{name: value for name, value in usual.items()
                                                     if getattr(options, name) is None})
    if options.embedding_lr is None:                    # The tiny LLaMA knows the words of its data already.
        options = replace(options, embedding_lr=options.lr / 4 if options.size == "tiny" else options.lr)
    return options


def share_of_rate(step: int, steps: int) -> float:
    """Share of the peak at a step: up in a straight line over a tenth of the steps, then down a cosine to zero."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def command_line(description: str) -> Options:
    """Options from the command line; a bad one ends the program with a line."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Options):
        # Both spellings, because the launcher writes --local_rank.
        flags = dict.fromkeys((f"--{f.name.replace('_', '-')}", f"--{f.name}"))
        how = (dict(action="store_true") if f.default is False else dict(nargs="+", type=str) if f.default == ()
               else dict(type=f.metadata["type"]))
        parser.add_argument(*flags, default=f.default, help=f.metadata["help"], **how,
                            **({"choices": f.metadata["choices"]} if f.metadata["choices"] else {}))
    given = Options(**{name: tuple(value) if isinstance(value, list) else value
                       for name, value in vars(parser.parse_args()).items()})
    for f in fields(Options):
        least, value = f.metadata["least"], getattr(given, f.name)
        if least is not None and value is not None and not least <= value < 2 ** 63:
            parser.error(f"--{f.name.replace('_', '-')} {value}: expected {least} or more, and no huge number")
    return for_size(given)
