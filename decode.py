"""How fast can one token be? The forward pass of llama.py for one more text token, in two forms.

Both go through the same layers as everything else. `step_of_many` takes one token for each of many conversations:
keys and values are padded, so that all of them are one product. `compile_step` is for a single conversation and
for torch.compile. Three things are done for the compiler. The pass is a function of tensors alone, so that a
growing conversation needs no new compilation. Attention is written with sums, which the compiler fuses. And
float32 weights whose values fit into 16 bits, as those of LLaMA-2's files do, are read as 16 bits, half the bytes.
Optional: `python chat.py --compile`. Side room of llama.py.
"""
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cards import is_usual
from llama import Cache, Llama, Pass
from mmca import TEXT, separate
from short import ShortLinear

ONE_TEXT_TOKEN = torch.tensor([[TEXT]])     # its `kind` (1, 1)


# ---- many conversations ----

def attend_padded(q: Tensor, kv: Tensor, counts: Tensor) -> Tensor:
    """Queries q (B, H, D) attend to the first counts (B) of their keys and values kv (B, 2, H_kv, S, D).

    Returns (B, H, D), zeros where there is no key. What lies behind must be numbers, too: 0 · NaN is NaN.
    """
    mask = torch.arange(kv.shape[3], device=q.device) < counts[:, None]                         # (B, S)
    out = F.scaled_dot_product_attention(q[:, :, None], *kv.unbind(1), attn_mask=mask[:, None, None],
                                         enable_gqa=q.shape[1] != kv.shape[2])[:, :, 0]
    return out.where((counts > 0)[:, None, None], 0)


def plain_step_of_many(llama: Llama, ended: Tensor) -> Callable[[Tensor, Cache], Tensor]:
    """`step_of_many` for any Llama, through its own `through_layers`."""
    @torch.no_grad()
    def step(token: Tensor, cache: Cache) -> Tensor:
        """`Llama.next_logits` for those that have not ended."""
        rows = (~ended).nonzero()[:, 0].to(token.device)
        x, kind = llama.embed_tokens(token[rows])[None], torch.full((1, len(rows)), TEXT)    # (1, b, C), b ≤ B
        some = llama.lm_head(llama(x, kind, lengths=(~ended).int().tolist(), cache=cache))
        return some.new_zeros(len(token), some.shape[1]).index_copy(0, rows, some)

    return step


def step_of_many(llama: Llama, ended: Tensor) -> Callable[[Tensor, Cache], Tensor]:
    """`Llama.next_logits` for many conversations; raises as it does.

    ended (B) bool on the CPU, which the caller may change between steps: those conversations cost nothing, their
    cache stays as it is, and their logits are zeros.
    """
    if not is_usual(llama):
        return plain_step_of_many(llama, ended)

    @torch.no_grad()
    def step(token: Tensor, cache: Cache) -> Tensor:
        """`Llama.next_logits` for those that have not ended."""
        alive = (~ended).nonzero()[:, 0].tolist()                                               # b, at most B
        kind, rows = torch.full((1, len(alive)), TEXT), torch.tensor(alive, device=token.device)
        layout = separate(kind, [1] * len(alive), [cache.past[row] for row in alive])
        cache.begin(layout)
        n_text, n_image = torch.tensor(cache.counts, device=token.device).T                     # (b) each
        text, image = map(max, zip(*cache.counts))

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.text[number][rows, :, :, n_text - 1] = torch.stack((k, v), dim=1)
            out = attend_padded(q, cache.text[number][rows, :, :, :text], n_text)               # the first softmax
            if image:
                out = out + attend_padded(q, cache.image[number][rows, :, :, :image], n_image)      # the second
            return out

        x, shared = llama.embed_tokens(token[rows]), Pass(len(rows), cache.rope[:, layout.position], attend)
        for number, layer in enumerate(llama.layers):
            x = layer(x, shared, number)
        cache.past = list(cache.past)
        for row, segment in zip(alive, layout.segments):
            cache.past[row] = segment.kind
        logits = llama.lm_head(llama.norm(x))
        return logits.new_zeros(len(token), logits.shape[1]).index_copy(0, rows, logits)

    return step


# ---- one conversation, compiled ----

def shortened(weight: Tensor) -> Tensor:
    """A float32 weight in 16 bits if they hold all its values, as in the official files; else as it is."""
    if weight.dtype == torch.float32:
        for short in (weight.to(torch.float16), weight.to(torch.bfloat16)):
            if torch.equal(short.float(), weight):
                return short
    return weight


