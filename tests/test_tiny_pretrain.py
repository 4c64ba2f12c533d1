"""tiny/pretrain.py: pre-training learns, its towers are official folders, and those that are shipped are good."""
import random
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import mean

import pytest
import torch
from transformers import LlamaForCausalLM

from data import Round, encode
from llama import Llama, Tokenizer
from mmca import IMAGE
from pixels import normalized
from tiny import pretrain
from tiny.wording import TOPICS
from tiny.world import ALL_SCENES, VALUES, dialogue
from visualchat import IGNORE
from vit import VisionTransformer

WEIGHTS = Path(__file__).parent.parent / "weights/tiny"


def test_every_word_is_one_token_and_digits_are_stable(monkeypatch):
    tokenizer = Tokenizer(WEIGHTS / "llama")
    words = tokenizer.model.encode_as_pieces("Which shape is red?\n### Image 1: img2 1st 2.")
    assert words == ["▁Which", "▁shape", "▁is", "▁red", "?",
                     "<0x0A>", "###", "▁Image", "▁1", ":", "▁img", "2", "▁1", "st", "▁2", "."]
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    for text in ("zebra — ü", "red  ?", "  "):                   # unknown words in bytes, spaces as they are
        assert tokenizer.decode(tokenizer.encode(text)) == text
    rng = random.Random(0)
    monkeypatch.setattr("tiny.wording.made_up", lambda rng: "cat")
    for _ in range(200):
        for _, topic, question, answer in dialogue(rng.randint(1, 8), 6, rng, ALL_SCENES)[1]:
            pieces = tokenizer.model.encode_as_pieces(f"{question} {answer}")
            assert topic == "outside" or not any(piece.startswith("<0x") for piece in pieces), question


def test_towers_are_written_as_they_are_read(tmp_path):
    torch.manual_seed(0)
    llama, vit = Llama(replace(pretrain.LLAMA, vocab_size=50)), VisionTransformer(pretrain.VIT)
    pretrain.write_llama(llama, tmp_path / "llama")
    pretrain.write_vit(vit, tmp_path / "vit")
    again = Llama.from_pretrained(tmp_path / "llama"), VisionTransformer.from_pretrained(tmp_path / "vit")
    assert (again[0].config, again[1].config) == (llama.config, vit.config)
    for tower, copy in zip((llama, vit), again):
        assert all(torch.equal(a.half(), b) for a, b in zip(tower.parameters(), copy.parameters(), strict=True))
    assert len(list((tmp_path / "llama").glob("model-*-of-00002.safetensors"))) == 2


def test_auxiliary_heads_are_asked_at_the_right_tokens():
    tokenizer = Tokenizer(WEIGHTS / "llama")
    scenes = [("big", "red", "star", "left"), ("big", "blue", "star", "top")]
    rounds = [Round((), "Hello.", "Hello!"), Round(("a",), "What color is the shape in the image?", "red"),
              Round(("b",), "Do pic a and the 2nd photo have the same size?", "yes"),
              Round((), "Which image shows a large shape?", "image b"),
              Round((), "Is it Image 2 or img3?", "There is no such image."), Round((), "Is it blue?", "yes")]
    encoded = encode(rounds, tokenizer, 4)
    pieces = [tokenizer.model.id_to_piece(id) for id in encoded.ids]
    found = [(head, pieces[i], numbers) for head, i, numbers in pretrain.head_targets(
        encoded, scenes, ["hello", "color", "same", "which", "absent", "is"], tokenizer)]
    first, second, none = [1, 0, 3, 0], [1, 4, 3, 2], [0] * 6
    assert found == [
        ("topic", ":", [TOPICS.index("hello")]),
        ("image", "<0x0A>", [0, *first]), ("name", "▁image", [1, *first]), ("topic", ":", [TOPICS.index("color")]),
        ("value", "▁red", [1, 0, *none]),
        ("image", "<0x0A>", [1, *second]), ("name", "▁a", [1, *first]), ("name", "nd", [1, *second]),
        ("pair", "nd", [1, 0, 1, 0]), ("topic", ":", [TOPICS.index("same")]),
        ("value", "▁large", [1, 1, *none]), ("topic", ":", [TOPICS.index("which")]),
        *(("which", token, [1, 1, *none]) for token in (":", "▁image", "▁b")),
        ("name", "▁2", [1, *second]), ("name", "3", [0] + [IGNORE] * 4), ("topic", ":", [TOPICS.index("absent")]),
        ("value", "▁blue", [0, 1, *none]), ("topic", ":", [TOPICS.index("is")]), ("is", ":", [1])]


