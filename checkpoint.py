"""How does a run survive a kill? Checkpoints of what trains, and signals that are noted instead of ending a step.

    save      every rank writes its part of the moments and float32 masters; then one rename adds progress.json,
              which has a checksum of every file and its own
    killed    what was being written has no progress.json, and the checkpoint before it is whole
    --resume  finds the newest whole one, checks that options, texts and names of images are the same, and loads
              it, also with another number of ranks

progress.json says how many steps are done, and the best validation loss. From the steps train.py knows the epoch
and what is left of it, because seed and epoch alone give the order. No state of random numbers is kept: after the
first weights training draws none. The frozen weights are never saved: they are in their own files. The end of a
run removes its checkpoints. Side room of train.py.
"""
import csv
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed.comm as dist
import torch
from deepspeed.utils import safe_get_full_fp32_param
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from data import Conversation
from recipe import Options
from visualchat import CONFIG, TEMPLATE, TRAINED
from weights import printable, read_json, replacing

PROGRESS = "progress.json"
# A run goes on only with the same of these.
SAME = ("size", "attention", "llama", "vit", "variant", "datasets", "seed", "epochs", "batch", "positions", "lr",
        "embedding_lr", "zero", "precision")


class Stop:
    """Within `with`, Ctrl-C and SIGTERM do not end the process: they are noted, so that it can end well.

    Another one at least three seconds later ends it at once. (Launchers pass signals on, so one may come twice.)
    """

    def __enter__(self) -> "Stop":
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        if self.asked and time.monotonic() > self.since + 3:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.asked:
            self.asked, self.since = True, time.monotonic()

    def agreed(self, engine) -> bool:
        """Whether any rank was asked: all ranks must leave together."""
        asked = torch.tensor(float(self.asked), device=engine.device)
        dist.all_reduce(asked)
        return asked.item() > 0


def trained(engine) -> dict[str, Tensor]:
    """What was trained, whole and in float32, by name. All ranks must ask together."""
    found = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            whole = safe_get_full_fp32_param(p)
            found[name] = (p if whole is None else whole).detach().float().cpu()    # stage 0 may keep no copy
    return found


def sums(parts: dict[str, Tensor]) -> dict[str, int]:
    """For each tensor in float32 a number that depends on its bits alone; a sum of floats depends on threads."""
    return {name: part.contiguous().view(torch.int32).sum().item() for name, part in parts.items()}


def identity(conversations: Iterable[Conversation]) -> str:
    """A checksum of what conversations say and of their images' names, wherever the data folder lies."""
    digest = hashlib.sha256()
    for conversation in conversations:
        for one in conversation.rounds:
            names = [Path(str(image)).name for image in one.images]
            digest.update(repr((one.question, one.answer, names)).encode(errors="backslashreplace"))
    return digest.hexdigest()


def image_names(conversations: Iterable[Conversation], data: Path) -> list[str]:
    """The image files of these conversations, as they are called in the data folder."""
    return sorted({str(image.relative_to(data)) for conversation in conversations for one in conversation.rounds
                   for image in one.images if isinstance(image, Path)})


# ---- one run at a time, and what cannot be written ----

@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Hold the folder's lock, which the end of the process releases, whatever ends it.

    Raises ValueError where another run has it and OSError where the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a")
    except OSError as error:
        raise OSError(f"{out} cannot be a folder for the result: {error.strerror}. Take another --out") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another run writes into {out}: wait for its end, or take another --out") from None
        yield


def is_lost_rank(error: Exception) -> bool:
    """Whether PyTorch says that another rank has ended or does not answer; gloo's errors have no own type."""
    return isinstance(error, RuntimeError) and (isinstance(error, torch.distributed.DistError)
                                                or "gloo" in str(error))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises OSError that names the folder for whatever keeps the block from writing, such as a full disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or is_lost_rank(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if folder.exists() and shutil.disk_usage(folder).free < 2 ** 16:       # PyTorch has its own words for it
            reason = "no space is left"
        raise OSError(f"could not write into {folder}: {reason}. Make room there, or make it writable, and go on "
                      "with --resume") from error


# ---- log.csv, which goes on after a kill, too, and loss.png ----

# The columns of log.csv; the last two are empty but for the last step of an epoch.
LOG = ("step", "epoch", "loss", "lr", "positions", "seconds", "loss_scale", "skipped", "val_loss", "exact_match")


def write_log(rows: list[dict], path: Path):
    with replacing(path) as unfinished, open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, LOG)
        writer.writeheader()
        writer.writerows(rows)


