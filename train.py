"""Training with DeepSpeed: the projection and the token embedding learn, everything else is frozen.

    deepspeed train.py --size tiny                     a laptop, minutes
    deepspeed train.py --size 7b --data /path/to/data  a GPU machine

out/<size>/ then holds trained.safetensors and config.json for chat.py, log.csv and loss.png to look at. The recipe
is the paper's (section 5). This file alone needs deepspeed. Before: data.py, shapes.py. Next file: chat.py.
"""
import argparse
import csv
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")             # threads that spin while they wait slow others

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")   # meant for DeepSpeed
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")              # named, so that DeepSpeed does not search and warn

import deepspeed
import deepspeed.comm as dist
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger, safe_get_full_fp32_param

import shapes
from data import (COCO, DIALOGUE, RECIPES, SOURCES, Conversations, Features, Reader, collate, encode, llava, order,
                  pack, read, split, tensors)
from llama import CHUNK, LLAMA_2, Layer, LlamaConfig, Tokenizer, read_json
from mmca import ATTENTION
from visualchat import (IGNORE, REPOSITORIES, TRAINED, ModelConfig, VisualChat, build, readable, save, towers,
                        whole_answers)
from vit import VisionConfig, VisionTransformer

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def option(default, help: str, choices: list | None = None, least: float | None = None):
    """A setting of the command line: one of `choices`, or a number that is not below `least`."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


@dataclass(frozen=True)
class Options:
    """Everything that the command line sets; what is empty or 0 here is filled in by `for_size`."""
    # What is trained?
    size: str = option("tiny", "size of the language model", list(REPOSITORIES))
    attention: str = option("mmca", "who may look at whom", list(ATTENTION))
    llama: str = option("", "folder of the LLaMA-2 weights; looked for if not given")
    vit: str = option("", "folder of the QWen-VL weights; looked for if not given")
    # On what?
    data: str = option("", "data folder")
    datasets: tuple[str, ...] = option((), "datasets or mixtures of them; default: as the paper for this size",
                                       [*SOURCES, *RECIPES])
    skip_bad: bool = option(False, "leave out records that cannot be read, and say how many, instead of stopping")
    cache_features: str = option("", "folder that keeps what the ViT makes of each picture; it runs once")
    seed: int = option(0, "of the validation split, the order and the projection's first values")
    # How?
    epochs: int = option(0, "passes over the data; default 4 for tiny, else as in the paper", least=1)
    batch: int = option(0, "conversations per step, over all ranks; default 16 for tiny, else 128", least=1)
    positions: int = option(4096, "positions that a rank computes at a time, filled with whole conversations; "
                                  "longer ones lose their last rounds", least=1)
    lr: float = option(0.0, "peak rate, a tenth of the steps on; then a cosine; default 2e-3 for tiny, else 1e-3",
                       least=0)
    embedding_lr: float = option(0.0, "peak learning rate of the token embedding; default that of --lr", least=0)
    workers: int = option(2, "processes per rank that open pictures", least=0)
    exam: int = option(240, "dialogues of each test set to answer after training the tiny size; 0: none", least=0)
    # Where?
    zero: int = option(3, "ZeRO stage: what the ranks share out among them", [0, 1, 2, 3])
    precision: str = option("", "default fp16 on a GPU, fp32 on a CPU", ["fp16", "bf16", "fp32"])
    offload: str = option("", "where what a rank holds waits while the GPU does not need it", ["", "cpu", "nvme"])
    nvme: str = option("/local_nvme", "folder for --offload nvme")
    recompute: bool = option(False, "keep only each layer's input; compute the rest again in the backward pass")
    deepspeed_config: str = option("", "JSON file laid over the settings that DeepSpeed gets from here")
    show_config: bool = option(False, "print those settings and end")
    out: str = option("", "folder for the result; default out/<size>")
    save_steps: int = option(100, "steps between checkpoints for --resume; each epoch ends with one, too", least=1)
    keep: int = option(2, "how many of the newest checkpoints to keep", least=1)
    resume: bool = option(False, "go on where a run into the same folder was stopped or killed")
    monitor: tuple[str, ...] = option((), "who else is told the figures, through DeepSpeed",
                                      ["tensorboard", "wandb", "csv_monitor"])
    plan: bool = option(False, "print what each GPU will hold and how much there is to compute, and end")
    gpus: int = option(8, "how many GPUs --plan plans for", least=1)
    gpu_memory: float = option(80.0, "what each of them has, in 10^9 bytes", least=1)
    length: int = option(1024, "positions of a conversation that --plan expects, a third of them answers", least=1)
    local_rank: int = option(0, "set by the launcher")


# The paper's mixture for each size, and the epochs that it trains on each (section 5).
MIXTURE = {"tiny": "single", "7b": "attention", "13b": "set2", "70b": "set2"}
EPOCHS = {"attention": 5, "single": 10, "set1": 6, "set2": 6}


def for_size(options: Options) -> Options:
    """Options with their empty ones filled in, for the real sizes as the paper has them (section 5)."""
    datasets = options.datasets or (MIXTURE[options.size],)
    usual = (dict(data="data/tiny", epochs=4, batch=16, lr=2e-3) if options.size == "tiny" else
             dict(data="data", epochs=EPOCHS.get(datasets[0], 6), batch=128, lr=1e-3))
    usual |= dict(datasets=datasets, out=f"out/{options.size}",
                  precision="fp32" if get_accelerator().device_name() == "cpu" and not options.plan else "fp16")
    options = replace(options, **{name: value for name, value in usual.items() if not getattr(options, name)})
    return replace(options, embedding_lr=options.embedding_lr or options.lr)


def command_line() -> Options:
    """Options from the command line, a flag for each field."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Options):
        flags = dict.fromkeys((f"--{f.name.replace('_', '-')}", f"--{f.name}"))     # launcher: --local_rank
        kind = (dict(action="store_true") if f.default is False else
                dict(nargs="+", type=str) if isinstance(f.default, tuple) else dict(type=type(f.default)))
        parser.add_argument(*flags, default=f.default, help=f.metadata["help"], **kind,
                            **({"choices": f.metadata["choices"]} if f.metadata["choices"] else {}))
    options = for_size(Options(**vars(parser.parse_args())))
    for f in fields(Options):
        if f.metadata["least"] is not None and not getattr(options, f.name) >= f.metadata["least"]:
            parser.error(f"--{f.name.replace('_', '-')} {getattr(options, f.name)}: "
                         f"expected {f.metadata['least']} or more")
    return options


