"""Claims about experiments/: the main road does not know them, each does what it says, one command runs all."""
import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from PIL import Image

import album
import chat
import data
import mmca
import pixels
import sources
import visualchat
from album import digest_of
from chat import Chat
from data import SYSTEM, Round, collate, encode, to_tensors
from experiments import lessons
from experiments.outside import apply, swap
from experiments.run import EXPERIMENTS, find, list_text
from mmca import IMAGE, TEXT
from recipe import Options, for_size
from sources import Reader
from tiny.world import write_world
from training import ROOT
from visualchat import VARIANTS, build, load, save


@contextmanager
def applied(name):
    """What `apply` changes, and afterwards everything as it was."""
    one = EXPERIMENTS[name]
    apply(name, one)
    try:
        yield one
    finally:
        for old, new in one.swaps:
            swap(new, old)
        del VARIANTS[name]
        if one.attention:
            mmca.ATTENTION.pop(one.attention)


def trained_names(model) -> set[str]:
    model.freeze()
    return {name for name, p in model.named_parameters() if p.requires_grad}


def engine_settings(monkeypatch, model, **options) -> dict:
    """What `engine_for` would give DeepSpeed, in a run's first step."""
    import zero
    monkeypatch.setattr(zero.deepspeed, "initialize", lambda **given: (given,))
    monkeypatch.setattr(zero.dist, "get_world_size", lambda: 1)
    return zero.engine_for(model, for_size(Options(precision="fp32", **options)), steps=10, universal=False)


PLAIN = {"projection.weight", "projection.bias", "llama.embed_tokens.weight"}


# ---- the rooms ----

def test_no_file_outside_names_or_imports_an_experiment():
    names = "|".join(name for name in EXPERIMENTS if name not in ("mmca", "causal", "cross", "clip"))
    for path in (*ROOT.glob("*.py"), *(ROOT / "tiny").glob("*.py")):
        text = path.read_text()
        assert "experiments" not in text and not re.search(rf"\b({names})\b", text), path


def test_what_is_swapped_is_swapped_everywhere_and_back():
    def new():
        """In place of encode_round."""

    import evaluate
    old = data.encode_round
    swap(old, new)
    assert data.encode_round is chat.encode_round is evaluate.encode_round is new
    swap(new, old)
    assert data.encode_round is chat.encode_round is evaluate.encode_round is old


def test_the_list_says_what_each_experiment_is_and_what_it_adds():
    lines = list_text("7b").splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    added = {line.split()[0]: line.split("  ")[1:] for line in lines}
    block = 4096 * 3 * 4096 + 3 * 4096 + 4096 ** 2 + 4096 + 2 * 4 * 4096 ** 2 + 5 * 4096 + 4 * 4096
    assert visualchat.readable(block) in " ".join(added["projection_block"])
    assert visualchat.readable(3 * 4096) in " ".join(added["special_tokens"])       # the head's rows do not train
    assert lines[list(EXPERIMENTS).index("clip")].split()[2] == "-"     # depends on a folder
    tiny = {line.split()[0]: line.split()[2] for line in list_text("tiny").splitlines()[1:]}
    assert (tiny["mmca"], tiny["clip"], tiny["special_tokens"]) == ("0", "-", str(3 * 128))


def test_an_unknown_experiment_is_refused_by_name():
    with pytest.raises(ValueError, match="no experiment 'loar'"):
        find("loar")


# ---- lessons.py ----

@pytest.mark.parametrize("name, new", [
    ("projection_block", r"projection_block\.\w+"), ("released_norm", r"projection_norm\.\w+"),
    ("special_tokens", r"x^")])
def test_what_an_experiment_adds_trains_is_saved_and_chats(name, new, config, rows, image_files, tmp_path):
    with applied(name):
        model = build(replace(config, variant=name))
        found = trained_names(model)
        assert all(re.match(new, one) for one in found - PLAIN) and found >= PLAIN
        losses, _ = model(**collate(rows))
        losses.mean().backward()
        grown = {one: p for one, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.grad.any() for p in grown.values())
        with torch.no_grad():
            for p in grown.values():
                p.add_(0.1 * torch.randn_like(p))
        save(tmp_path, grown, replace(config, variant=name))
        again, _ = load(tmp_path)
        torch.testing.assert_close(again(**collate(rows))[0], model(**collate(rows))[0])
        chat = Chat.open(tmp_path)
        assert chat.config.variant == name and isinstance(chat.ask("What is it?", image_files[0]), str)
    with pytest.raises(ValueError, match=f"variant '{name}'"):
        load(tmp_path)