def read_log(path: Path, step: int) -> list[dict]:
    """The rows of log.csv up to a step; raises ValueError where somebody changed it to something else."""
    if not path.is_file():
        return []
    types = dict(step=int, epoch=int, positions=int, skipped=int)
    try:
        with open(path) as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != LOG:
                raise ValueError(f"expected the columns {', '.join(LOG)}")
            return [{name: value if value == "" and name in LOG[-2:] else types.get(name, float)(value)
                     for name, value in row.items()} for row in reader if int(row["step"]) <= step]
    except (ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path} is no log of a run: delete it, and the run goes on without: {error}") from error


def draw_curve(rows: list[dict], path: Path, width: int = 900, height: int = 500):
    """The loss over the steps as an image: training as a blue line, validation as orange dots."""
    losses = [(row["step"], row["loss"]) for row in rows]
    checks = [(row["step"], row["val_loss"]) for row in rows if row["val_loss"] != ""]
    top, last = max(loss for _, loss in losses + checks), losses[-1][0]
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)

    def at(step: float, loss: float) -> tuple[float, float]:
        return 60 + step / last * (width - 90), height - 40 - loss / top * (height - 80)

    for i in range(5):
        pen.line((at(0, top * i / 4), at(last, top * i / 4)), "#DDDDDD")
        pen.text(at(0, top * i / 4), f"{top * i / 4:.2f} ", "black", anchor="rm", font_size=14)
        pen.text(at(last * i / 4, 0), f"\n{last * i // 4}", "black", anchor="ma", font_size=14)
    pen.line([at(*point) for point in losses], "#4C72B0", width=2)
    for point in checks:
        pen.circle(at(*point), 5, "#DD8452")
    pen.text((60, 8), "loss per answer token by step: training (line), validation (dots)", "black", font_size=14)
    image.save(path)


# ---- checkpoints ----