# ---- DeepSpeed ----

def start():
    """Join the other ranks, with `deepspeed`, torchrun or plain python as launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))                             # a port that nobody uses, for a rank that is alone
        port = str(free.getsockname()[1])
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    for name, value in alone.items():
        os.environ.setdefault(name, value)                      # without them DeepSpeed would look for MPI
    logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at the first start on a CPU
    deepspeed.init_distributed(verbose=False)
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    else:
        ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))
        torch.set_num_threads(max(1, os.cpu_count() // ranks))  # more threads than cores make ranks wait


def check_machine(options: Options):
    """Raises ValueError where the machine or DeepSpeed cannot do what is asked for."""
    precision, least = options.precision, {"": 0, "cpu": 1, "nvme": 3}[options.offload]
    if options.zero < least:
        raise ValueError(f"--offload {options.offload} needs --zero {least}{' or more' * (least < 3)}, "
                         f"found {options.zero}")
    if precision == "fp16" and options.zero == 0:
        raise ValueError("DeepSpeed 0.19 scales no loss in fp16 with --zero 0: take --zero 1, 2 or 3")
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ValueError("fp16 needs a GPU, or a CPU with AVX512-FP16, which this one lacks: "
                         "take --precision fp32, or bf16 for half the memory")
    if precision == "bf16" and not get_accelerator().is_bf16_supported():
        raise ValueError("this machine cannot compute in bf16: take --precision fp16 or fp32")


def sizes(size: str) -> tuple[LlamaConfig, VisionConfig]:
    """The published sizes of both towers; tiny's vocabulary is in its tokenizer, and smaller than said here."""
    if size in LLAMA_2:
        return LLAMA_2[size], VisionConfig()
    return replace(shapes.LLAMA, vocab_size=400), shapes.VIT


@cache
def counts(llama: LlamaConfig, vit: VisionConfig) -> dict[str, int]:
    """How many values a layer, the token embedding, all that is trained and all that is frozen have."""
    with torch.device("meta"):
        layer, tower = (sum(p.numel() for p in part.parameters())
                        for part in (Layer(llama), VisionTransformer(vit)))
    embedding = llama.vocab_size * llama.hidden_size
    return dict(layer=layer, embedding=embedding, trained=embedding + (vit.output_dim + 1) * llama.hidden_size,
                vit=tower, frozen=llama.num_hidden_layers * layer + embedding + llama.hidden_size + tower)


def share(options: Options, ranks: int) -> int:
    """Conversations per rank and step; raises ValueError where ranks cannot share the batch."""
    if options.batch % ranks:
        raise ValueError(f"--batch {options.batch} cannot be shared by {ranks} ranks: take a multiple of {ranks}")
    return options.batch // ranks


def factors(options: Options, ranks: int) -> str:
    """How a batch comes about, in words."""
    return (f"batch {options.batch} = {ranks} ranks x {share(options, ranks)} conversations, packed into at most "
            f"{options.positions} positions at a time")