def test_words_of_a_scene_stand_at_its_image_positions():
    tokenizer = Tokenizer(WEIGHTS / "llama")
    batch, asked, topics = pretrain.text_batch(random.Random(0), tokenizer, [1, 3, 8], n=20, n_rounds=4)
    kind, words = batch["kind"][0], [tokenizer.decode([id]) for id in batch["ids"][0].tolist()]
    described = [tuple(words[i:i + 4]) for i in range(len(words)) if kind[i] == IMAGE and kind[i - 1] != IMAGE]
    expected = [numbers[1:] for head, _, numbers in asked if head == "image"]
    assert [pretrain.numbers_of(scene) for scene in described] == expected and len(expected) > 40
    assert len(topics) == 80 and batch["images"].shape[0] == 0
    assert set(shown for _, shown in topics[3::4]) == {1, 3, 8}


def test_noise_moves_image_positions_alone(monkeypatch):
    tokenizer, given = Tokenizer(WEIGHTS / "llama"), []
    llama = Llama.from_pretrained(WEIGHTS / "llama", "mmca", torch.float32)
    batch = pretrain.text_batch(random.Random(0), tokenizer, [2], n=20, n_rounds=4)[0]
    torch.manual_seed(0)
    monkeypatch.setattr(Llama, "forward", lambda self, x, kind, read, lengths: given.append(x) or x[read])
    for noise in (0.0, 0.5):
        pretrain.predict(llama, batch, noise)
    moved = (given[1] - given[0])[0]
    assert not moved[batch["kind"][0] != IMAGE].any()
    spread = moved[batch["kind"][0] == IMAGE].std(-1) / llama.embed_tokens.weight.std()
    assert 0 < spread.min() < 0.05 and 0.45 < spread.max() < 0.6        # each position has a strength of its own


def test_the_heads_read_the_hidden_state_of_the_token_that_they_are_asked_about():
    """Every state names its position, and stands where `separate` puts it."""
    kind = torch.tensor([[1, 2, 2, 1, 1, 2, 1]])
    states = torch.tensor([0., 3, 4, 6, 1, 2, 5])[:, None]                  # text first
    read = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            read.extend(x[:, 0].tolist())
            return torch.zeros(len(x), 2 + sum(pretrain.N_VALUES))

    pretrain.head_loss({"name": Spy()}, {2: states}, kind, [("name", i, [0] * 5) for i in (3, 0, 6)])
    assert read == [3, 0, 6]


@pytest.fixture
def small(tmp_path, monkeypatch) -> dict[str, list[float]]:
    """Pre-training of few steps into a folder of its own; the losses of each tower's steps, so far."""
    losses = {}

    def noted(tower, heads, loss_of, steps, name, optimize=pretrain.optimize):
        def and_kept(step):
            loss = loss_of(step)
            losses.setdefault(name, []).append(loss.item())
            return loss
        optimize(tower, heads, and_kept, steps, name)

    for name, value in (("optimize", noted), ("WEIGHTS", tmp_path), ("UNFINISHED", tmp_path / "unfinished"),
                        ("STEPS", {"vit": 12, "llama": 12}), ("N_IMAGES", 64), ("N_FRESH", 50)):
        monkeypatch.setattr(pretrain, name, value)
    return losses