def steps_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the oldest first."""
    return sorted(path for path in folder.glob("step-*")
                  if re.fullmatch(r"step-\d{8}", path.name) and path.is_dir())


def digests(folder: Path) -> dict[str, str]:
    """A checksum of every file in a checkpoint but progress.json, by its name."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != PROGRESS):
        with open(path, "rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def sealed(state: dict) -> str:
    """A checksum of what progress.json says."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_progress(folder: Path) -> dict:
    """What progress.json of a checkpoint says; raises ValueError where not all is as it was written."""
    state = read_json(folder / PROGRESS)
    if (template := state.get("template", 1)) == TEMPLATE:      # else `latest` refuses it, whole or not
        if state.pop("digest", None) != sealed(state):
            raise ValueError(f"{PROGRESS} is damaged, or of an older version of this code")
        if wrong := {name for name, _ in state["files"].items() ^ digests(folder).items()}:
            raise ValueError(f"{', '.join(sorted(wrong))} is damaged")
    return state | {"template": template}


def latest(options: Options, say: Callable[[str], None] = print) -> dict | None:
    """What progress.json of the newest whole checkpoint says, or None; says which newer ones are not whole.

    Raises ValueError where it belongs to a run with other options, another template or, at stage 0, another number
    of ranks, where it is there although --resume is not given, and where all are damaged.
    """
    folder, progress, damaged = Path(options.out) / "checkpoints", None, False
    for step in reversed(steps_in(folder)):
        if (step / PROGRESS).exists():                          # else a kill interrupted its writing
            try:
                progress = read_progress(step)
                break
            except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
                damaged = True
                say(printable(f"{step} is left out: {error}"))
    if progress is None:
        if damaged:
            raise ValueError(f"no checkpoint in {folder} is whole: delete it to start again")
        return None
    if progress["template"] != TEMPLATE:
        raise ValueError(f"{options.out} was started with version {progress['template']} of the prompt template, "
                         f"and this code has version {TEMPLATE}: delete {folder} and start again")
    if not options.resume:
        raise ValueError(f"{options.out} holds a run that stopped at step {progress['step']}: go on with "
                         f"--resume, start another with another --out, or delete {folder}")
    now = {name: list(value) if isinstance(value := getattr(options, name), tuple) else value for name in SAME}
    if differing := [name for name in SAME if progress["options"].get(name, "") != now[name]]:
        raise ValueError("; ".join(f"{options.out} was started with {name} {progress['options'].get(name)}, now "
                                   f"it is {now[name]}" for name in differing))
    if options.zero == 0 and progress["ranks"] != dist.get_world_size():
        raise ValueError(f"a run with --zero 0 goes on with as many ranks as it had, {progress['ranks']}")
    return progress


def has_ended(options: Options) -> bool:
    """Whether the folder holds a run that came to its end; raises ValueError where --resume means another."""
    out = Path(options.out)
    if not (out / TRAINED).exists() or (out / "checkpoints").exists():
        return False
    found = read_json(out / CONFIG) if options.resume else {}
    for name in ("size", "attention", "variant"):
        if found.get(name, getattr(options, name)) != getattr(options, name):
            raise ValueError(f"{out} holds the result of a run with {name} {found[name]!r}, now it is "
                             f"{getattr(options, name)!r}: take another --out")
    return True


def room_needed(options: Options, values: int) -> int:
    """Bytes that the folder of a run takes at most, where so many values train; its log and curve are small.

    A checkpoint has 12 bytes of masters and moments for each value and, below stage 3, the value itself. While one
    is written, the older ones are still there. There are two results, in float32, and one that is being written.
    """
    weights = (4 if options.precision == "fp32" else 2) * (options.zero < 3)
    return values * ((12 + weights) * (options.keep + 1) + 3 * 4)


def save_checkpoint(engine, options: Options, progress: dict):
    """Every rank writes its part; then one rename makes it count. A kill leaves the one before."""
    older = [step for step in progress["saved"] if step < progress["step"]]
    progress["saved"] = [*older, progress["step"]][-options.keep:]
    folder, tag = Path(options.out) / "checkpoints", f"step-{progress['step']:08d}"
    parts = trained(engine)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / tag, ignore_errors=True)         # what a killed run left unfinished
    dist.barrier()
    engine.save_checkpoint(str(folder), tag, save_latest=False, exclude_frozen_parameters=True)
    dist.barrier()                                              # All ranks have written.
    if dist.get_rank() == 0:
        state = {**progress, "ranks": dist.get_world_size(), "options": {n: getattr(options, n) for n in SAME},
                 "sums": sums(parts), "template": TEMPLATE, "files": digests(folder / tag)}
        with replacing(folder / tag / PROGRESS) as new:
            new.write_text(json.dumps(state | {"digest": sealed(state)}, indent=1))
        for old in steps_in(folder):
            if int(old.name[5:]) not in progress["saved"]:
                shutil.rmtree(old)
        shutil.rmtree(folder / "universal", ignore_errors=True)
    dist.barrier()


# What DeepSpeed's files name beside tensors, at any stage and precision.
IN_CHECKPOINTS = {"deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.runtime.fp16.loss_scaler.LossScaler",
                  "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
                  "deepspeed.utils.tensor_fragment.fragment_address"}


def check_harmless(folder: Path):
    """Raises ValueError where a file of a checkpoint could run code: DeepSpeed opens them as pickles."""
    for path in sorted(folder.glob("*.pt")):
        if unknown := set(get_unsafe_globals_in_checkpoint(path)) - IN_CHECKPOINTS:
            raise ValueError(f"{path} names {', '.join(sorted(unknown))}, which no checkpoint of a training does: "
                             "was it made by somebody else?")


def load_checkpoint(engine, options: Options, progress: dict):
    """Bring the engine to where a checkpoint left it; raises ValueError where what is trained is not restored, or
    a file of it could run code."""
    folder, tag = Path(options.out) / "checkpoints", f"step-{progress['step']:08d}"
    check_harmless(folder / tag)
    if progress["ranks"] != dist.get_world_size():
        if dist.get_rank() == 0:                                # DeepSpeed's own converter for other rank counts
            done = subprocess.run([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal",
                                   "--inject_missing_state", "--input_folder", str(folder / tag),
                                   "--output_folder", str(folder / "universal")], stdout=subprocess.DEVNULL)
            if done.returncode:
                raise ValueError(f"{folder / tag} could not be brought to {dist.get_world_size()} ranks: go on "
                                 f"with {progress['ranks']}")
        dist.barrier()
        tag = "universal"
    engine.load_checkpoint(str(folder), tag, load_module_strict=False)      # what is frozen has its own files
    if tag == "universal":          # DeepSpeed 0.19 gives all parameter groups one step counter and one rate
        for state in engine.optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()
        for group, lr in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr()):
            group["lr"] = lr
    if sums(trained(engine)) != progress["sums"]:
        raise ValueError(f"{folder}/step-{progress['step']:08d} did not restore what is trained: delete it to go "
                         "on from an older one")


def remove_checkpoints(options: Options):
    """The run is over. The rename comes first: it counts even if a kill interrupts the deletion."""
    out = Path(options.out)
    shutil.rmtree(out / "ended", ignore_errors=True)
    os.replace(out / "checkpoints", out / "ended")
    shutil.rmtree(out / "ended")
