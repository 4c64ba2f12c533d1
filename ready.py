"""Is all there for a training? One screen, before anything is paid for: python train.py --size 7b --check-weights

    ok          it is there, and large enough
    slow        training starts, and would be faster with more of it
    unknown     it cannot be told here
    missing, too little, wrong      training cannot start; the line says what was found and what was expected

Of weights only names, shapes and types are read, no values; no image is opened; no GPU is needed. Side room of
train.py. How much memory is needed is from zero.py, loader.py and checkpoint.py.
"""
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from checkpoint import has_ended, room_needed, steps_in
from llama import LLAMA_2, Llama, Tokenizer
from loader import shared_memory
from recipe import Options
from short import free_memory
from sources import SOURCES, Reader, dataset_names, file_names, where_to_get
from tiny.world import DATA
from visualchat import REPOSITORIES, encoder_in
from vit import PREFIX, VisionConfig
from weights import check_readable, download, find_weights, local_folders, needed_files, printable, read_file
from zero import (check_machine, check_options, counts, get_accelerator, memory, plan_text, published_sizes,
                  settings_for)

Finding = tuple[str, str]       # a state from the list above, and what was found. A check may also raise an error.
STARTS = ("ok", "slow", "unknown")


# ---- weights and data ----

def weights_folder(given: str, repository: str) -> Path:
    """The folder that training would read, or else one whose download began; raises FileNotFoundError for none."""
    try:
        return Path(given or find_weights(repository))
    except FileNotFoundError:
        if begun := [folder for folder in local_folders(repository) if folder.is_dir()]:
            return begun[0]
        raise


def is_unusable(path: Path, prefix: str) -> bool:
    """Whether a weight file is absent, or what it says about its tensors cannot be read."""
    try:
        read_file(path, prefix)
    except (OSError, ValueError):
        return True
    return False


def with_command(error: Exception, command: str) -> Exception:
    """The error with the command that gets what is absent or damaged; no command helps against other errors."""
    its_type = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    return its_type(f"{error}. Get it with\n{command}") if isinstance(error, its_type) else error


def check_tower(given: str, repository: str, prefix: str, read: Callable, published) -> Finding:
    """A folder of weights; `read` makes a model without values of it, and `published` is what it should be."""
    folder, bad = weights_folder(given, repository), []
    into = None if "snapshots" in folder.parts else folder      # None: the cache, where it was found
    try:
        needed = needed_files(folder, prefix) or []
        bad = [path.name for path in needed if is_unusable(path, prefix)]
        tower = read(folder)
        if type(tower.config) is type(published) and tower.config != published:
            found, expected = vars(tower.config).items(), vars(published).items()
            into = local_folders(repository)[0]                 # two models in one folder would not do
            raise ValueError(f"{folder} is of another --size: {dict(found - expected)}, expected "
                             f"{dict(expected - found)}")
    except (OSError, ValueError) as error:
        raise with_command(error, download(repository, into, bad)) from error
    tensors = tower.state_dict().values()
    types = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    return "ok", (f"{folder}: {len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors) / 1e9:.2f} GB in "
                  f"{types}, weight files: {len(needed)}")


def check_tokenizer(options: Options) -> Finding:
    """The tokenizer in LLaMA's folder."""
    repository, name = REPOSITORIES[options.size][0], "tokenizer.model"
    folder = weights_folder(options.llama, repository)
    try:
        pieces = Tokenizer(folder, published_sizes(options.size)[0].vocab_size).model.vocab_size()
    except (OSError, ValueError) as error:
        raise with_command(error, download(repository, folder, [name])) from error
    return "ok", f"{folder / name}: {pieces:,} pieces"


def check_data(options: Options, name: str) -> Finding:
    """The files of a dataset; what they hold is for `python sources.py` to check."""
    data, counted = Path(options.data), []
    if data == DATA and not data.exists():
        return "ok", f"training draws {data}"
    SOURCES[name].read(Reader(name, data))                      # asks for the files, and reads none of them yet
    for path in (data / file for file in SOURCES[name].files):
        if path.is_dir():
            counted.append(f", {len(file_names(path)):,} files in {path}")
            if not file_names(path):
                name = path.relative_to(data).as_posix()
                raise FileNotFoundError(f"{path} is empty. Get {where_to_get(name, data)}")
        elif path.exists():                                     # else parquet files stand for it
            check_readable(path)
    return "ok", f"its files are there{''.join(counted)}; `python sources.py` looks into them"


# ---- the machine ----

def free_cards() -> list[tuple[str, int]]:
    """Name and free bytes of each GPU here."""
    return [] if get_accelerator().device_name() == "cpu" else [
        (torch.cuda.get_device_name(i), torch.cuda.mem_get_info(i)[0]) for i in range(torch.cuda.device_count())]


def check_gpus(options: Options, here: list) -> Finding:
    """The GPUs of this machine, or those that the other lines are about."""
    if here or options.size == "tiny":
        return "ok", f"{len(here)}: {', '.join(sorted({name for name, _ in here})) or 'the CPU computes'}"
    return "missing", f"none here; planned for --gpus {options.gpus} of --gpu-memory {options.gpu_memory:.0f} GB"


def check_precision(options: Options, here: list) -> Finding:
    """Whether the machine computes in the precision that is asked for."""
    if not here and options.size != "tiny":
        return "unknown", f"{options.precision}: there is no GPU to ask"
    check_machine(options)
    return "ok", options.precision


def enough(free: float, needed: float, purpose: str, advice: str = "make room") -> Finding:
    """Whether as many bytes are free as are needed."""
    text = f"{needed / 1e9:.2f} GB {purpose}, {free / 1e9:.2f} GB free"
    return ("ok", text) if free >= needed else ("too little", f"{text}: {advice}")


