"""7b on a machine without a card: what 16 and 8 bits cost and save. Not part of the test suite.

    python tests/laptop.py errors     four layers of 7b's shape: logits in 16 and 8 bits against 32 bits; speeds
    python tests/laptop.py chat       all of 7b, in files of zeros that take no disk: memory, time; with chat.py's
                                      --int8 and --compile

`chat` needs 18 GB of memory, 10 with --int8. Its values are zeros but for a few that make it answer (sparse.py).
"""
import copy
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

# First of ours, because it puts the project's root on the path.
from bench import ROOT, kinds, random_llama, times, weight_bytes

import torch

import short
import sparse
from llama import LLAMA_2, Cache
from short import shorten
from tiny.pretrain import VIT
from visualchat import VisualChat
from vit import VisionTransformer


@torch.no_grad()
def errors():
    """Differences of all positions' logits, the share of equal likeliest tokens, and the time of one token."""
    has_bf16 = short.multiplies_bf16()
    short_llama = random_llama(replace(LLAMA_2["7b"], num_hidden_layers=4), torch.float16)
    vit, kind = VisionTransformer(VIT), kinds(512, 1)
    x = torch.randn(1, 512, 4096) * 0.02
    exact = copy.deepcopy(short_llama).float()
    models = {"32 bits": exact}
    for name, int8 in (("16 bits", False), ("8 bits", True)):
        models[name] = copy.deepcopy(short_llama)
        shorten(VisualChat(vit, models[name]), int8, torch.float32)
    expected = exact.lm_head(exact(x, kind))
    for name, llama in models.items():
        for in_bf16 in [False, True][:1 + (has_bf16 and name != "32 bits")]:
            short.multiplies_bf16 = lambda: in_bf16
            found, started = llama.lm_head(llama(x, kind)), time.perf_counter()
            llama(x, kind)
            seconds = time.perf_counter() - started
            off = ((found - expected).norm() / expected.norm()).item()
            same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
            print(f"{name}{', prompts in BF16' * in_bf16}: logits off by {off:.1e}, the likeliest token the same "
                  f"at {100 * same:.1f} % of the positions; 512 positions in {seconds:.2f} s", flush=True)
    caches = {name: Cache(llama, 1, 64) for name, llama in models.items()}
    found = times({name: lambda llama=llama, cache=caches[name]: llama.next_logits(torch.tensor([3]), cache)
                   for name, llama in models.items()} | {"read": torch.ones(2 ** 28).sum}, 9)
    rate = 2 ** 30 / found["read"]
    for name, llama in models.items():
        print(f"{name}: a token in {1e3 * found[name]:.0f} ms, {weight_bytes(llama) / found[name] / 1e9:.1f} of "
              f"{rate / 1e9:.1f} GB/s, share {weight_bytes(llama) / found[name] / rate:.2f}")


def memory_of(process: int) -> dict[str, float]:
    """GB by what they are: a process's own, of files, shared; nothing where it has ended."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    except OSError:
        return {}
    return {name: int(lines[name].split()[0]) * 1024 / 1e9 for name in ("RssAnon", "RssFile", "VmRSS")
            if name in lines}


def chat(options: list[str]):
    """Ask about an image; prints what chat.py says, and the most memory that it had."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        llama = sparse.write_llama(root / "llama", LLAMA_2["7b"])
        result = sparse.write_result(root / "out", "7b", llama, sparse.write_vit(root / "vit", 48), LLAMA_2["7b"])
        process = subprocess.Popen(
            [sys.executable, "chat.py", "--model", result, "examples/a.png", "--question", "Describe image 1.",
             "--question", "And now?", "--verbose", "--max-new-tokens", "8", *options], cwd=ROOT)
        started, most = time.perf_counter(), {}
        while process.poll() is None:
            for name, value in memory_of(process.pid).items():
                most[name] = max(value, most.get(name, 0))
            time.sleep(0.05)
    print(f"chat.py {' '.join(options)}: {time.perf_counter() - started:.0f} s in all, at most "
          f"{', '.join(f'{name} {value:.2f} GB' for name, value in most.items())}; exit {process.returncode}")


if __name__ == "__main__":
    what, *options = sys.argv[1:] or ["errors"]
    errors() if what == "errors" else chat(options)