def test_a_layer_before_the_projection_lets_the_tokens_of_an_image_read_each_other(config):
    with applied("projection_block"):
        model = build(replace(config, variant="projection_block"))
        features = torch.randn(1, 4, 128)
        changed = features.clone()
        changed[0, 3] = torch.randn(128)
        assert (model.projection(features)[0, 0] - model.projection(changed)[0, 0]).abs().max() > 1e-4
    plain = build(config)
    torch.testing.assert_close(plain.projection(features)[0, 0], plain.projection(changed)[0, 0])


def test_the_embedding_has_a_rate_of_its_own(monkeypatch, model):
    assert EXPERIMENTS["embedding_rate"].options == ("--embedding-lr", "1e-4")
    before = [p.detach().clone() for p in (model.projection.weight, model.llama.embed_tokens.weight)]
    for rate in (0.0, 1e-4):
        given = engine_settings(monkeypatch, model, embedding_lr=rate, lr=1e-3)
        for p in (model.projection.weight, model.llama.embed_tokens.weight):
            p.grad = torch.ones_like(p)
        given["optimizer"].step()
        moved = [(p - old).abs().max().item() for p, old in zip(
            (model.projection.weight, model.llama.embed_tokens.weight), before)]
        assert moved[0] > 0 and (moved[1] > 0) == (rate > 0) and moved[1] < moved[0]


