"""Claims about decode.py: both steps give what a forward pass gives; one is compiled, and only twice."""
import shutil
from dataclasses import replace

import pytest
import torch

from conftest import TINY, tiny
from decode import compile_step, shortened, step_of_many, with_short_weights
from llama import Cache
from mmca import IMAGE, TEXT

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


@pytest.mark.parametrize("values, kept", [
    ([1.5, -65504.0], torch.float16), ([1.5, 1e38], torch.bfloat16), ([1.5, 1 / 3], torch.float32)], ids=str)
def test_float32_weights_are_kept_in_16_bits_if_nothing_is_lost(values, kept):
    weight = torch.tensor(values).to(kept).float()
    assert shortened(weight).dtype == kept and torch.equal(shortened(weight).float(), weight)


def test_the_short_model_shares_all_parameters_but_the_short_ones():
    llama = tiny("mmca")                                        # random float32 values: 16 bits cannot hold them
    short = with_short_weights(llama)
    assert all(a is b for a, b in zip(llama.parameters(), short.parameters(), strict=True)) and short is not llama
    llama.layers[1].mlp.up_proj.half().float()                  # now these values fit
    short = with_short_weights(llama)
    assert short.layers[1].mlp.up_proj.weight.dtype == torch.float16
    assert llama.layers[1].mlp.up_proj.weight.dtype == torch.float32
    assert short.layers[0].mlp.up_proj.weight is llama.layers[0].mlp.up_proj.weight


@needs_compiler
@pytest.mark.parametrize("stored, dtype, tolerance", [
    (torch.float32, torch.float32, 1e-5), (torch.float16, torch.float32, 1e-5),
    (torch.bfloat16, torch.bfloat16, 0.03)], ids=str)
def test_compiled_steps_are_forward_passes(stored, dtype, tolerance):
    one_layer = replace(TINY, num_hidden_layers=1)              # which takes half as long to compile as two
    model, ids, answer = tiny("mmca", one_layer).to(stored).to(dtype), torch.arange(6), torch.arange(9)
    step = compile_step(model)
    for kinds in ([TEXT] * 6, [TEXT, TEXT, IMAGE, IMAGE, IMAGE, TEXT]):         # each is compiled for itself
        x, kind = model.embed_tokens(torch.cat((ids, answer)))[None], torch.tensor([kinds + [TEXT] * len(answer)])
        cache = Cache(model, 1, room=int((kind == TEXT).sum()))
        model(x[:, :len(ids)], kind[:, :len(ids)], cache=cache)
        expected = model.lm_head(model(x, kind)[len(ids):])
        found = [step(token, cache) for token in answer[:2].split(1)]
        with torch._dynamo.config.patch(error_on_recompile=True):               # the others use what there is
            found += [step(token, cache) for token in answer[2:8].split(1)]
        found = torch.cat(found + [step(answer[8:], cache)])                    # now the cache is full
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        with pytest.raises(ValueError, match="room for"):
            step(answer[:1], cache)


@needs_compiler
def test_steps_are_compiled_twice_however_long_the_conversation_and_however_many_the_images():
    torch.compiler.reset()                              # it remembers what other tests made vary
    model, graphs = tiny("mmca"), torch._dynamo.utils.counters["stats"]
    step, before = compile_step(model), graphs["unique_graphs"]
    caches = [Cache(model, 1, room=64) for _ in range(2)]
    for n_images in range(6):                           # of 4 tokens: their room grows now and then
        kind = torch.tensor([[IMAGE] * 4 * (n_images > 0) + [TEXT] * 2])
        x = torch.randn(*kind.shape, 48)
        for cache in caches:
            model(x, kind, cache=cache)
        for token in torch.arange(3).split(1):
            expected = model.next_logits(token, caches[1])
            torch.testing.assert_close(step(token, caches[0]), expected, atol=1e-4, rtol=0)
    assert graphs["unique_graphs"] - before == 2

@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_token_for_each_of_many_conversations_equals_each_alone(kv_heads):
    """Conversations of different lengths, without and with images; some have ended and stay as they are."""
    llama, n = tiny("mmca", replace(TINY, num_key_value_heads=kv_heads)), 5
    kinds = [[TEXT] * 3, [TEXT, IMAGE, IMAGE, TEXT], [IMAGE] * 4 + [TEXT], [TEXT] * 9,
             [TEXT, *[IMAGE] * 6, TEXT, TEXT]]
    ended = torch.tensor([False, False, True, False, False])
    together, alone = Cache(llama, n, 20), [Cache(llama, 1, 20) for _ in range(n)]
    random = torch.Generator().manual_seed(0)
    x = [torch.randn(1, len(kind), llama.config.hidden_size, generator=random) for kind in kinds]
    with torch.no_grad():
        llama(torch.cat(x, dim=1), torch.tensor([sum(kinds, [])]), lengths=list(map(len, kinds)), cache=together)
        for one, kind, cache in zip(x, kinds, alone):
            llama(one, torch.tensor([kind]), cache=cache)
    step = step_of_many(llama, ended)
    for token in (torch.tensor([3, 4, 5, 6, 7]), torch.tensor([9, 9, 9, 8, 7])):
        logits, past = step(token, together), list(together.past)
        for i, cache in enumerate(alone):
            if ended[i]:
                assert not logits[i].any() and past[i] == cache.past[0]
            else:
                expected = llama.next_logits(token[i:i + 1], cache)[0]
                torch.testing.assert_close(logits[i], expected, atol=1e-5, rtol=0)
                assert past[i] == cache.past[0]
        ended[0] = True                                         # before the second step another one ends
    together.room = 4
    with pytest.raises(ValueError, match="room for 4"):
        step(token, together)
