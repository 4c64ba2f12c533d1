"""Claims about cards.py: every tensor meets its layer on its own card, and the answers are those of one device.

There are no cards here. Both "cards" are the CPU where values matter; one is PyTorch's meta device, whose tensors
cannot be mixed with others, where it matters that all of them were moved. Ranks are processes on the CPU.
"""
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from cards import cards, divide, on_its_card, shares, spread
from chat import Chat
from llama import Llama, Pass, Tokenizer
from page import looks_of
from terminal import converse, read_options
from training import ROOT
from visualchat import ModelConfig, load, towers

SHIPPED, IMAGES = ROOT / "weights/tiny/chat", [ROOT / "examples/a.png", ROOT / "examples/b.png"]
CPU, META = torch.device("cpu"), torch.device("meta")


def chat_on(devices: list[torch.device]) -> Chat:
    model = spread(load(SHIPPED)[0], devices)
    chat = Chat(model, Tokenizer(towers(ModelConfig())[0]))
    chat.max_new_tokens = 8
    return chat


def talk(chat: Chat) -> list[str]:
    """New images, no image, one that was shown before."""
    return [chat.ask("Describe image 1.", *IMAGES), chat.ask("What color is it?"), chat.ask("And now?", IMAGES[0])]


def test_layers_on_several_devices_answer_as_on_one():
    assert talk(chat_on([CPU, CPU, CPU])) == talk(chat_on([CPU]))


@pytest.fixture
def values_from_nowhere(monkeypatch):
    """Lets tensors leave the meta device, with random values, as they would leave a card with true ones."""
    move = Tensor.to

    def to(self, *where, **how):
        if self.is_meta and torch.device("cpu") in where:
            return torch.randn(self.shape).to(self.dtype)
        return move(self, *where, **how)
    monkeypatch.setattr(Tensor, "to", to)


def test_everything_that_a_layer_needs_is_on_its_card(values_from_nowhere):
    torch.manual_seed(0)
    chat = chat_on([CPU, META])
    layers = chat.model.llama.layers
    where = [layer.mlp.up_proj.weight.device.type for layer in layers]
    assert where == sorted(where) and set(where) == {"cpu", "meta"}
    assert all(p.device == CPU for name, p in chat.model.named_parameters() if ".layers." not in name)
    seen = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda mlp, given, out: seen.append(out.device.type))
    assert len(talk(chat)) == 3
    assert seen[:len(layers)] == where
    assert [kv.device.type for kv in chat.cache.text] == [kv.device.type for kv in chat.cache.image] == where
    looks = looks_of(chat.model, chat.encoded())
    assert looks.tokens.device == CPU and len(looks.tokens) == len(layers)


@given(some.lists(some.integers(1, 1000), min_size=1, max_size=90), some.integers(0, 3000), some.integers(1, 8))
def test_shares_are_in_order_and_no_card_holds_much_more_than_others(sizes, first, n):
    found = shares(sizes, first, n)
    assert found == sorted(found) and len(found) == len(sizes) and 0 <= found[0] and found[-1] < n
    held = [first] + [0] * (n - 1)
    for card, size in zip(found, sizes):
        held[card] += size
    others = (sum(sizes) + first) / n if first * n < sum(sizes) + first or n == 1 else sum(sizes) / (n - 1)
    assert max(held[1:], default=0) <= others + max(sizes) and held[0] <= max(first, others + max(sizes))
    assert len(sizes) < 3 * n or max(sizes) > min(sizes) * 2 or all(held)          # no card is idle


def test_70b_on_four_cards_is_shared_evenly():
    held = [4.6e9, 0, 0, 0]            # the ViT, the embedding and lm_head on the first one
    for card in shares([int(1.71e9)] * 80, int(4.6e9), 4):
        held[card] += 1.71e9
    assert max(held) - min(held) < 2 * 1.71e9


def test_7b_on_eight_cards_leaves_none_empty():
    """The first one holds the ViT, which is more than its share."""
    assert set(shares([404_750_336] * 32, 4_400_000_000, 8)) == set(range(1, 8))


def test_a_llama_with_other_things_between_its_layers_is_refused():
    model = load(SHIPPED)[0]
    model.llama.__class__ = type("Other", (Llama,), {"through_layers": lambda self: None})
    with pytest.raises(ValueError, match="--devices knows LLaMA's own layers alone"):
        spread(model, [CPU, CPU])


def test_more_cards_than_there_are_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="--devices 3: .*this machine has 0 cards"):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
        cards(3)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert cards(2) == [torch.device("cuda", 0), torch.device("cuda", 1)] and cards(None) == [torch.device("cuda")]
    for wrong in (3, 0, -1):
        with pytest.raises(ValueError, match="this machine has 2 cards"):
            cards(wrong)