def test_the_losses_of_pre_training_fall_and_its_folders_load(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain.py"])
    pretrain.main()
    assert mean(small["ViT"][-5:]) < 0.95 * mean(small["ViT"][:5])
    assert small["LLaMA"][-1] < 0.9 * small["LLaMA"][0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ViT, attributes read from 50 fresh images:")
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"LLaMA, {name}, written scenes, {shown} shown" for name in ("mmca", "causal")
        for shown in ("no or one", "two or three", "four to eight")]
    assert VisionTransformer.from_pretrained(tmp_path / "vit").config == pretrain.VIT
    assert Llama.from_pretrained(tmp_path / "llama").config.vocab_size == 1021
    # The path that it was trained for stands in the file, and is the only difference.
    made, shipped = (Tokenizer(folder / "llama").model for folder in (tmp_path, WEIGHTS))
    assert [made.id_to_piece(i) for i in range(1021)] == [shipped.id_to_piece(i) for i in range(1021)]


def test_pre_training_that_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "UNFINISHED", tmp_path)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def train(stop: int | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        tower, head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)

        def loss_of(step):
            if step == stop:
                raise KeyboardInterrupt
            return (head(tower(x[torch.randint(64, (16,))])) - 1).square().mean()

        pretrain.optimize(tower, head, loss_of, 520, "small")
        return [*tower.parameters(), *head.parameters()]

    whole = train(None)
    with pytest.raises(KeyboardInterrupt):
        train(510)
    assert (tmp_path / "small.pt").exists()
    assert all(torch.equal(a, b) for a, b in zip(whole, train(None), strict=True))
    assert not (tmp_path / "small.pt").exists()


# ---- the shipped towers ----

def test_the_shipped_towers_are_small_and_in_half_precision():
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12e6
    llama, vit = Llama.from_pretrained(WEIGHTS / "llama"), VisionTransformer.from_pretrained(WEIGHTS / "vit")
    assert 1e6 < sum(p.numel() for p in llama.parameters()) < 4e6
    assert 0.5e6 < sum(p.numel() for p in vit.parameters()) < 2e6
    assert {p.dtype for tower in (llama, vit) for p in tower.parameters()} == {torch.float16}


def test_transformers_reads_the_shipped_llama():
    theirs = LlamaForCausalLM.from_pretrained(WEIGHTS / "llama", dtype=torch.float32)
    ours = Llama.from_pretrained(WEIGHTS / "llama", "causal", torch.float32)
    ids = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    logits = ours.lm_head(ours(ours.embed_tokens(ids), torch.ones_like(ids))).unflatten(0, ids.shape)
    assert torch.allclose(logits, theirs(ids).logits, atol=1e-4)


def test_a_linear_probe_reads_all_attributes_from_the_shipped_vit():
    vit = VisionTransformer.from_pretrained(WEIGHTS / "vit", torch.float32)
    right = []
    with torch.no_grad():
        (known, wanted), (fresh, answers) = ((vit(normalized(images)), values) for images, values
                                             in (pretrain.drawn(1200, 11), pretrain.drawn(400, 12)))
    first, n = torch.tensor([0, *accumulate(pretrain.N_VALUES)]), len(VALUES)
    x, y = (torch.cat((features, torch.ones(len(features), 4, 1)), dim=2) for features in (known, fresh))
    one_hot = torch.nn.functional.one_hot(wanted + first[:4], n).float()    # one fit for all four tokens
    told = y @ torch.linalg.lstsq(x.flatten(0, 1), one_hot.flatten(0, 1)).solution
    for i in range(4):
        right.append(told[:, i, first[i]:first[i + 1]].argmax(1) == answers[:, i])
    assert torch.stack(right).float().mean() >= 0.99


def test_the_shipped_llama_reads_written_scenes():
    llama = Llama.from_pretrained(WEIGHTS / "llama", dtype=torch.float32)
    table = pretrain.reading(llama, Tokenizer(WEIGHTS / "llama"), 400)
    for group, bar, least in (("no or one", 0.98, 0.9), ("two or three", 0.98, 0.9), ("four to eight", 0.98, 0.9)):
        right = [right for answers in table[group].values() for right in answers]
        assert sum(right) / len(right) >= bar
        assert all(sum(right) / len(right) >= least for right in table[group].values() if len(right) >= 20)
