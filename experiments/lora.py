"""Would the towers learn more if they were not quite frozen? LoRA (arXiv 2106.09685) on LLaMA or on the ViT.

    python -m experiments.run lora                      rank 8 on q_proj and v_proj of LLaMA; lora_vit: of the ViT
    python -m experiments.run lora:16:q_proj,k_proj     another rank, and other layers

To a frozen matrix W (out, in) it adds the product of two narrow ones, which train: y = W x + (ALPHA / rank) B A x.
A (rank, in) is random, B (out, rank) zero at first, so at first nothing changes. Afterwards the product is added
into W. The paper found that LoRA brings nothing (section 4.3). Before: outside.py.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.outside import Experiment
from visualchat import Variant, VisualChat

ALPHA = 16              # chosen here, as the rank and TARGETS
TARGETS = {"llama": ("q_proj", "v_proj"), "vit": ("in_proj", "c_fc")}       # in_proj makes q, k and v


class Pair(nn.Module):
    """The two matrices that are added to a weight (out, in): a (rank, in) and b (out, rank)."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.scale = ALPHA / rank
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_empty(weight.shape[0], rank))
        self.reset_parameters()

    def reset_parameters(self):
        """First values: a gives numbers as large as its input's, b makes the product zero."""
        nn.init.normal_(self.a, std=self.a.shape[1] ** -0.5)
        nn.init.zeros_(self.b)


class LoraLinear(nn.Linear):
    """A linear layer with a Pair. A layer of a tower becomes one in place, so its weight keeps its name."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return super().forward(x) + self.lora.scale * F.linear(F.linear(x, self.lora.a), self.lora.b)


def add_pairs(model: VisualChat, rank: int, targets: tuple[str, ...], tower: str):
    """Give a Pair to each linear layer of a tower that is called so; raises ValueError where there is none."""
    linears = [(name.rpartition(".")[2], module) for name, module in getattr(model, tower).named_modules()
               if type(module) is nn.Linear]                # lm_head, a subclass, stays as it is
    known = {name for name, _ in linears}
    if absent := [target for target in targets if target not in known]:
        raise ValueError(f"LoRA: no linear layer of {tower} is called {', '.join(map(repr, absent))}; there are "
                         f"{', '.join(sorted(known))}")
    for linear in [linear for name, linear in linears if name in targets]:
        linear.__class__ = LoraLinear
        linear.lora = Pair(linear.weight, rank)
        model.fresh.append(linear.lora)
    if tower == "vit":      # With ZeRO-3 DeepSpeed sums a block's gradients up only where its input has one, too.
        model.vit.hook = model.vit.register_forward_pre_hook(lambda vit, images: images[0].requires_grad_())


@torch.no_grad()
def merge(model: VisualChat):
    """Add each Pair's product into its layer's weight, in a new tensor, and make it a plain linear layer again."""
    for linear in [module for module in model.modules() if isinstance(module, LoraLinear)]:
        change = linear.lora.scale * linear.lora.b.float() @ linear.lora.a.float()              # (out, in)
        linear.weight = nn.Parameter((linear.weight.float() + change).to(linear.weight.dtype), requires_grad=False)
        linear.__class__ = nn.Linear
        del linear.lora
    model.fresh = [module for module in model.fresh if not isinstance(module, Pair)]
    if hasattr(model.vit, "hook"):
        model.vit.hook.remove()
        del model.vit.hook


def lora(tower: str, text: str = "8") -> Experiment:
    """LoRA on a tower; text: its rank, or rank and layers, as in 16:q_proj; raises ValueError for other texts."""
    rank, colon, names = text.partition(":")
    targets = tuple(names.split(",")) if colon else TARGETS[tower]
    if not rank.isdecimal() or int(rank) < 1 or len({*targets}) < len(targets):
        raise ValueError(f"LoRA from {text!r:.80}: expected a rank of 1 or more and names of layers, once each, "
                         f"such as 16:{','.join(TARGETS[tower])}")
    change = partial(add_pairs, rank=int(rank), targets=targets, tower=tower)
    return Experiment(f"LoRA of rank {rank} on {', '.join(targets)} of {tower}", "4.3", Variant(change, merge),
                      # Kept features would be those of the ViT without LoRA.
                      options=("--cache-features", "") if tower == "vit" else ())


FACTORIES = {"lora": partial(lora, "llama"), "lora_vit": partial(lora, "vit")}
EXPERIMENTS = {name: factory() for name, factory in FACTORIES.items()}
