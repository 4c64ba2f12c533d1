"""How does 7b fit into a laptop? Its weights stay in the 16 bits of their files, or take 8; products widen them.

"Short" weights have 16 or 8 bits. Linear layers' weights are most of a model, and are read once for each product.
ShortLinear widens a few rows at a time, so only those ever exist in 32 bits. In 16 bits the values are those of
the files, which are mapped into memory and not copied. In 8 bits each output channel has a scale of its own, and
each weight is rounded to one of 255 multiples of it. Single tokens are computed in FP32; prompts and images in
BF16, which rounds once more, where the processor has instructions for it, because they are several times as fast.
Side room of chat.py; decode.py compiles the same layers.
"""
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cards import divide, n_ranks, spread
from visualchat import ModelConfig, VisualChat, load

PIECE = 1 << 18                 # so many values are widened at a time: as float32 they fit into a core's own cache
LARGE = 1 << 22                 # 16-bit weights of fewer values become float32 for good, since pieces take longer
MANY = 16                       # from so many rows of x on, BF16 is used where the processor multiplies it well


@cache
def multiplies_bf16() -> bool:
    """Whether the processor multiplies BF16 itself, and not by way of FP32."""
    can = torch.cpu.get_capabilities()
    return any(can.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))       # the last one on ARM


class ShortLinear(nn.Module):
    """A linear layer whose weight (out, in) has 16 bits, or 8 with a scale (out) for each output channel."""

    def __init__(self, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale, self.bias = (t if t is None else nn.Parameter(t, requires_grad=False) for t in (scale, bias))

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), scaled before it is used: products with whole numbers up to 127 overflow FP16."""
        return (self.weight if self.scale is None else self.weight * self.scale[:, None]).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """xWᵀ, (…, out), scaled."""
        scale = 1 if self.scale is None else self.scale
        if torch.compiler.is_compiling():
            # For one row (1, in). The compiler makes one loop of this sum, which widens each value on its way; a
            # product of matrices would widen the whole weight first.
            return (self.weight * x.float()).sum(-1)[None] * scale
        if x.device.type != "cpu":
            return x @ self.widened(x.dtype).T
        dtype = torch.bfloat16 if x.shape[:-1].numel() >= MANY and multiplies_bf16() else x.dtype
        n_rows, short = max(1, PIECE // x.shape[-1]), x.to(dtype)
        room = short.new_empty(n_rows, x.shape[-1])             # used again and again, so it stays in the cache
        parts = [short @ room[:len(rows)].copy_(rows).T for rows in self.weight.split(n_rows)]
        return torch.cat(parts, dim=-1).float() * scale

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) to (…, out), in the type of x."""
        out = self.product(x).to(x.dtype)
        return out if self.bias is None else out + self.bias


def in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 and scales (out), float32, whose products come near to weight (out, in)."""
    values, scale = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
    n_rows = max(1, PIECE // weight.shape[1])
    for rows, numbers, largest in zip(weight.split(n_rows), values.split(n_rows), scale.split(n_rows)):
        largest.copy_(rows.float().abs().amax(dim=1).clamp(min=1e-30))
        numbers.copy_((rows.float() * (127 / largest[:, None])).round())
    return values, scale / 127


def shorten(model: VisualChat, int8: bool, dtype: torch.dtype):
    """Leave both towers' linear layers short, or put them into 8 bits, and everything else into `dtype`."""
    towers = [module for tower in (model.llama, model.vit) for module in tower.modules()]
    linear = [(module, name, child) for module in towers for name, child in module.named_children()
              if isinstance(child, nn.Linear) and (int8 or child.weight.dtype.itemsize == 2
                                                   and child.weight.numel() >= LARGE)]
    short = set()               # parameters that stay as they are; scales in float32, too
    for module, name, child in tqdm(linear, "to 8 bits", delay=1, leave=False, disable=None if int8 else True):
        new = ShortLinear(*(in_8_bits(child.weight) if int8 else (child.weight, None)), child.bias)
        setattr(module, name, new)
        short |= {new.weight, new.scale}
    for parameter in model.parameters():
        if parameter not in short:
            parameter.data = parameter.data.to(dtype)
    if int8:                    # as in FP16 training: saves 0.26 GB in 7b; what is looked up becomes `dtype`
        model.llama.embed_tokens.half().register_forward_hook(lambda embedding, ids, found: found.to(dtype))


def free_memory(root: Path = Path("/")) -> float:
    """Bytes that this machine, or its container, can still give; infinite where its files do not say so."""
    machine, container, free = root / "proc/meminfo", root / "sys/fs/cgroup", float("inf")
    if machine.exists():
        lines = dict(line.split(":") for line in machine.read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    if (limit := container / "memory.max").exists() and (most := limit.read_text().strip()) != "max":
        used = int((container / "memory.current").read_text())
        if (kinds := container / "memory.stat").exists():       # what was read from files can be taken back
            used -= int(dict(line.split() for line in kinds.read_text().splitlines()).get("inactive_file", 0))
        free = min(free, int(most) - used)
    return free


def load_short(folder: Path, devices: list[torch.device], int8: bool) -> tuple[VisualChat, ModelConfig]:
    """A training result for chat: on a CPU with short weights, on cards in FP16.

    int8: towers in 8 bits. Raises as `load` and `divide` do, and ValueError where memory is too short.
    """
    on_cpu = devices[0].type == "cpu"
    if n_ranks() > 1:
        model, config = load(folder, None)
        return divide(model, torch.float32 if on_cpu else torch.float16).to(devices[0]), config
    if not (on_cpu or int8 or len(devices) > 1):
        return load(folder, torch.float16, devices[0])
    model, config = load(folder, None)
    bits, values, free = 8 if int8 else 16, sum(p.numel() for p in model.parameters()), free_memory()
    if (on_cpu or int8) and (needed := values * bits // 8) > free:
        less = "" if int8 else f" ({values / 1e9:.1f} in 8, with --int8)"
        raise ValueError(f"{folder} needs {needed / 1e9:.1f} GB for weights in {bits} bits{less}, besides what "
                         f"the conversation takes, and this machine has {free / 1e9:.1f} GB free")
    if on_cpu or int8:
        shorten(model, int8, torch.float32 if on_cpu else torch.float16)
    else:
        model.to(torch.float16)                                 # what has 16 bits stays mapped
    return spread(model, devices), config