def test_positions_and_rows_come_along():
    """PyTorch takes an index from the CPU for any tensor, but not one from another card."""
    layer = load(SHIPPED)[0].llama.layers[0].to(META)
    x, rope, rows = torch.zeros(3, 128), torch.zeros(2, 3, 1, 32), torch.arange(2)
    found = on_its_card(layer, (x, Pass(3, rope, lambda *given: None), 0, rows))
    assert [one.device for one in (found[0], found[1].rope, found[3])] == [META] * 3 and found[2] == 0
    assert on_its_card(layer, (x, found[1], 0, None))[3] is None and len(on_its_card(layer, (x, found[1], 0))) == 3


SHARED_OUT = """
import sys
import torch
from cards import is_follower, n_ranks, of_rank_0, waiting_ranks
from chat import Chat, main
from visualchat import load

folder = sys.argv[sys.argv.index("--model") + 1]
whole, shared = load(folder)[0].llama, Chat.open(folder).model.llama
assert n_ranks() == 2 and shared.config.num_key_value_heads == 2
for name, width in (("k_proj", (64, 128)), ("o_proj", (128, 64))):
    assert getattr(shared.layers[0].self_attn, name).weight.shape == width, name
assert shared.layers[5].mlp.up_proj.weight.numel() < whole.layers[5].mlp.up_proj.weight.numel()
drawn = [None, None]
torch.distributed.all_gather_object(drawn, torch.rand(3).tolist(), group=waiting_ranks())
assert drawn[0] == drawn[1], "ranks that draw tokens would draw different ones"
torch.manual_seed(0)
x, kind = torch.randn(2, 9, 128), torch.tensor([[1, 1, 2, 2, 2, 2, 1, 1, 1], [1, 2, 2, 2, 2, 1, 1, 0, 0]])
with torch.no_grad():
    a, b = (llama.lm_head(llama(x, kind)) for llama in (whole, shared))
assert (a - b).abs().max() < 1e-4 * a.abs().max(), (a - b).abs().max()
assert of_rank_0(lambda: "followers do not ask" if not is_follower() else 1 / 0) == "followers do not ask"
main()
"""


def test_ranks_that_share_every_layer_hold_the_conversation_of_one_process(tmp_path):
    """Half of the heads on each of two ranks: the same logits, and the same lines on the terminal, once."""
    (tmp_path / "shared_out.py").write_text(SHARED_OUT)
    lines = (f"{IMAGES[0]} {IMAGES[1]} Describe image 1.\nWhat changed from image 1 to image 2?\nnone.png\n/undo\n"
             f"{IMAGES[0]} Describe the image.\n/save talk.html\n/save talk.json\n")
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "shared_out.py")]
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    one, two = (subprocess.run([sys.executable, *start, "--model", str(SHIPPED)], cwd=tmp_path, input=lines,
                               text=True, capture_output=True, timeout=300, env=settings)
                for start in ([str(ROOT / "chat.py")], ranks))
    assert one.returncode == two.returncode == 1                # none.png
    said = one.stdout.splitlines()
    said.remove("saved: talk.html")                             # which no rank alone could draw
    assert [line for line in two.stdout.splitlines() if line in said] == said, two.stdout + two.stderr
    assert two.stderr.count("no image none.png") == two.stderr.count("a rank has a share of the heads") == 1
    assert (tmp_path / "talk.json").exists()


def test_what_ranks_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    model = load(SHIPPED)[0]
    with pytest.raises(ValueError, match="3 ranks cannot share 4 heads of keys and values"):
        divide(model, torch.float32)
    model.llama.__class__ = type("Other", (Llama,), {"through_layers": lambda self: None})
    with pytest.raises(ValueError, match="several ranks share LLaMA's own layers alone"):
        divide(model, torch.float32)
    for option in (["--int8"], ["--devices", "2"], ["--keep", "kept"], ["--page", "a.html"]):
        monkeypatch.setattr(sys, "argv", ["chat.py", *option])
        with pytest.raises(SystemExit):
            read_options("")
        assert f"{option[0]} is for one process" in capsys.readouterr().err


def test_a_rank_that_lacks_memory_ends_and_the_others_do_not_wait_for_its_next_line(monkeypatch):
    def follow(line):
        raise torch.OutOfMemoryError("none is left")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("terminal.of_rank_0", lambda ask, lines=iter(["Describe image 1."]): next(lines))
    with pytest.raises(torch.OutOfMemoryError):
        converse(SimpleNamespace(say=print, follow=follow, drop_unreadable=lambda: None))