def test_the_chat_template_is_that_of_llama_2_chat(tokenizer, image_files):
    rounds = [Round((), "Is it a cat?", "A cat."), Round(tuple(image_files[:2]), "What is it?", "A question.")]
    with applied("chat_template"):
        found = encode(rounds, tokenizer, 4)
        text = sources.marked(found, tokenizer)
    a, b = image_files[:2]
    assert text == (f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\nIs it a cat? [/INST][[A cat.</s>]]"
                    f"<s>[INST] Image 2:<{a}>\nImage 3:<{b}>\nWhat is it? [/INST][[A question.</s>]]".replace(
                        "Image 2", "Image 1").replace("Image 3", "Image 2"))
    asked = tokenizer.encode(f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\nIs it a cat? [/INST]")
    assert found.ids[:len(asked) + 1] == [tokenizer.bos, *asked]


def test_the_template_s_words_become_one_token_each_with_a_row_in_the_embedding(config, tokenizer, image_files):
    rounds = [Round((image_files[0],), "What is it?", "A cat.")]
    plain, n = encode(rounds, tokenizer, 4), tokenizer.model.vocab_size()
    with applied("special_tokens"):
        found = encode(rounds, tokenizer, 4)
        model = build(replace(config, variant="special_tokens"))
    assert [id - n for id in found.ids if id >= n] == [0, 1, 2] and len(found.ids) < len(plain.ids)
    assert found.labels[-3:] == plain.labels[-3:]
    old = build(config).llama
    assert model.llama.embed_tokens.weight.shape[0] == model.llama.lm_head.weight.shape[0] == n + 3
    torch.testing.assert_close(model.llama.embed_tokens.weight[:n], old.embed_tokens.weight)
    torch.testing.assert_close(model.llama.embed_tokens.weight[n:], old.embed_tokens.weight.mean(0).expand(3, -1))
    torch.testing.assert_close(model.llama.lm_head.weight[:n], old.lm_head.weight)


def test_a_blend_gets_another_image_and_texts_follow_it(tmp_path):
    write_world(tmp_path, 110, seed=1)
    source = sources.SOURCES[lessons.BLEND]
    plain = list(source.read(Reader(lessons.BLEND, tmp_path)))
    with applied("shuffled_images"):
        found = list(sources.SOURCES[lessons.BLEND].read(Reader(lessons.BLEND, tmp_path)))
    assert len(found) == len(plain)
    texts = [" ".join(f"{round_.question} {round_.answer}" for round_ in one.rounds) for one in plain]
    as_before = [bool(lessons.OTHERS.search(text)) for text in texts]       # their texts would become wrong
    assert [one == other for one, other in zip(plain, found)] == as_before and not all(as_before)
    for one, other in ((one, other) for one, other, same in zip(plain, found, as_before) if not same):
        images, more = ([image for round_ in each.rounds for image in round_.images] for each in (one, other))
        assert len(more) == len(images) + 1
        place = next((i for i, image in enumerate(images) if more[i] != image), len(images))
        assert more[:place] + more[place + 1:] == images and more[place] not in images
        for before, after in zip(one.rounds, other.rounds):
            assert after.question == lessons.moved(before.question, place + 1)


@pytest.mark.parametrize("text, expected", [
    ("What is in image 2?", "What is in image 3?"), ("Compare images 1, 2 and 3.", "Compare images 1, 3 and 4."),
    ("Image 1 and 2 dogs.", "Image 1 and 2 dogs."), ("Compare image 1 and 2.", "Compare image 1 and 3."),
    ("2 cats and 3 dogs", "2 cats and 3 dogs")])
def test_only_numbers_of_images_move(text, expected):
    assert lessons.moved(text, 2) == expected


# ---- released.py ----

def test_images_stand_in_reverse_order(config, tokenizer, image_files):
    encoded = encode([Round(tuple(image_files[:2]), "What is it?", "A cat.")], tokenizer, 4)
    plain = to_tensors(encoded, 16)["images"]
    with applied("released_order"):
        found = data.to_tensors(encoded, 16)["images"]
    assert torch.equal(found, plain.flip(0)) and not torch.equal(found, plain)


def test_chat_too_reads_a_round_s_images_in_reverse_order(model, tokenizer, image_files, monkeypatch):
    def answers(*rounds):
        one = Chat(model, tokenizer, chat.Album(model))
        one.max_new_tokens = 12
        for files in rounds:
            one.ask("What is it?", *files)
        return [round_.ids for round_ in one.rounds], one.digests

    a, b, c, d = image_files
    expected, other = answers((b, a), (), (d, c), (a,))[0], answers((a, b), (), (c, d), (a,))[0]
    for constant, value in EXPERIMENTS["released_order"].values.items():
        monkeypatch.setattr(constant, value)
    found, digests = answers((a, b), (), (c, d), (a,))
    assert found == expected != other and digests[0] == digest_of(a)


KIND = torch.tensor([[TEXT, TEXT, IMAGE, IMAGE, TEXT, IMAGE, TEXT]])


def weights_of(attention) -> torch.Tensor:
    """The weights (7, 7) by which KIND's rows mix the values: a row of one-hot values shows them."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 7, 8)
    return attention(q, k, torch.eye(7)[None, None], KIND)[0, 0]


def test_text_before_the_first_image_reads_its_past_and_later_images_and_nothing_else_changes():
    plain = weights_of(mmca.mmca)
    with applied("released_leak"):
        found = weights_of(mmca.mmca)
    expected = plain.clone()
    expected[0] += torch.tensor([1, 0, 1, 1, 0, 1, 0]) / 4
    expected[1] += torch.tensor([1, 1, 1, 1, 0, 1, 0]) / 5
    torch.testing.assert_close(found, expected)
    assert (plain[:2, 2:] == 0).all()


def test_image_rows_read_text_before_them_and_nothing_else_changes():
    plain = weights_of(mmca.mmca)
    with applied("released_rows"):
        found = weights_of(mmca.mmca)
    images = (KIND[0] == IMAGE).nonzero()[:, 0]
    torch.testing.assert_close(found[KIND[0] == TEXT], plain[KIND[0] == TEXT])
    for row in images.tolist():
        reads = [column for column in range(7) if found[row, column] > 0]
        assert reads == [column for column in range(row + 1) if column == row or KIND[0, column] == TEXT]
        assert found[row, row] == 1 and found[row].sum() == pytest.approx(2) and plain[row].sum() == 1


def test_a_departure_of_attention_changes_the_model_s_losses(config, rows):
    plain = build(replace(config, attention="written"))
    losses = plain(**collate(rows))[0]
    for name in ("released_leak", "released_rows"):
        with applied(name):
            assert (plain(**collate(rows))[0] - losses).abs().max() > 1e-3
    torch.testing.assert_close(plain(**collate(rows))[0], losses)


def test_beta1_is_that_of_the_release(monkeypatch, model):
    import zero
    assert zero.BETAS == (0.0, 0.95) and EXPERIMENTS["released_betas"].values == {"zero.BETAS": (0.9, 0.95)}
    monkeypatch.setattr(zero, "BETAS", (0.9, 0.95))
    groups = engine_settings(monkeypatch, model)["optimizer"].param_groups
    assert {group["betas"] for group in groups} == {(0.9, 0.95)}


def test_only_the_middle_of_an_image_is_seen():
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    with applied("released_crop"):
        found = pixels.to_pixels(image, 8)
    assert (found[0] == 0).all() and (found[2] == 255).all()
    assert (pixels.to_pixels(image, 8)[0] == 255).any()


def test_features_of_cropped_images_are_kept_apart(model, tmp_path):
    plain = album.KeptFeatures(tmp_path, model.vit).folder
    with applied("released_crop"):
        assert album.KeptFeatures(tmp_path, model.vit).folder != plain
    assert album.KeptFeatures(tmp_path, model.vit).folder == plain
