"""How does a run survive a kill? Checkpoints of what trains, and signals that are noted instead of ending a step.

    save      every rank writes its part of the moments and float32 masters; then one rename makes it the latest
    killed    the checkpoint that `latest` names is whole, whatever was being written
    --resume  finds it, checks that the options are the same, and loads it, also with another number of ranks

progress.json beside them says how many steps are done, which checkpoints are kept, and the best validation loss.
From the steps train.py knows the epoch and what is left of it, because seed and epoch alone give the order.
The frozen weights are never saved: they are in their own files. The end of a run removes its checkpoints.
Side room of train.py.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import deepspeed.comm as dist
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from recipe import Options
from visualchat import TEMPLATE, TRAINED
from weights import read_json, replacing

# A run goes on only with the same of these.
SAME = ("size", "attention", "datasets", "skip_bad", "seed", "epochs", "batch", "positions", "lr", "embedding_lr",
        "zero", "precision")


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


def latest(options: Options) -> dict | None:
    """How far the newest complete checkpoint in the result's folder is, or None.

    Raises ValueError where it belongs to a run with other options, or is there although --resume is not given.
    """
    folder = Path(options.out) / "checkpoints"
    if not (folder / "latest").exists():
        return None
    progress = read_json(folder / (folder / "latest").read_text() / "progress.json")
    if (template := progress.get("template", 1)) != TEMPLATE:
        raise ValueError(f"{options.out} was started with version {template} of the prompt template, and data.py "
                         f"has version {TEMPLATE}: delete {folder} and start again")
    if not options.resume:
        raise ValueError(f"{options.out} holds a run that stopped at step {progress['step']}: go on with "
                         f"--resume, start another with another --out, or delete {folder}")
    now = {name: list(value) if isinstance(value := getattr(options, name), tuple) else value for name in SAME}
    if differing := [name for name in SAME if progress["options"].get(name) != now[name]]:
        raise ValueError("; ".join(f"{options.out} was started with {name} {progress['options'].get(name)}, now "
                                   f"it is {now[name]}" for name in differing))
    if options.zero == 0 and progress["ranks"] != dist.get_world_size():
        raise ValueError(f"a run with --zero 0 goes on with as many ranks as it had, {progress['ranks']}")
    return progress


def has_ended(options: Options) -> bool:
    """Whether the result's folder holds a run that came to its end."""
    return (Path(options.out) / TRAINED).exists() and not (Path(options.out) / "checkpoints").exists()


def save_checkpoint(engine, options: Options, progress: dict):
    """Every rank writes its part; then one rename makes it the latest. A kill leaves the one before."""
    older = [step for step in progress["saved"] if step < progress["step"]]
    progress["saved"] = [*older, progress["step"]][-options.keep:]
    folder, tag = Path(options.out) / "checkpoints", f"step-{progress['step']:08d}"
    parts = trained(engine)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / tag, ignore_errors=True)         # what a killed run left unfinished
    dist.barrier()
    engine.save_checkpoint(str(folder), tag, save_latest=False, exclude_frozen_parameters=True)
    if dist.get_rank() == 0:
        state = {**progress, "ranks": dist.get_world_size(), "options": {n: getattr(options, n) for n in SAME},
                 "sums": sums(parts), "template": TEMPLATE}
        (folder / tag / "progress.json").write_text(json.dumps(state, indent=1))
        with replacing(folder / "latest") as new:
            new.write_text(tag)
        for old in sorted(folder.glob("step-????????")):
            if int(old.name[5:]) not in progress["saved"]:
                shutil.rmtree(old)
        shutil.rmtree(folder / "universal", ignore_errors=True)
    dist.barrier()


def load_checkpoint(engine, options: Options, progress: dict):
    """Bring the engine to where a checkpoint left it; raises ValueError where what is trained is not restored."""
    folder, tag = Path(options.out) / "checkpoints", f"step-{progress['step']:08d}"
    if progress["ranks"] != dist.get_world_size():
        if dist.get_rank() == 0:                                # DeepSpeed's own converter for other rank counts
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


def remove_checkpoints(options: Options):
    """The run is over. The rename comes first: it counts even if a kill interrupts the deletion."""
    out = Path(options.out)
    shutil.rmtree(out / "ended", ignore_errors=True)
    os.replace(out / "checkpoints", out / "ended")
    shutil.rmtree(out / "ended")
