"""tiny/pretrain.py: pre-training learns, its towers are official folders, and those that are shipped are good."""
import random
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from transformers import LlamaForCausalLM

from data import Round, encode
from llama import Llama, Tokenizer
from mmca import IMAGE
from tiny import pretrain
from vit import VisionTransformer

WEIGHTS = Path(__file__).parent.parent / "weights/tiny"


def test_every_word_is_one_token_and_digits_are_stable():
    tokenizer = Tokenizer(WEIGHTS / "llama")
    words = tokenizer.model.encode_as_pieces("Which shape is red?\n### Image 1: 1? 2.")
    assert words == ["▁Which", "▁shape", "▁is", "▁red", "?",
                     "\n", "###", "▁Image", "▁1", ":", "▁1", "?", "▁2", "."]
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    for text in ("zebra — ü", "red  ?", "  "):                   # unknown words in bytes, spaces as they are
        assert tokenizer.decode(tokenizer.encode(text)) == text


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
    rounds = [Round(("a",), "What color is the shape in the image?", "red"),
              Round(("b",), "Do image a and image b have the same size?", "yes"),
              Round((), "Which image shows a blue shape?", "image b")]
    encoded = encode(rounds, tokenizer, 4)
    pieces = [tokenizer.model.id_to_piece(id) for id in encoded.ids]
    found = [(head, pieces[i], numbers) for head, i, numbers in pretrain.head_targets(encoded, scenes, tokenizer)]
    first, second = [1, 0, 3, 0], [1, 4, 3, 2]
    assert found == [
        ("image", "▁###", [0, *first]), ("name", "▁image", first), ("value", "▁red", [1, 0, 0]),
        ("image", "▁###", [1, *second]), ("name", "▁a", first), ("name", "▁b", second),
        ("pair", "▁b", [1, 0, 1, 0]), ("value", "▁blue", [0, 1, 0])]


def test_words_of_a_scene_stand_at_its_image_positions_in_any_order():
    tokenizer = Tokenizer(WEIGHTS / "llama")
    batch, asked, topics = pretrain.text_batch(random.Random(0), tokenizer, 3, n=20, n_rounds=4)
    kind, words = batch["kind"][0], [tokenizer.decode([id]) for id in batch["ids"][0].tolist()]
    described = [words[i:i + 4] for i in range(len(words)) if kind[i] == IMAGE and kind[i - 1] != IMAGE]
    assert [sorted(scene, key=pretrain.VALUES.index) == scene for scene in described].count(False) > 10
    scenes = [tuple(sorted(scene, key=pretrain.VALUES.index)) for scene in described]
    wanted = [numbers[1:] for head, _, numbers in asked if head == "image"]
    assert [pretrain.numbers_of(scene) for scene in scenes] == wanted
    assert len(topics) == 80 and batch["images"].shape[0] == 0


def test_the_heads_read_the_hidden_state_of_the_token_that_they_are_asked_about():
    """Every state names its position, and stands where `separate` puts it."""
    kind = torch.tensor([[1, 2, 2, 1, 1, 2, 1]])
    states = torch.tensor([0., 3, 4, 6, 1, 2, 5])[:, None]                  # text first
    read = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            read.extend(x[:, 0].tolist())
            return torch.zeros(len(x), sum(pretrain.N_VALUES))

    pretrain.head_loss({"name": Spy()}, {2: states}, kind, [("name", i, [0] * 4) for i in (3, 0, 6)])
    assert read == [3, 0, 6]


def test_the_losses_of_pre_training_fall_and_its_folders_load(tmp_path, monkeypatch, capsys):
    losses = {}

    def noted(modules, loss_of, steps, lr, name, optimize=pretrain.optimize):
        def and_kept(step):
            loss = loss_of(step)
            losses.setdefault(name, []).append(loss.item())
            return loss
        optimize(modules, and_kept, steps, lr, name)

    monkeypatch.setattr(pretrain, "optimize", noted)
    monkeypatch.setattr(pretrain, "WEIGHTS", tmp_path)
    monkeypatch.setattr(pretrain, "STEPS", {"vit": 30, "llama": 6})
    monkeypatch.setattr(pretrain, "N_IMAGES", 64)
    monkeypatch.setattr(pretrain, "N_FRESH", 100)
    monkeypatch.setattr("sys.argv", ["pretrain.py"])
    pretrain.main()
    assert mean(losses["ViT"][-5:]) < 0.95 * mean(losses["ViT"][:5])
    assert losses["LLaMA"][-1] < 0.9 * losses["LLaMA"][0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ViT, attributes read from 100 fresh images:")
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"LLaMA, {name}, written scenes, {images}" for name in ("mmca", "causal") for images in ("one", "several")]
    assert VisionTransformer.from_pretrained(tmp_path / "vit").config == pretrain.VIT
    assert Llama.from_pretrained(tmp_path / "llama").config.vocab_size == 331
    # The path that it was trained for stands in the file, and is the only difference.
    made, shipped = (Tokenizer(folder / "llama").model for folder in (tmp_path, WEIGHTS))
    assert [made.id_to_piece(i) for i in range(331)] == [shipped.id_to_piece(i) for i in range(331)]


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
        (known, wanted), (fresh, answers) = ((vit(images), values) for images, values
                                             in (pretrain.drawn(1200, 11), pretrain.drawn(400, 12)))
    for i, width in enumerate(pretrain.N_VALUES):               # a fit on 1,200 images, read on 400 others
        x, y = (torch.cat((features[:, i], torch.ones(len(features), 1)), dim=1) for features in (known, fresh))
        fit = torch.linalg.lstsq(x, torch.nn.functional.one_hot(wanted[:, i], width).float()).solution
        right.append((y @ fit).argmax(1) == answers[:, i])
    assert torch.stack(right).float().mean() >= 0.99


def test_the_shipped_llama_reads_written_scenes():
    llama = Llama.from_pretrained(WEIGHTS / "llama", dtype=torch.float32)
    table = pretrain.reading(llama, Tokenizer(WEIGHTS / "llama"), 400)
    for group, bar in (("one", 0.98), ("several", 0.95)):
        right = [right for answers in table[group].values() for right in answers]
        assert sum(right) / len(right) >= bar
        assert all(sum(right) / len(right) >= 0.85 for right in table[group].values())