def with_short_weights(llama: Llama) -> Llama:
    """The same modules around the same parameters, but with ShortLinear where 16 bits hold a weight's values."""
    llama = copy.deepcopy(llama, {id(p): p for p in llama.parameters()})        # parameters are not copied
    for module in list(llama.modules()):
        for name, child in module.named_children():
            weight = shortened(child.weight.detach()) if isinstance(child, nn.Linear) else None
            if weight is not None and weight.dtype != torch.float32:
                setattr(module, name, ShortLinear(weight))
    return llama


def attend_with_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """mmca.py's `attend` for the query q (H, D) of one token: k and v (H_kv, S, D) to (H, D)."""
    q = q.unflatten(0, (len(k), -1, 1)).float() * q.shape[-1] ** -0.5              # (H_kv, H/H_kv, 1, D), float32
    weights = (k[:, None] * q).sum(-1).softmax(-1)                                 # (H_kv, H/H_kv, S)
    return (weights[..., None] * v[:, None]).sum(-2).flatten(0, 1).to(v.dtype)


def one_token(llama: Llama, token: Tensor, rope: Tensor, texts: list[Tensor], at: Tensor,
              images: list[Tensor]) -> Tensor:
    """Logits (1, vocabulary) of what follows one more text token (1) of one conversation.

    rope (2, 1, 1, D) is the token's rotation. texts has for each layer a cache's room for text (2, H_kv, room, D).
    at (S) is 0, 1, … S - 1: the columns of it that are in use, the last one for this token. images has for each
    layer the keys and values of image tokens (2, H_kv, tokens, D), or nothing where there is no image.
    """
    def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # All three are put into one tensor: else the compiler would rotate q again for every key that it meets.
        q, k, v = torch.cat((q[0], k[0], v[0])).split((q.shape[1], k.shape[1], v.shape[1]))
        texts[number].index_copy_(2, at[-1:], torch.stack((k, v))[:, :, None])
        out = attend_with_sums(q, *texts[number][:, :, :len(at)])                  # the softmax over text
        if images:
            out = out + attend_with_sums(q, *images[number])                       # the softmax over image tokens
        return out[None]

    x, shared = llama.embed_tokens(token), Pass(1, rope, attend)
    for number, layer in enumerate(llama.layers):
        x = layer(x, shared, number)
    return llama.lm_head(llama.norm(x))


def compile_step(llama: Llama) -> Callable[[Tensor, Cache], Tensor]:
    """A compiled `Llama.next_logits` for caches of one conversation; from then on the weights must not change.

    The compiler runs at the first token without an image before it and at the first one with some. It needs a C++
    compiler on a CPU. Of float32 weights a second, short copy is kept, so they take half as much memory again.
    Raises ValueError for a Llama with other things between its layers.
    """
    if not is_usual(llama):
        raise ValueError("--compile knows LLaMA's own layers alone, and here are more: leave it out")
    short = with_short_weights(llama)
    compiled = torch.compile(one_token, isolate_recompiles=True, options={
        "cpp_wrapper": llama.norm.weight.device.type == "cpu",      # C++ between the operations, not Python
        # The weights do not change, so it is not checked at every step that they have not; in return
        # isolate_recompiles keeps the code that is made for one model away from other models.
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe})
    numbers = torch.arange(llama.config.max_position_embeddings, device=llama.norm.weight.device)
    known = set()

    @torch.no_grad()
    def step(token: Tensor, cache: Cache) -> Tensor:
        """`Llama.next_logits` for one conversation, compiled."""
        layout = separate(ONE_TEXT_TOKEN, past=cache.past)
        cache.begin(layout)
        (n_text, n_image), kind = cache.counts[0], layout.segments[0].kind
        texts, at = [conversations[0] for conversations in cache.text], numbers[:n_text]
        images = [conversations[0][:, :, :n_image] for conversations in cache.image] if n_image else []
        if bool(images) not in known:       # Say which sizes grow, or the code would be made for this size alone.
            known.add(bool(images))
            for tensor, dim in [(at, 0), *((image, 2) for image in images)]:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        logits = compiled(short, token, cache.rope[:, len(kind) - 1:len(kind)], texts, at, images)
        cache.past = [kind]
        return logits

    return step
