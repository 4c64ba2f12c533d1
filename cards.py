"""How does 70b fit into the cards of one machine? By layers: `chat.py --devices N`; by heads: `deepspeed chat.py`.

By layers, consecutive ones lie on consecutive cards:

    ViT, projection, embedding, first layers │ next layers │ … │ last layers     norm, lm_head
                 card 0                      │   card 1    │   │  card N - 1        card 0

One card computes at a time, then hands its (L, C) on to the next one; keys and values lie beside their layer, as
Cache in llama.py makes them. By heads, each card has a process of its own, a rank, and of every layer so many
heads of attention and channels of the MLP. All compute at the same time and add up what they found, twice in each
layer: DeepSpeed's tensor parallelism. All ranks hold the same conversation; rank 0 alone reads and prints lines.
"""
import atexit
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor, nn

from llama import Llama
from visualchat import VisualChat


# ---- by layers ----

def cards(count: int | None) -> list[torch.device]:
    """The first `count` cards of this machine; for None one, or the CPU where there is none.

    Raises ValueError where it has fewer. (CUDA_VISIBLE_DEVICES chooses which ones there are.)
    """
    here = torch.accelerator.current_accelerator(check_available=True)
    if count is None:
        return [here or torch.device("cpu")]
    there = torch.accelerator.device_count() if here else 0
    if not 1 <= count <= there:
        raise ValueError(f"--devices {count}: expected 1 or more, and this machine has {there} cards that PyTorch "
                         "can use")
    return [torch.device(here.type, i) for i in range(count)]


def is_usual(llama: Llama) -> bool:
    """Whether this Llama runs its layers and nothing else, which this file and decode.py build on."""
    return type(llama).through_layers is Llama.through_layers


def shares(sizes: list[int], first: int, n: int) -> list[int]:
    """Which of n cards each layer goes to, in order, so that all cards hold about as much.

    sizes: bytes of the layers; first: bytes that the first card holds besides. If that is more than its share, the
    layers go to the others.
    """
    mean = (sum(sizes) + first) / n
    if n > 1 and first >= mean:
        return [1 + card for card in shares(sizes, 0, n - 1)]
    # By the middle of the layer; the last card takes what rounding leaves.
    return [min(int((held + size / 2) / mean), n - 1)
            for size, held in zip(sizes, accumulate(sizes, initial=first))]


def on_its_card(layer: nn.Module, given: tuple) -> tuple:
    """What a layer is given, on the card of its weights: a hook that PyTorch calls before the layer."""
    x, shared, number, *rows = given
    device = layer.input_layernorm.weight.device
    rows = [one if one is None else one.to(device) for one in rows]
    return x.to(device), replace(shared, rope=shared.rope.to(device)), number, *rows


def spread(model: VisualChat, devices: list[torch.device]) -> VisualChat:
    """The model on these devices: all hold about as much; what is no layer is on the first one.

    Raises ValueError for several devices and a Llama with other things between its layers.
    """
    llama = model.llama
    if len(devices) > 1 and not is_usual(llama):
        raise ValueError("--devices knows LLaMA's own layers alone, and here are more: leave it out")
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in llama.layers]
    rest = sum(p.nbytes for p in model.parameters()) - sum(sizes)
    placed = shares(sizes, rest, len(devices))
    for layer, card in zip(llama.layers, placed):
        layer.to(devices[card])
        if len(devices) > 1:
            layer.register_forward_pre_hook(on_its_card)
    for part in (*llama.children(), model.vit, *model.fresh):
        if part is not llama.layers:
            part.to(devices[0])
    if len(devices) > 1:
        llama.norm.register_forward_pre_hook(lambda norm, given: (given[0].to(norm.weight.device),))
    return model


# ---- by heads ----

def n_ranks() -> int:
    """How many processes share one model: as many as `deepspeed` or torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_follower() -> bool:
    """Whether this process is a rank other than 0."""
    return n_ranks() > 1 and int(os.environ.get("RANK", 0)) > 0


@cache
def waiting_ranks():
    """The ranks as a group in which nobody minds waiting for a person."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))


def of_rank_0(ask: Callable[[], str]) -> str:
    """What ask() returns, or raises, on rank 0; the others do not call it."""
    if n_ranks() == 1:
        return ask()
    found = [None]
    if not is_follower():
        try:
            found = [ask()]
        except (EOFError, KeyboardInterrupt) as error:
            found = [error]
    torch.distributed.broadcast_object_list(found, group=waiting_ranks())
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def divide(model: VisualChat, dtype: torch.dtype) -> VisualChat:
    """The model in `dtype` with this rank's share of each layer of LLaMA, and with all of everything else.

    Raises ValueError where the ranks cannot share the heads, and for a Llama with other things between its layers.
    """
    llama, n = model.to(dtype).llama, n_ranks()
    if not is_usual(llama):
        raise ValueError("several ranks share LLaMA's own layers alone, and here are more: start one process")
    if (heads := llama.config.num_key_value_heads) % n:
        raise ValueError(f"{n} ranks cannot share {heads} heads of keys and values: take a divisor of {heads}")
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer     # here, since chat.py needs no
    from deepspeed.module_inject.tp_shard import AutoTPMeta                     # deepspeed otherwise

    from zero import dist, start
    start()
    torch.manual_seed(int(of_rank_0(lambda: str(torch.initial_seed()))))      # all draw the same tokens
    ranks, meta = dist.new_group(list(range(n))), AutoTPMeta(num_kv_heads=heads)        # whole heads to each rank
    for part in (part for layer in llama.layers for part in (layer.self_attn, layer.mlp)):
        for name, linear in list(part.named_children()):        # ranks add up what o_proj and down_proj give
            share = LinearAllreduce if name in ("o_proj", "down_proj") else LinearLayer
            setattr(part, name, share(linear, ranks, name=name, tp_meta=meta))
    llama.config = replace(llama.config, num_key_value_heads=heads // n)        # what a Cache has room for

    def as_rank_0(head: nn.Module, given: tuple, logits: Tensor) -> Tensor:
        """The same logits on all ranks to the bit, so that all choose the same token and end together."""
        dist.broadcast(logits, 0)
        return logits

    llama.lm_head.register_forward_hook(as_rank_0)
    return model


def silence_followers():
    """Rank 0 prints; the others say nothing, not even an error, which rank 0 has as well.

    A lack of memory can be one rank's alone: chat.py prints it nevertheless.
    """
    if is_follower():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        atexit.register(time.sleep, 1)      # The launcher ends all where one ends badly: rank 0 must have spoken.
