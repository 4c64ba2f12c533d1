"""Claims about mmca.py: golden outputs, a float64 loop, leaks, padding, the cache, half precision, Figure 4."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file

from conftest import causal, compact, written
from llama import Llama, LlamaConfig
from mmca import IMAGE, PAD, TEXT, draw_panels, masked_softmax, mmca, panels, separate

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
MIXED = [PAD, TEXT, IMAGE, IMAGE, TEXT, PAD, TEXT, IMAGE, TEXT, PAD]


every = pytest.mark.parametrize("attention", [mmca, compact, written, causal])
forms = pytest.mark.parametrize("attention", [mmca, compact, written])
layouts = st.lists(st.sampled_from([PAD, TEXT, IMAGE]), min_size=1, max_size=14)
heads = st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)])


def inputs(kinds, h=4, h_kv=2, d=8, seed=0):
    """q (1, h, S, d), k and v (1, h_kv, S, d), kind (1, S)."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, len(kinds), d, generator=random) for n in (h, h_kv, h_kv))
    return q, k, v, torch.tensor([kinds])


def naive(q, k, v, kind, together):
    """Both attentions, token by token in float64; `together`: one softmax over everything seen."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            for i in range(q.shape[2]):
                past = range(i + 1)
                texts = [j for j in past if kind[b, j] == TEXT]
                images = [j for j in past if kind[b, j] == IMAGE]
                if kind[b, i] == PAD:
                    groups = []
                elif together:
                    groups = [sorted(texts + images)]
                else:
                    groups = [texts, images] if kind[b, i] == TEXT else [[i]]
                for group in filter(None, groups):
                    weights = torch.stack([(q[b, h, i] @ k[b, g, j] / q.shape[3] ** 0.5).exp() for j in group])
                    for weight, j in zip(weights / weights.sum(), group):
                        out[b, h, i] += weight * v[b, g, j]
    return out


@forms
def test_golden_outputs(attention):
    g = load_file(GOLDEN / "mmca_open.safetensors")
    rows = g["valid"] == 1
    out = attention(g["q"], g["k"], g["v"], g["kind"])
    torch.testing.assert_close(out.transpose(1, 2)[rows], g["out"].transpose(1, 2)[rows], atol=1e-5, rtol=0)


@every
@settings(deadline=None, max_examples=60)
@given(kinds=layouts, heads=heads, seed=st.integers(0, 99))
def test_equals_a_naive_loop(attention, kinds, heads, seed):
    args = inputs(kinds, *heads, seed=seed)
    expected = naive(*args, together=attention is causal)
    torch.testing.assert_close(attention(*args).double(), expected, atol=1e-5, rtol=1e-5)


def equal_in_values_and_gradients(kind, heads, past, seed):
    """Both flat forms against mmca for kind (B, S): 1e-5 in values, 1e-4 in every gradient."""
    random, (h, h_kv) = torch.Generator().manual_seed(seed), heads
    b, s = kind.shape
    qkv = [torch.randn(b, n, length, 8, generator=random) for n, length in ((h, s - past), (h_kv, s), (h_kv, s))]
    found = []
    for attention in (mmca, compact, written):
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = attention(*leaves, kind, past)
        out.square().sum().backward()
        found.append((out, [x.grad for x in leaves]))
    for values, gradients in found[1:]:
        torch.testing.assert_close(values, found[0][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(gradients, found[0][1], atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=200)
@given(rows=st.integers(1, 40).flatmap(lambda n: st.lists(
    st.lists(st.sampled_from([PAD, TEXT, IMAGE]), min_size=n, max_size=n), min_size=1, max_size=3)),
    heads=heads, seed=st.integers(0, 99), data=st.data())
def test_the_flat_forms_equal_the_formula_in_values_and_gradients(rows, heads, seed, data):
    kind = torch.tensor(rows)
    equal_in_values_and_gradients(kind, heads, data.draw(st.integers(0, kind.shape[1] - 1)), seed)


@pytest.mark.parametrize("kinds", [
    [IMAGE] * 4 + [TEXT] * 5, [TEXT] * 5 + [IMAGE] * 4, [TEXT, IMAGE, IMAGE, IMAGE, IMAGE, TEXT, TEXT],
    [TEXT, IMAGE, TEXT, IMAGE, TEXT], [TEXT] * 6, [IMAGE] * 6, [PAD, PAD, TEXT, IMAGE, TEXT],
    [TEXT, IMAGE, TEXT, PAD, PAD], [TEXT, PAD, IMAGE, PAD, TEXT, TEXT]],
    ids=["images first", "last", "adjacent", "apart", "none", "alone", "padding left", "right", "between"])
def test_the_forms_are_equal_for_a_cache_split_at_every_position(kinds):
    for past in range(len(kinds)):
        equal_in_values_and_gradients(torch.tensor([kinds]), (4, 2), past, seed=past)


def test_the_layout_of_conversations_in_one_row_is_that_of_each_alone():
    kinds = [[TEXT, IMAGE, IMAGE, TEXT, TEXT], [TEXT] * 3, [TEXT, IMAGE, TEXT, IMAGE, IMAGE, TEXT]]
    packed = separate(torch.tensor([sum(kinds, [])]), [len(kind) for kind in kinds])
    alone = [separate(torch.tensor([kind])) for kind in kinds]
    assert packed.segments == [one.segments[0] for one in alone]
    position = torch.empty(14, dtype=torch.long).scatter(0, packed.index, packed.position)
    assert position.tolist() == [position for kind in kinds for position in range(len(kind))]
    assert packed.segments[2].runs == [(1, 0), (1, 1), (1, 3)] and packed.n_text == 9


@every
@pytest.mark.parametrize("new", [TEXT, IMAGE, PAD])
def test_future_tokens_do_not_leak(attention, new):
    for t in range(1, len(MIXED)):
        q, k, v, kind = inputs(MIXED)
        before = attention(q, k, v, kind)
        for x in (q, k, v):
            x[:, :, t] = 50 * torch.randn_like(x[:, :, t])
        kind[:, t] = new
        # 1e-6: with fewer text tokens after t, torch's kernel cuts its blocks elsewhere and rounds differently
        torch.testing.assert_close(attention(q, k, v, kind)[:, :, :t], before[:, :, :t], atol=1e-6, rtol=0)


def test_text_before_any_image_is_causal():
    q, k, v, kind = inputs([TEXT] * 5 + [IMAGE] * 3 + [TEXT] * 2)
    alone = causal(q[:, :, :5], k[:, :, :5], v[:, :, :5], kind[:, :5])
    torch.testing.assert_close(mmca(q, k, v, kind)[:, :, :5], alone, atol=1e-6, rtol=0)


@forms
def test_an_image_token_returns_its_own_value(attention):
    q, k, v, kind = inputs(MIXED)
    image = kind[0] == IMAGE
    own = v.repeat_interleave(2, dim=1)[:, :, image]
    assert torch.equal(attention(q * 20, k * 20, v, kind)[:, :, image], own)


@every
def test_causal_on_text_is_torch_attention(attention):
    q, k, v, kind = inputs([TEXT] * 12)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, kind), expected, atol=1e-6, rtol=1e-5)


@every
@settings(deadline=None, max_examples=40)
@given(kinds=layouts, seed=st.integers(0, 99))
def test_padding_gives_zeros_and_changes_nothing(attention, kinds, seed):
    q, k, v, kind = inputs(kinds, seed=seed)
    real = kind[0] != PAD
    out = attention(q, k, v, kind)
    assert not out[:, :, ~real].any()
    alone = attention(q[:, :, real], k[:, :, real], v[:, :, real], kind[:, real])
    torch.testing.assert_close(out[:, :, real], alone, atol=1e-6, rtol=1e-5)


@every
def test_a_cache_split_anywhere_gives_the_tail(attention):
    q, k, v, kind = inputs(MIXED)
    full = attention(q, k, v, kind)
    for past in range(len(MIXED)):
        tail = attention(q[:, :, past:], k, v, kind, past)
        torch.testing.assert_close(tail, full[:, :, past:], atol=1e-6, rtol=1e-5)


@every
@pytest.mark.parametrize("kinds", [MIXED, [PAD] * 4, [IMAGE] * 4, [PAD, TEXT, PAD, IMAGE]], ids=str)
def test_gradients_are_finite(attention, kinds):
    *qkv, kind = inputs(kinds)
    for x in qkv:
        x.requires_grad_()
    attention(*qkv, kind).square().sum().backward()
    assert all(x.grad.isfinite().all() for x in qkv)


def test_no_allowed_key_gives_zeros():
    scores, allowed = torch.randn(3, 4, requires_grad=True), torch.zeros(3, 4, dtype=torch.bool)
    allowed[1, 2] = True
    weights = masked_softmax(scores, allowed)
    assert torch.equal(weights, allowed.float())
    weights.sum().backward()
    assert scores.grad.isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_survives_large_values(attention, dtype):
    *qkv, kind = inputs(MIXED, d=128)
    q, k, v = (x.to(dtype) for x in qkv)
    q, k = q.sign() * 100, q.sign()[:, ::2] * 100 + k       # a query's own score, 113,000, is above float16
    out = attention(q, k, v, kind)
    assert out.dtype == dtype and out.isfinite().all()
    expected = attention(q.float(), k.float(), v.float(), kind)
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)


def test_image_hidden_states_depend_on_no_context_and_no_position():
    # one length for all: another length is another matrix product, which may round differently
    torch.manual_seed(0)
    model = Llama(LlamaConfig(64, 160, 3, 4, 2, vocab_size=10)).eval()
    image, states = torch.randn(4, 64), []
    for start in range(0, 21):
        # as many text as image tokens in all, for the reason above
        x, kind = torch.randn(1, 24, 64), torch.tensor([TEXT, IMAGE] * 10)[torch.randperm(20)]
        kind = torch.cat((kind[:start], torch.full((4,), IMAGE), kind[start:]))[None]
        x[0, start:start + 4] = image
        with torch.no_grad():
            states.append(model(x, kind)[start:start + 4])
    assert all(torch.equal(state, states[0]) for state in states)


# ---- Figure 4 ----

PANELS = {
    "causal attention": [[int(key <= query) for key in range(10)] for query in range(10)],
    "causal and cross attention": [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 2, 2, 2, 1, 0, 0, 0, 0],
        [1, 1, 2, 2, 2, 1, 1, 0, 0, 0],
        [1, 1, 2, 2, 2, 1, 1, 1, 0, 0],
        [1, 1, 2, 2, 2, 1, 1, 1, 1, 0],
        [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]],
    "multi-modal causal attention": [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
        [1, 1, 2, 2, 2, 1, 0, 0, 0, 0],
        [1, 1, 2, 2, 2, 1, 1, 0, 0, 0],
        [1, 1, 2, 2, 2, 1, 1, 1, 0, 0],
        [1, 1, 2, 2, 2, 1, 1, 1, 1, 0],
        [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]]}


def test_figure_4_is_the_paper_s():
    assert {title: m.tolist() for title, m in panels().items()} == PANELS


def run(*args):
    command = [sys.executable, ROOT / "mmca.py", *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_command_prints_three_panels_in_plain_digits_into_a_pipe_and_that_both_forms_agree():
    out = run()
    assert "\033" not in out
    blocks = out.split("\n\n")
    found = {title: [[int(digit) for digit in line.split()[-10:]] for line in lines]
             for title, *lines in (block.splitlines() for block in blocks[:3])}
    assert found == PANELS
    assert float(out.splitlines()[-1].rstrip(".").split()[-1]) < 1e-5


def test_the_command_draws_an_image(tmp_path):
    run(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert {(0x4C, 0x72, 0xB0), (0xDD, 0x84, 0x52)} <= colours


def test_an_unknown_image_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="extension"):
        draw_panels(str(tmp_path / "x.nonsense"))
