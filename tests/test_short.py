"""Claims about short.py: 16 bits lose nothing, 8 bits little, and no weight is ever held twice in 32 bits."""
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import short
from chat import Chat
from conftest import TINY, tiny
from data import Encoded
from decode import compile_step
from llama import Cache, Tokenizer
from mmca import IMAGE, TEXT
from pixels import load_pixels
from short import ShortLinear, in_8_bits, load_short, shorten
from visualchat import ModelConfig, load, towers

ROOT = Path(__file__).parents[1]
SHIPPED, IMAGE_FILE = ROOT / "weights/tiny/chat", ROOT / "examples/a.png"
CPU = [torch.device("cpu")]


def wide_chat() -> Chat:
    """With all weights in 32 bits."""
    return Chat(load(SHIPPED)[0], Tokenizer(towers(ModelConfig())[0]))


@torch.no_grad()
def logits(chat: Chat, encoded: Encoded) -> torch.Tensor:
    """Of all positions of a conversation, without its cache."""
    model, ids, kind = chat.model, torch.tensor([encoded.ids]), torch.tensor([encoded.kind])
    pixels = torch.stack([load_pixels(file, model.vit.config.image_size) for file in encoded.images])
    return model.llama.lm_head(model.llama(model.embed(ids, kind, model.image_tokens(pixels)), kind))