def check_memory(options: Options, here: list) -> Finding:
    """What a GPU holds by the plan; raises ValueError for settings that training refuses."""
    ranks = len(here) or (1 if options.size == "tiny" else options.gpus)
    check_options(options, ranks)
    settings_for(options, ranks)                                # --deepspeed-config must not contradict
    if not here and options.size == "tiny":
        return "ok", "none is needed"
    return enough(min((free for _, free in here), default=options.gpu_memory * 1e9),
                  sum(memory(options, *published_sizes(options.size), ranks).values()),
                  f"on each of {ranks} by the plan", "--recompute or fewer --positions need less; see --plan, "
                  "with --gpus for several machines")


def check_main_memory(options: Options, here: list) -> Finding:
    """What lies in main memory (or on a drive, with --offload nvme) for all of this machine's GPUs."""
    values, width = counts(*published_sizes(options.size)), 4 if options.precision == "fp32" else 2
    whole, ranks = values["frozen"] + values["trained"], len(here) or options.gpus
    needed = 12 * values["trained"] + (options.zero == 3) * width * whole
    if options.offload == "nvme":
        return enough(shutil.disk_usage(options.nvme).free, needed, f"for --offload in {options.nvme}")
    free = free_memory()
    if not here and options.size == "tiny":
        return enough(free, sum(memory(options, *published_sizes("tiny"), 1).values()), "by the plan")
    if not options.offload and options.zero == 3:
        return "ok", f"{free / 1e9:.2f} GB free; weights pass through, mapped from their files"
    if not options.offload:     # Each rank copies what its file has in another type: LLaMA has FP16, the ViT BF16.
        copied = {"fp16": values["vit"], "bf16": whole - values["vit"], "fp32": whole}[options.precision]
        return enough(free, width * copied * ranks, f"for {ranks} ranks that load", "--zero 3 needs nothing")
    return enough(free, needed, "for --offload")


def most_shared(options: Options) -> int:
    """Bytes of a machine's shared memory that the loader's processes may take, by the largest conversations."""
    vision = published_sizes(options.size)[1]
    most = max(SOURCES[name].most_images for name in dataset_names(options.datasets))
    each = 2 * vision.n_queries * vision.output_dim if options.cache_features else 3 * vision.image_size ** 2
    return shared_memory(options, most, each)


def check_shared_memory(options: Options) -> Finding:
    """What the loader's processes share; without it loader.py opens images between the steps."""
    shared = Path("/dev/shm")
    if not options.workers or not shared.is_dir():
        return "ok", "none is needed"
    state, text = enough(shutil.disk_usage(shared).free, most_shared(options),
                         f"at most for --workers {options.workers}", "images would be opened between the steps; "
                         "in Docker, --shm-size makes it larger")
    return state.replace("too little", "slow"), text


def check_disk(options: Options) -> Finding:
    """Room for checkpoints and results, and no other run in the way."""
    out, trained = Path(options.out), counts(*published_sizes(options.size))["trained"]
    if not options.resume and (steps_in(out / "checkpoints") or has_ended(options) and not options.overwrite):
        raise ValueError(f"{out} holds a run: take another --out, or --resume, or --overwrite where it has ended")
    folder = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise ValueError(f"{folder} is no folder to write into: take another --out")
    return enough(shutil.disk_usage(folder).free, room_needed(options, trained), f"at most in {out}")


# ---- the screen ----

def findings(options: Options) -> Iterator[tuple[str, Finding]]:
    """(what was looked at, what was found), one after the other."""
    here, size, (llama, vit) = [], options.size, REPOSITORIES[options.size]
    try:
        here = free_cards()
    except RuntimeError as error:                               # no answer of a driver, or a full card
        yield "driver of GPUs", ("wrong", str(error).splitlines()[0])
    checks = {
        "LLaMA-2": partial(check_tower, options.llama, llama, "", partial(Llama.from_pretrained, device="meta"),
                           LLAMA_2.get(size)),
        "ViT": partial(check_tower, options.vit, vit, PREFIX, lambda folder: encoder_in(folder).from_pretrained(
            folder, device="meta"), VisionConfig() if size in LLAMA_2 else None),
        "tokenizer": partial(check_tokenizer, options),
        **{name: partial(check_data, options, name) for name in dataset_names(options.datasets)},
        **{name: partial(check, options, here) for name, check in (
            ("GPUs", check_gpus), ("precision", check_precision), ("GPU memory", check_memory),
            ("main memory", check_main_memory))},
        "/dev/shm": partial(check_shared_memory, options), "disk": partial(check_disk, options)}
    for name, check in checks.items():
        try:
            yield name, check()
        except (OSError, ValueError, RuntimeError) as error:
            yield name, ("missing" if isinstance(error, FileNotFoundError) else "wrong", str(error))


def look_ahead(options: Options) -> int:
    """Print what --plan or --check-weights asks for; returns the exit status, 1 where training cannot start."""
    if options.plan:
        print(f"{plan_text(options)}\n/dev/shm of each machine: {most_shared(options) / 1e9:.2f} GB at most for "
              f"--workers {options.workers}")
        return 0
    lacking, to_get = [], {}
    for name, (state, text) in findings(options):
        found, _, how = text.partition(". Get ")
        print(textwrap.fill(printable(f"{state:12}{name:19}{found}"), 115, subsequent_indent=" " * 12,
                            break_on_hyphens=False, break_long_words=False))
        to_get |= dict.fromkeys(line.strip() for line in re.split("; |\n", how) if not line.endswith("with"))
        lacking += [name] * (state not in STARTS)
    for line in filter(None, to_get):
        print(printable(f"get: {line}"))
    print(textwrap.fill(f"training cannot start: {', '.join(lacking)}", 115) if lacking else "training can start")
    return int(bool(lacking))