def settings_for(options: Options, ranks: int) -> dict:
    """DeepSpeed's settings, with those of --deepspeed-config laid over them."""
    values = counts(*sizes(options.size))
    zero = {
        "stage": options.zero,
        # Gradients exist for what is trained alone, so one bucket holds them all, and none is larger than needed.
        "reduce_bucket_size": values["trained"],
        # The next layer is fetched while this one computes: so many values ahead, and as many again in use. The
        # released code's 0 turns that off. Nothing is kept from the forward pass for the backward pass, except the
        # last layer, which is needed again at once.
        "stage3_prefetch_bucket_size": values["layer"],
        "stage3_max_live_parameters": 2 * values["layer"] + values["embedding"],
        "stage3_max_reuse_distance": values["layer"],
        # Norms and biases are so small that asking for them takes longer than holding them.
        "stage3_param_persistence_threshold": 10 ** 5,
    }
    if options.offload:
        where = {"device": options.offload, "pin_memory": True}
        where |= {"nvme_path": options.nvme} if options.offload == "nvme" else {}
        zero |= {"offload_optimizer": where} | ({"offload_param": where} if options.zero == 3 else {})
        if options.offload == "nvme":       # room on the way to and from the drive for two layers and more
            llama, _ = sizes(options.size)
            largest = max(llama.vocab_size, llama.intermediate_size) * llama.hidden_size
            zero["offload_param"] = {**where, "buffer_count": 20, "buffer_size": -(-largest // ranks) + 1024}
    settings = {
        # All that a rank computes before a step. How many packed batches that takes differs from step to step, so
        # train_step tells DeepSpeed which one is the last.
        "train_micro_batch_size_per_gpu": share(options, ranks),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        # The loss scale starts at 65,536, doubles after 500 steps without overflow, and halves with an overflow,
        # except the first of such a stretch, which only skips its step.
        "fp16": {"enabled": options.precision == "fp16", "initial_scale_power": 16, "loss_scale_window": 500},
        "bf16": {"enabled": options.precision == "bf16"},
        "zero_force_ds_cpu_optimizer": False,                   # torch's AdamW serves offloaded masters, too
        "steps_per_print": 10 ** 9,                             # the progress bar says it
    }
    for name in options.monitor:
        place = {"project": "visualchat"} if name == "wandb" else {"output_path": f"{options.out}/monitor/"}
        settings[name] = {"enabled": True, **place} | ({} if name == "wandb" else {"job_name": options.size})
    for name, value in (read_json(Path(options.deepspeed_config)) if options.deepspeed_config else {}).items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    for name, found, expected in (
            ("gradient_accumulation_steps", settings["gradient_accumulation_steps"], 1),
            ("train_micro_batch_size_per_gpu", settings["train_micro_batch_size_per_gpu"], share(options, ranks)),
            ("stage", settings["zero_optimization"]["stage"], options.zero),
            ("fp16", settings["fp16"]["enabled"], options.precision == "fp16"),
            ("bf16", settings["bf16"]["enabled"], options.precision == "bf16")):
        if found != expected:
            raise ValueError(f"{options.deepspeed_config} makes {name} {found}, the other options {expected}: say "
                             "it with --batch, --zero or --precision")
    return settings


def build_shared_out(config: ModelConfig, dtype: torch.dtype, settings: dict) -> VisualChat:
    """The model for ZeRO-3, of which every rank only ever holds its own part.

    Names and shapes are checked on the meta device. Then every parameter is shared out, still empty, and each rank
    copies its own stretch of it out of the memory-mapped file, without a word to the others. (What DeepSpeed has
    already put onto an NVMe drive must be gathered for that, which is slower.)
    """
    model = build(config, dtype, device="meta")
    swapper = None                                              # one for all: each clears the folder for itself
    for module in reversed(list(model.modules())):              # parts before the whole
        module.to_empty(device=get_accelerator().current_device_name(), recurse=False)
        if any(True for _ in module.parameters(recurse=False)):
            # No dtype is given: DeepSpeed 0.19.8 would take BF16 for any on a CPU without AVX512-FP16, where it
            # takes the right one from the settings.
            sharing = deepspeed.zero.Init(module=module, config_dict_or_path=settings, param_swapper=swapper)
            swapper = getattr(sharing, "param_swapper", None)   # there is one for --offload nvme alone
    for tower, folder in zip((model.llama, model.vit), towers(config)):
        parameters = dict(tower.named_parameters())
        for name, tensor in tqdm(tower.tensors(folder), f"loading {folder}", total=len(parameters), leave=False,
                                 disable=dist.get_rank() != 0):
            if (part := parameters[name].ds_tensor).final_location is not None:
                with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
                    if dist.get_rank() == 0:
                        parameters[name].data.copy_(tensor)
                continue
            mine = tensor.flatten()[dist.get_rank() * part.numel():][:part.numel()]
            part.data.flatten()[:len(mine)].copy_(mine)
    with deepspeed.zero.GatheredParameters([model.llama.embed_tokens.weight, *model.projection.parameters()],
                                           modifier_rank=0):
        model.reset_projection()
    return model


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak at a step: up in a straight line over a tenth of the steps, then down a cosine to zero."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def engine_for(model: VisualChat, options: Options, steps: int, universal: bool):
    """The model in DeepSpeed's hands, with the paper's AdamW over what is trainable.

    Universal: it will load a checkpoint that another number of ranks wrote.
    """
    optimizer = torch.optim.AdamW([dict(params=list(model.projection.parameters()), lr=options.lr),
                                   dict(params=[model.llama.embed_tokens.weight], lr=options.embedding_lr)],
                                  betas=(0.0, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    settings = settings_for(options, dist.get_world_size())
    settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": universal}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
    return engine


def trained(engine) -> dict[str, Tensor]:
    """What was trained, whole and in float32, by name. All ranks must ask together."""
    found = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            whole = safe_get_full_fp32_param(p)
            found[name] = (p if whole is None else whole).detach().float().cpu()    # stage 0 may keep no copy
    return found


# ---- a plan, before anything is paid for ----

def memory(options: Options, llama: LlamaConfig, vit: VisionConfig, gpus: int) -> dict[str, float]:
    """Bytes that one of `gpus` GPUs holds at the height of a step, by what they are for.

    Frozen weights need no inputs for a gradient of theirs, so of each layer and position the backward pass wants
    only what the other operations need: both norms' inputs in float32; q, k, v and two outputs of attention, one
    per softmax; SwiGLU's gate, its SiLU, and what that is multiplied with. DeepSpeed's linear layers under ZeRO-3
    keep their inputs, too. All positions count as text here; image tokens need less.
    """
    values, width = counts(llama, vit), 4 if options.precision == "fp32" else 2
    weights, gradients, masters = (gpus if options.zero >= stage else 1 for stage in (3, 2, 1))
    on_gpu = not (options.offload and options.zero == 3)
    key_values = 2 * llama.num_key_value_heads / llama.num_attention_heads
    position = 8 * llama.hidden_size + width * ((3 + key_values) * llama.hidden_size + 3 * llama.intermediate_size)
    if options.zero == 3:
        position += width * (3 * llama.hidden_size + llama.intermediate_size)
    layer = options.positions * position
    inputs = options.positions * llama.hidden_size * width * llama.num_hidden_layers
    return {
        "frozen weights": width * values["frozen"] / weights * on_gpu,
        "trained weights": width * values["trained"] / weights * on_gpu,
        "masters, moments": 12 * values["trained"] / masters * (not options.offload),
        "gradients": width * values["trained"] * (1 + 1 / gradients),       # a bucket, and what is kept of it
        # What may be live (see settings_for), and lm_head, which is as large as the embedding, on top of it.
        "gathered": width * 2 * (values["layer"] + values["embedding"]) * (options.zero == 3),
        "activations": layer + inputs if options.recompute else layer * llama.num_hidden_layers,
        "logits": CHUNK * llama.vocab_size * (2 * width + 8),               # two in float32, two in the precision
    }


def plan(options: Options) -> str:
    """What --plan prints: memory for each ZeRO stage, with and without recomputing; steps and FLOPs."""
    llama, vit = sizes(options.size)
    values, lines = counts(llama, vit), []
    for zero, offload, recompute in [(stage, "", again) for stage in range(4) for again in (False, True)] + [
            (3, "cpu", True)]:
        parts = memory(replace(options, zero=zero, offload=offload, recompute=recompute), llama, vit, options.gpus)
        total = sum(parts.values()) / 1e9
        if not lines:
            lines = ["  ".join([f"{'GB on each GPU':34}", *parts, "total"])]
        name = f"ZeRO-{zero}{' --recompute' * recompute}{' --offload cpu' * bool(offload)}"
        lines.append("  ".join([f"{name:34}", *(f"{value / 1e9:{len(part)}.1f}" for part, value in parts.items()),
                                f"{total:5.1f}", "fits" if total < options.gpu_memory else "too much"]))
    names = list(dict.fromkeys(name for given in options.datasets for name in RECIPES.get(given, [given])))
    samples = sum(SOURCES[name].in_paper for name in names) * 9 // 10           # a tenth is for validation
    steps = samples // options.batch * options.epochs
    positions = steps * options.batch * options.length
    llama_values = values["frozen"] - values["vit"]
    return "\n".join([
        f"{options.size}: {readable(values['trained'])} trained, {readable(values['frozen'])} frozen",
        factors(options, options.gpus), "", *lines, "",
        f"{', '.join(names)}:", f"{samples:,} conversations by the paper's count, {options.epochs} epochs: "
        f"{steps:,} steps of {options.batch} conversations with {options.length} positions (--length),",
        f"{positions:.2e} positions, {4 * llama_values * positions:.2e} FLOPs in LLaMA's matrices: per value and "
        "position 2 forward and 2 backward,", "since frozen weights get no gradient; with --recompute 2 more"])


# ---- checkpoints: what it takes to go on as if nothing had happened ----

SAME = ("size", "attention", "datasets", "skip_bad", "seed", "epochs", "batch", "positions", "lr", "embedding_lr",
        "zero", "precision")


def latest(options: Options) -> dict | None:
    """How far the newest complete checkpoint in the result's folder is, or None.

    Raises ValueError where it belongs to a run with other options, or is there although --resume is not given.
    """
    folder = Path(options.out) / "checkpoints"
    if not (folder / "latest").exists():
        return None
    progress = read_json(folder / (folder / "latest").read_text() / "progress.json")
    if not options.resume:
        raise ValueError(f"{options.out} holds a run that stopped at step {progress['step']}: go on with "
                         f"--resume, start another with another --out, or delete {folder}")
    now = {name: list(value) if isinstance(value := getattr(options, name), tuple) else value for name in SAME}
    if differing := [name for name in SAME if progress["options"].get(name) != now[name]]:
        raise ValueError("; ".join(f"{options.out} was started with {name} {progress['options'].get(name)}, now it "
                                   f"is {now[name]}" for name in differing))
    if options.zero == 0 and progress["ranks"] != dist.get_world_size():
        raise ValueError(f"a run with --zero 0 goes on with as many ranks as it had, {progress['ranks']}")
    return progress


def sums(parts: dict[str, Tensor]) -> dict[str, int]:
    """A number for each tensor in float32 that changes with its bits, and with nothing else."""
    return {name: part.contiguous().view(torch.int32).sum().item() for name, part in parts.items()}


def save_checkpoint(engine, options: Options, progress: dict):
    """Every rank writes its part; then one rename makes it the latest. A kill leaves the one before."""
    folder, tag = Path(options.out) / "checkpoints", f"step-{progress['step']:08d}"
    parts = trained(engine)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / tag, ignore_errors=True)         # what a killed run left unfinished
    dist.barrier()
    engine.save_checkpoint(str(folder), tag, save_latest=False, exclude_frozen_parameters=True)
    if dist.get_rank() == 0:
        state = {**progress, "ranks": dist.get_world_size(), "options": {n: getattr(options, n) for n in SAME},
                 "sums": sums(parts)}
        (folder / tag / "progress.json").write_text(json.dumps(state, indent=1))
        (folder / "latest.new").write_text(tag)
        os.replace(folder / "latest.new", folder / "latest")
        for old in sorted(folder.glob("step-????????")):
            if int(old.name[5:]) not in progress["saved"]:
                shutil.rmtree(old)
        shutil.rmtree(folder / "universal", ignore_errors=True)
    dist.barrier()


def load_checkpoint(engine, options: Options, progress: dict):
    """Bring the engine to where a checkpoint left it; raises ValueError where what is trained is not restored."""
    folder, tag = Path(options.out) / "checkpoints", f"step-{progress['step']:08d}"
    if progress["ranks"] != dist.get_world_size():
        if dist.get_rank() == 0:
            subprocess.run([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
                            "--input_folder", str(folder / tag), "--output_folder", str(folder / "universal")],
                           check=True, stdout=subprocess.DEVNULL)
        dist.barrier()
        tag = "universal"
    engine.load_checkpoint(str(folder), tag, load_module_strict=False)      # what is frozen has its own files
    if tag == "universal":          # DeepSpeed 0.19 gives all parameter groups one step counter and one rate
        for state in engine.optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()
        for group, lr in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr()):
            group["lr"] = lr
    if sums(trained(engine)) != progress["sums"]:
        raise ValueError(f"{folder / tag} did not restore what is trained: name an older one in {folder}/latest")


# ---- the loop ----

class Stop:
    """Within `with`, Ctrl-C and SIGTERM do not end the process: they are noted, so that it can end well."""

    def __enter__(self) -> "Stop":
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        self.asked = True

    def agreed(self, engine) -> bool:
        """Whether any rank was asked: all ranks must leave together."""
        asked = torch.tensor(float(self.asked), device=engine.device)
        dist.all_reduce(asked)
        return asked.item() > 0


def on_device(batch: dict, engine) -> dict:
    return {name: x.to(engine.device, non_blocking=True) if isinstance(x, Tensor) else x
            for name, x in batch.items()}


def as_many(batches: list[dict], like: dict, engine) -> list[dict]:
    """The batches, and empty ones behind them until all ranks have as many: ZeRO-3 ranks run modules together.

    like: any batch, whose shapes the empty ones take.
    """
    most = torch.tensor(len(batches), device=engine.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    empty = {name: x[:, :0] for name, x in like.items() if name in ("ids", "kind", "labels")}
    empty |= {"images": like["images"][:0], "lengths": [0]}
    return [on_device(batch, engine) for batch in batches + [empty] * (int(most) - len(batches))]


def train_step(engine, batches: list[dict]) -> tuple[float, int]:
    """One optimizer step on these batches; returns loss per answer token and positions read, over all ranks.

    Every answer token of the step weighs the same, wherever it lies; the mean over ranks and batches that
    DeepSpeed takes would let a token of a short answer weigh more. So each batch counts by its tokens.
    """
    batches = as_many(batches, batches[0], engine)
    counts = [(batch["labels"] != IGNORE).sum() for batch in batches]
    total = torch.stack([sum(counts), sum(counts[0].new_tensor(batch["ids"].numel()) for batch in batches)])
    dist.all_reduce(total)
    mean = torch.zeros((), device=engine.device)
    for i, (batch, count) in enumerate(zip(batches, counts), 1):
        engine.set_gradient_accumulation_boundary(i == len(batches))
        loss = engine(**batch) * count / total[0].clamp(min=1)
        mean += loss.detach()
        engine.backward(loss * dist.get_world_size())           # DeepSpeed takes the mean over ranks
        try:
            engine.step()
        except Exception as error:                              # DeepSpeed has no narrower one for this
            if "loss scale" not in str(error):
                raise
            raise ValueError("gradients overflow even at the least loss scale: try --precision bf16 or a lower "
                             "--lr; the last checkpoint is good") from error
    dist.all_reduce(mean)
    return mean.item(), int(total[1])


@torch.no_grad()
def evaluate(engine, batches: DataLoader, turns: int) -> tuple[float, float]:
    """Loss per answer token, and the share of answers that greedy decoding gives word for word, on all ranks.

    turns: how many lists of packed batches the rank with the most of them has.
    """
    engine.eval()
    totals, stream, like = torch.zeros(4, device=engine.device), iter(batches), None
    for _ in range(turns):
        packed = next(stream, [])
        like = packed[0] if packed else like                    # every rank has some
        for batch in as_many(packed, like, engine):
            loss, right = engine.module.score(**batch)
            whole = whole_answers(batch["labels"], right)
            totals += torch.stack([loss.sum(), totals.new_tensor(len(loss)), whole.sum(),
                                   totals.new_tensor(len(whole))])
    dist.all_reduce(totals)
    engine.train()
    return (totals[0] / totals[1]).item(), (totals[2] / totals[3]).item()


# ---- the exam of the tiny world ----

def ask(engine, tokenizer: Tokenizer, conversations: list, way: str) -> Iterator[tuple[str, str, bool]]:
    """(images shown, topic, right word for word) for every question, asked in one of three ways.

    exact: after the true rounds before it; blind: the same, with a gray picture for every picture; alone: as the
    first question of a conversation that shows all its pictures at once. Answers are decoded greedily, 64 at a
    time, with the KV cache.
    """
    model, vision = engine.module, engine.module.vit.config
    questions = [(rounds, i) for rounds in conversations for i in range(len(rounds))]
    questions.sort(key=lambda question: len(question[0][question[1]].answer))   # short answers end together
    parts = [questions[i:i + 64] for i in range(0, len(questions), 64)]
    for part in tqdm(parts, f"exam, {way}", leave=False, disable=dist.get_rank() != 0):
        prompts = [[*rounds[:i], replace(rounds[i], answer=None)] for rounds, i in part]
        if way == "alone":
            prompts = [[replace(turns[-1], images=sum((turn.images for turn in turns), ()))] for turns in prompts]
        rows = [tensors(encode(rounds, tokenizer, vision.n_queries), vision.image_size) for rounds in prompts]
        batch = on_device(collate(rows), engine)
        images = batch["images"] * (way != "blind")             # normalized, so zero is gray
        said, ended = [], False
        for token in model.generate(batch["ids"], batch["kind"], images, batch["lengths"], max_new_tokens=12):
            said.append(token)
            if (ended := ended | (token == tokenizer.eos)).all():
                break
        for (rounds, i), ids in zip(part, torch.stack(said, dim=1).tolist()):
            text = tokenizer.decode(ids[:ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids)
            shown = sum(len(turn.images) for turn in rounds[:i + 1])
            yield "one" if shown == 1 else "several", shapes.topic_of(rounds[i].question), text == rounds[i].answer


def exam(engine, tokenizer: Tokenizer, data: Path, n: int) -> list[dict]:
    """Rows of eval.csv: exact match per topic and way of asking, in n dialogues of each test set of shapes.py."""
    engine.eval()
    rows = []
    for test in shapes.TESTS:
        told = [conversation.rounds for conversation in
                llava(Reader(test, data / test), [data / test / DIALOGUE], data / test / COCO)]
        conversations = random.Random(0).sample(told, min(n, len(told)))
        answers = {way: list(ask(engine, tokenizer, conversations, way)) for way in ("exact", "alone", "blind")}
        for images in ("one", "several"):
            for topic in ("all", *shapes.TOPICS):
                right = {way: [whole for shown, about, whole in given
                               if shown == images and topic in ("all", about)] for way, given in answers.items()}
                if n_asked := len(right["exact"]):
                    rows.append(dict(test=test, images=images, topic=topic, questions=n_asked,
                                     **{way: round(sum(whole) / n_asked, 4) for way, whole in right.items()}))
    return rows


# ---- what can be looked at ----

def draw_curve(rows: list[dict], path: Path, width: int = 900, height: int = 500):
    """The loss over the steps as a picture: training in blue, validation as orange dots."""
    losses = [(row["step"], row["loss"]) for row in rows]
    checks = [(row["step"], row["val_loss"]) for row in rows if row["val_loss"] != ""]
    top, last, left, below = max(loss for _, loss in losses + checks), losses[-1][0], 70, height - 50
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)

    def place(step, loss):
        return left + step / last * (width - left - 30), below - loss / top * (below - 30)

    for i in range(5):
        y = place(0, top * i / 4)[1]
        pen.line((left, y, width - 30, y), "#DDDDDD")
        pen.text((left - 8, y), f"{top * i / 4:.2f}", "black", anchor="rm", font_size=14)
        pen.text((place(last * i / 4, 0)[0], below + 10), f"{last * i // 4}", "black", anchor="mt", font_size=14)
    pen.text((width / 2, height - 8), "step", "black", anchor="mb", font_size=14)
    pen.line([place(*point) for point in losses], "#4C72B0", width=2)
    for point in checks:
        x, y = place(*point)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), "#DD8452")
    pen.text((width - 40, 12), "loss per answer token: training (line), validation (dots)", "black", anchor="rt",
             font_size=14)
    picture.save(path)


def write_csv(rows: list[dict], path: Path):
    """Write the rows; a kill leaves the file that was there before."""
    unfinished = path.with_suffix(".new")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


# ---- the whole ----

def load_data(options: Options, config: ModelConfig, tokenizer: Tokenizer,
              model: VisualChat) -> tuple[Conversations, Conversations]:
    """For training and for validation; raises ValueError where there are too few conversations, and as `read`."""
    rank, ranks, vit = dist.get_rank(), dist.get_world_size(), model.vit
    found = read(Path(options.data), options.datasets, options.seed, options.skip_bad,
                 tell=print if rank == 0 else lambda line: None)
    features = None
    if options.cache_features:
        whole = VisionTransformer.from_pretrained(      # the model's own may be shared out among the ranks
            towers(config)[1], DTYPES[options.precision], get_accelerator().current_device_name())
        features = Features(Path(options.cache_features), whole)
        pictures = list(dict.fromkeys(image for talk in found for turn in talk.rounds for image in turn.images))
        features.fill(pictures[rank::ranks], whole, options.skip_bad)
        dist.barrier()
    limit = min(options.positions, model.llama.config.max_position_embeddings)
    train, held_out = (Conversations(part, tokenizer, vit.config, limit, options.skip_bad, features)
                       for part in split(found, options.seed))
    if len(train) < options.batch or len(held_out) < ranks:
        raise ValueError(f"{options.data} holds {len(train)} conversations for training and {len(held_out)} for "
                         f"validation, too few for --batch {options.batch} on {ranks} ranks")
    return train, held_out


def ignore_signals(worker: int):
    """Launchers pass Ctrl-C and SIGTERM on to all processes; workers must go on until the last step is kept."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def loader(rows: Conversations, indices: list[int], options: Options) -> DataLoader:
    """For each step this rank's packed batches of these rows in this order, made by worker processes."""
    return DataLoader(rows, share(options, dist.get_world_size()), sampler=indices, num_workers=options.workers,
                      collate_fn=partial(pack, positions=options.positions), worker_init_fn=ignore_signals,
                      pin_memory=torch.cuda.is_available())     # copies to a GPU then need not be waited for


def prepare(options: Options) -> tuple[VisualChat, ModelConfig, Tokenizer]:
    """The model, partly frozen, its configuration and its tokenizer; draws the tiny world if it is not there."""
    if Path(options.data) == shapes.DATA and dist.get_rank() == 0:      # nobody else's folder is drawn into
        shapes.ensure(Path(options.data))
    dist.barrier()
    torch.manual_seed(options.seed)
    config = ModelConfig(options.size, options.attention, options.llama, options.vit)
    dtype = DTYPES[options.precision]
    model = (build_shared_out(config, dtype, settings_for(options, dist.get_world_size())) if options.zero == 3
             else build(config, dtype))
    model.llama.recompute = options.recompute
    summary = model.freeze()
    if dist.get_rank() == 0:
        print(f"{summary}; {options.attention}, ZeRO-{options.zero}, {options.precision}, "
              f"ranks: {dist.get_world_size()}")
        print(factors(options, dist.get_world_size()))
    return model, config, Tokenizer(towers(config)[0])


def loss_scale(engine) -> float:
    """What losses are multiplied by, so that FP16 gradients do not vanish; 1 in other precisions."""
    return float(getattr(engine.optimizer, "loss_scale", 1)) if engine.fp16_enabled() else 1.0


# What a card can do at most, in FP16 or BF16 operations per second without sparsity, by its maker's data sheet.
PEAK = {"H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
        "A100": 312e12, "V100": 125e12}


def of_peak(speed: float, options: Options, card: str, ranks: int) -> float | None:
    """The share of what the cards can do that the matrices of LLaMA's layers take at so many positions per second
    over all ranks: 2 operations per value forward, 2 backward, none for frozen weights' gradients. None: unknown
    card.
    """
    layers = counts(*sizes(options.size))["layer"] * sizes(options.size)[0].num_hidden_layers
    peaks = [peak for name, peak in PEAK.items() if name in card]
    return 4 * layers * speed / (ranks * peaks[0]) if peaks else None


def show(bar: tqdm, rows: list[dict], options: Options):
    """The last step in the progress bar; speeds over the last twenty, positions without padding."""
    last, recent = rows[-1], rows[-20:]
    seconds = max(recent[-1]["seconds"] - recent[0]["seconds"], 1e-3)
    figures = dict(loss=f"{last['loss']:.3f}", lr=f"{last['lr']:.1e}")
    if options.precision == "fp16":
        figures |= {"scale": f"{last['loss_scale']:.0f}", "skipped": last["skipped"]}
    if len(recent) > 1:
        speed = sum(row["positions"] for row in recent[1:]) / seconds
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        if share := of_peak(speed, options, card, dist.get_world_size()):
            figures["of peak"] = f"{share:.0%}"
        figures |= {"positions/s": round(speed), "samples/s": f"{options.batch * (len(recent) - 1) / seconds:.1f}"}
    bar.set_postfix(figures, refresh=False)
    bar.update()


def read_log(path: Path, step: int) -> list[dict]:
    """The rows of log.csv up to a step."""
    if not path.exists():
        return []
    kind = dict(step=int, epoch=int, positions=int, skipped=int)
    with open(path) as file:
        return [{name: value and kind.get(name, float)(value) for name, value in row.items()}
                for row in csv.DictReader(file) if int(row["step"]) <= step]


def keep(engine, options: Options, progress: dict, rows: list[dict]):
    """Write the log and a checkpoint of the step just done."""
    older = [step for step in progress["saved"] if step < progress["step"]]
    progress["saved"] = [*older, progress["step"]][-options.keep:]
    if dist.get_rank() == 0:
        write_csv(rows, Path(options.out) / "log.csv")
    save_checkpoint(engine, options, progress)


def end_epoch(engine, train: Conversations, held_out: Conversations, options: Options, config: ModelConfig,
              progress: dict, rows: list[dict]) -> str:
    """Look at the held-out conversations; write the result, to best/ too if it is that. Returns what to say."""
    rank, ranks, out = dist.get_rank(), dist.get_world_size(), Path(options.out)
    mine, own = range(rank, len(held_out), ranks), share(options, ranks)        # all of them, whatever the ranks
    turns = math.ceil(math.ceil(len(held_out) / ranks) / own)
    loss, exact = evaluate(engine, loader(held_out, mine, options), turns)
    rows[-1] |= dict(val_loss=loss, exact_match=exact)
    engine.monitor.write_events([("Validation/loss", loss, engine.global_samples),
                                 ("Validation/exact_match", exact, engine.global_samples)])
    folders = [out, out / "best"] if loss < progress["best"] else [out]
    progress["best"] = min(progress["best"], loss)
    parts = trained(engine)
    skipped = torch.tensor([*train.skipped, *held_out.skipped], dtype=torch.int32, device=engine.device)
    dist.all_reduce(skipped, dist.ReduceOp.MAX)                 # two ranks may have met the same one
    if rank == 0:
        for folder in folders:
            save(folder, parts, config)
        draw_curve(rows, out / "loss.png")
    return (f"epoch {rows[-1]['epoch']}: validation loss {loss:.4f}, exact match {exact:.1%} of the answers in "
            "held-out conversations"
            + (f"; {int(skipped.sum())} conversations skipped since the start, named above" if skipped.any()
               else ""))


def fit(engine, train: Conversations, held_out: Conversations, options: Options, config: ModelConfig,
        progress: dict | None, stop: Stop) -> bool:
    """Train to the end, from `progress` on if given; returns whether it got there, or was asked to stop.

    Raises ValueError where the loss is no number any more; what was written before stays.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    progress = progress or dict(step=0, best=math.inf, saved=[], conversations=len(train))
    if progress["conversations"] != len(train):
        raise ValueError(f"{options.out} was started on {progress['conversations']} conversations, now "
                         f"{options.data} holds {len(train)}")
    rows = read_log(Path(options.out) / "log.csv", progress["step"])
    (Path(options.out) / "checkpoints").mkdir(parents=True, exist_ok=True)      # it goes when the run has ended
    started = time.time() - (rows[-1]["seconds"] if rows else 0)
    steps = len(train) // options.batch                         # what fills no batch is left for another epoch
    own = share(options, ranks)                                 # conversations of a step
    with tqdm(total=steps * options.epochs, initial=progress["step"], disable=rank != 0) as bar:
        for epoch in range(progress["step"] // steps + 1, options.epochs + 1):
            done = progress["step"] - (epoch - 1) * steps       # of this epoch, before the run was interrupted
            mine = order(len(train), options.seed, epoch, rank, ranks)[done * own:steps * own]
            stream = iter(loader(train, mine, options))
            for step in range(done + 1, steps + 1):
                lr = engine.get_lr()[0]
                loss, positions = train_step(engine, next(stream))
                norm = 0 if options.precision == "fp16" else engine.get_global_grad_norm() or 0     # fp16 skips it
                if not math.isfinite(loss) or not math.isfinite(norm):
                    raise ValueError(f"loss {loss}, norm of gradients {norm} at step {progress['step'] + 1}: try "
                                     "--precision bf16 or a lower --lr; the last checkpoint is good")
                progress["step"] += 1
                rows.append(dict(step=progress["step"], epoch=epoch, loss=loss, lr=lr, positions=positions,
                                 seconds=round(time.time() - started, 2), loss_scale=loss_scale(engine),
                                 skipped=engine.skipped_steps, val_loss="", exact_match=""))
                engine.monitor.write_events([(f"Train/{name}", rows[-1][name], engine.global_samples)
                                             for name in ("loss", "skipped")])
                show(bar, rows, options)
                stopping = stop.agreed(engine)
                if step < steps and (stopping or step % options.save_steps == 0):
                    keep(engine, options, progress, rows)
                    if stopping:
                        return False
            message = end_epoch(engine, train, held_out, options, config, progress, rows)
            if rank == 0:
                bar.write(message)
            keep(engine, options, progress, rows)
            if stop.agreed(engine):
                return False
    return True


def run(options: Options) -> bool:
    """Everything, in order; returns whether it got to the end, or was asked to stop.

    Raises ValueError or FileNotFoundError where options, weights or data do not fit.
    """
    check_machine(options)
    share(options, dist.get_world_size())                       # complains before anything takes time
    if options.show_config:
        if dist.get_rank() == 0:
            print(json.dumps(settings_for(options, dist.get_world_size()), indent=2))
        return True
    progress, out = latest(options), Path(options.out)
    if options.resume and not progress:
        ended = (out / TRAINED).exists() and not (out / "checkpoints").exists()
        if dist.get_rank() == 0:
            print(f"{out} holds a run that has ended; without --resume another one begins" if ended else
                  f"{out} holds no checkpoint: the run starts at its beginning")
        if ended:
            return True
    model, config, tokenizer = prepare(options)
    train, held_out = load_data(options, config, tokenizer, model)
    universal = bool(progress) and progress["ranks"] != dist.get_world_size()
    engine = engine_for(model, options, len(train) // options.batch * options.epochs, universal)
    if progress:
        load_checkpoint(engine, options, progress)
    with Stop() as stop:
        ended = fit(engine, train, held_out, options, config, progress, stop)
    if not ended:
        if dist.get_rank() == 0:
            print(f"stopped; the same command with --resume goes on from {options.out}")
        return False
    if options.exam and (Path(options.data) / shapes.TESTS[0]).exists():
        table = exam(engine, tokenizer, Path(options.data), options.exam)
        if dist.get_rank() == 0:
            write_csv(table, out / "eval.csv")
            print("fresh drawings, one or several images shown: share of answers right word for word,\n"
                  "after the true rounds before (exact), as a first question (alone), with gray pictures (blind)")
            for line in (table[0], *(row.values() for row in table)):
                print("  ".join(f"{value:<11}" for value in line))
    if dist.get_rank() == 0:
        shutil.rmtree(out / "ended", ignore_errors=True)
        os.replace(out / "checkpoints", out / "ended")          # the run is over, even if this is killed half-way
        shutil.rmtree(out / "ended")
        print(f"{options.out} holds the result; log.csv and loss.png show how it came about. Talk to it with\n"
              f"    python chat.py --model {options.out} examples/a.png examples/b.png")
    return True


def end_workers():
    """At its exit Python ends what workers are left by SIGTERM, which ours ignore, and would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)               # PyTorch would call their end an error
    for worker in multiprocessing.active_children():
        worker.kill()


def main():
    """The command line; what does not fit ends it with one line. Exits with 130 where it was asked to stop."""
    options = command_line()
    try:
        if options.plan:
            print(plan(options))
            return
        start()
        ended = run(options)
    except (OSError, ValueError) as error:
        message = str(error)
        if message.startswith("Caught"):                        # in a worker: leave its traceback out
            message = message.strip().rpartition("ValueError: ")[2]
        sys.exit(f"train.py: {message}")
    except KeyboardInterrupt:                                   # before or after the steps, where nothing is lost
        sys.exit(130)
    finally:
        end_workers()
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if ended else 130)                               # 130: stopped by hand, as shells have it


if __name__ == "__main__":
    main()