def linear(out: int = 300, width: int = 96, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out, bias)


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(short, "multiplies_bf16", lambda: False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.usefixtures("exact")
def test_a_short_layer_computes_what_a_wide_one_with_the_same_values_does(monkeypatch, dtype, rows):
    monkeypatch.setattr(short, "PIECE", 7 * 96)                 # seven rows at a time, and a rest of six
    wide, x = linear().to(dtype).float(), torch.randn(2, rows, 96)
    layer = ShortLinear(wide.weight.detach().to(dtype), bias=wide.bias)
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(layer(x), wide(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("many", [False, True])
def test_many_rows_are_multiplied_in_bf16_where_that_is_fast_and_few_never(monkeypatch, many):
    monkeypatch.setattr(short, "multiplies_bf16", lambda: True)
    wide, x = linear().half().float(), torch.randn(1, short.MANY if many else short.MANY - 1, 96)
    found = ShortLinear(wide.weight.detach().half(), bias=wide.bias)(x)
    error = ((found - wide(x)).norm() / wide(x).norm()).item()
    assert found.dtype == torch.float32 and (1e-4 < error < 1e-2 if many else error < 1e-6)


def test_8_bits_on_a_card_do_not_overflow_in_fp16():
    weight, x = torch.full((3, 4096), 0.1).half(), torch.ones(1, 4096).half()
    layer = ShortLinear(*in_8_bits(weight))
    torch.testing.assert_close(x @ layer.widened(torch.float16).T, x @ weight.T, atol=0.5, rtol=0)
    assert (x @ layer.weight.T.half()).isinf().all()            # which is why it is scaled before the product


@pytest.mark.usefixtures("exact")
def test_8_bits_are_half_a_step_off_at_most_and_each_output_channel_has_its_own_scale(monkeypatch):
    monkeypatch.setattr(short, "PIECE", 7 * 96)
    weight = linear().weight.detach() * torch.logspace(-6, 3, 300)[:, None]
    weight[17] = 0
    values, scale = in_8_bits(weight.half().float())
    assert values.dtype == torch.int8 and scale.shape == (300,) and not values[17].any()
    step = weight.half().float().abs().amax(1, keepdim=True) / 127
    assert ((values * scale[:, None] - weight.half().float()).abs() <= 0.5001 * step).all()
    others = [row for row in range(300) if row != 17]
    assert (values[others].abs().amax(1) == 127).all()          # the whole range is used
    x = torch.randn(3, 96)
    torch.testing.assert_close(ShortLinear(values, scale)(x), x @ (values * scale[:, None]).T, atol=1e-9,
                               rtol=1e-3)


def test_large_layers_stay_the_mapped_16_bits_of_their_files_and_all_else_becomes_wide(monkeypatch):
    monkeypatch.setattr(short, "LARGE", 128 * 256)              # here the MLPs and lm_head
    model, _ = load(SHIPPED, None)
    before = {name: p.data_ptr() for name, p in model.named_parameters() if p.dtype == torch.float16}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    shorten(model, int8=False, dtype=torch.float32)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float16}
    assert {name.split(".")[-2] for name in kept} >= {"gate_proj", "up_proj", "down_proj"}
    for name, p in model.named_parameters():
        assert (p.data_ptr() == before[name]) if name in kept else p.dtype == torch.float32
    assert trained == {"projection.weight", "projection.bias", "llama.embed_tokens.weight"} and not trained & kept


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("large", [1, 1 << 22], ids=["all layers short", "as it ships"])
def test_chat_in_16_bits_says_what_it_says_in_32(monkeypatch, large):
    monkeypatch.setattr(short, "LARGE", large)
    wide = wide_chat()
    chat = Chat.open(SHIPPED)
    assert any(isinstance(m, ShortLinear) for m in chat.model.modules()) == (large == 1)
    for one in (wide, chat):
        one.max_new_tokens = 12
    assert chat.ask("Describe image 1.", IMAGE_FILE) == wide.ask("Describe image 1.", IMAGE_FILE) != ""
    encoded = wide.encoded()
    found, expected = (logits(one, encoded) for one in (chat, wide))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_8_bits_take_every_linear_module_of_both_towers_and_hardly_change_the_logits():
    chat = Chat.open(SHIPPED, int8=True)
    towers = chat.model.llama, chat.model.vit
    assert not any(isinstance(m, nn.Linear) for tower in towers for m in tower.modules())
    before = load(SHIPPED)[0]
    n_linear = sum(isinstance(m, nn.Linear) for tower in (before.llama, before.vit) for m in tower.modules())
    assert sum(p.dtype == torch.int8 for p in chat.model.parameters()) == n_linear
    assert isinstance(chat.model.projection, nn.Linear) and chat.model.projection.weight.dtype == torch.float32
    wide = wide_chat()
    assert chat.ask("Describe image 1.", IMAGE_FILE) == wide.ask("Describe image 1.", IMAGE_FILE)
    found, expected = (logits(one, wide.encoded()) for one in (chat, wide))
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_8_bits_compile():
    llama = tiny("mmca", replace(TINY, num_hidden_layers=1))
    holder = nn.Module()
    holder.llama, holder.vit = llama, nn.Module()
    shorten(holder, int8=True, dtype=torch.float32)
    caches = [Cache(llama, 1, 8) for _ in range(2)]
    for cache in caches:
        with torch.no_grad():
            llama(llama.embed_tokens(torch.arange(3))[None], torch.full((1, 3), TEXT), cache=cache)
    step = compile_step(llama)
    for token in torch.arange(3).split(1):
        torch.testing.assert_close(step(token, caches[0]), llama.next_logits(token, caches[1]), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("exact")
def test_a_cache_and_a_whole_pass_agree_with_short_layers(monkeypatch):
    monkeypatch.setattr(short, "LARGE", 1)
    llama = tiny("mmca").half()
    holder = nn.Module()
    holder.llama, holder.vit = llama, nn.Module()
    shorten(holder, int8=False, dtype=torch.float32)
    kind = torch.tensor([[TEXT, IMAGE, IMAGE, TEXT, TEXT]])
    x, cache = torch.randn(1, 5, TINY.hidden_size), Cache(llama, 1, 8)
    with torch.no_grad():
        whole = llama(x, kind)
        parts = torch.cat([llama(x[:, :4], kind[:, :4], cache=cache), llama(x[:, 4:], kind[:, 4:], cache=cache)])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_too_little_memory_is_said_with_both_figures_before_anything_is_widened(monkeypatch):
    monkeypatch.setattr(short, "free_memory", lambda: 3e6)
    monkeypatch.setattr(short, "shorten", None)                 # not reached
    with pytest.raises(ValueError, match=r"needs 0.0 GB for weights in 16 bits \(0.0 in 8, with --int8\)"):
        load_short(SHIPPED, CPU, int8=False)
    assert short.free_memory() == 3e6


def test_free_memory_is_that_of_the_machine_or_less_in_a_container(tmp_path):
    assert short.free_memory(tmp_path) == float("inf")
    for name, text in (("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    4000 kB\n"),
                       ("sys/fs/cgroup/memory.max", "max\n"), ("sys/fs/cgroup/memory.current", "1000000\n")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert short.free_memory(tmp_path) == 4000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("3000000\n")
    assert short.free_memory(tmp_path) == 2000000
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text("anon 300000\ninactive_file 500000\nactive_file 200000\n")
    assert short.free_memory(tmp_path) == 2500000               # of files that were read
    assert 0 < short.free_memory() < 1e14                       # of this machine
