"""How does 70b fit into the cards of one machine? Consecutive layers of LLaMA lie on consecutive cards.

    ViT, projection, embedding, first layers │ next layers │ … │ last layers     norm, lm_head
                 card 0                      │   card 1    │   │  card N - 1        card 0

One card computes at a time, then hands its (L, C) on to the next one; keys and values lie beside their layer, as
Cache in llama.py makes them. Side room of chat.py (--devices).
"""
from dataclasses import replace

import torch
from torch import nn

from llama import Llama
from visualchat import VisualChat


def cards(count: int | None) -> list[torch.device]:
    """The first `count` cards of this machine; for None one, or the CPU where there is none.

    Raises ValueError where it has fewer. (CUDA_VISIBLE_DEVICES chooses which ones there are.)
    """
    kind = torch.accelerator.current_accelerator(check_available=True)
    if count is None:
        return [kind or torch.device("cpu")]
    there = torch.accelerator.device_count() if kind else 0
    if not 1 <= count <= there:
        raise ValueError(f"--devices {count}: expected 1 or more, and this machine has {there} cards that PyTorch "
                         "can use")
    return [torch.device(kind.type, i) for i in range(count)]


def is_usual(llama: Llama) -> bool:
    """Whether x passes through LLaMA's layers and nothing else, as this file and decode.py have it."""
    return type(llama).through_layers is Llama.through_layers


def shares(sizes: list[int], first: int, n: int) -> list[int]:
    """Which of n cards each layer goes to, in order, so that all cards hold about as much.

    sizes: bytes of the layers; first: bytes that the first card holds besides. If that is more than its share, the
    layers go to the others.
    """
    mean, held, found = (sum(sizes) + first) / n, first, []
    if n > 1 and first >= mean:
        return [1 + card for card in shares(sizes, 0, n - 1)]
    for size in sizes:
        # By the middle of the layer; the last card takes what rounding leaves.
        found.append(max(min(int((held + size / 2) / mean), n - 1), found[-1] if found else 0))
        held += size
    return found


def on_its_card(layer: nn.Module, given: tuple) -> tuple:
    """What a layer is given, on the card of its weights: a hook that PyTorch calls before the layer."""
    x, shared, number, *rows = given
    device = layer.input_layernorm.weight.device
    rows = [one if one is None else one.to(device) for one in rows]
    return x.to(device), replace(shared, rope=shared.rope.to(device)), number, *rows


def spread(model: VisualChat, devices: list[torch.device]) -> VisualChat:
    """The model on these devices: LLaMA's layers in equal shares on all, everything else on the first one.

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
