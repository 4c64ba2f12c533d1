"""Claims about album.py: an image that is known costs nothing, in any conversation; what is kept is checked."""
import hashlib
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save as serialize, save_file

from album import Album, KeptFeatures, fingerprint
from chat import Chat
from data import Conversations, Round, collate, encode, encode_round, to_tensors
from pixels import load_pixels, normalized
from test_chat import ask
from test_data import N, conversations_about
from tiny.world import write_world
from visualchat import save
from vit import VisionTransformer
from weights import find_weights, read_file


@pytest.fixture
def chat(model, tokenizer):
    return Chat(model, tokenizer)


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def passes(model):
    """What the towers are given from now on, pass by pass: images of the ViT, tokens of LLaMA's layers."""
    given = {"vit": [], "llama": []}
    model.vit.register_forward_pre_hook(lambda _, args: given["vit"].append(len(args[0])))
    width = model.llama.config.hidden_size
    model.llama.layers[0].post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: given["llama"].append(args[0].numel() // width))
    return given


def test_an_image_that_was_seen_costs_no_pass_over_it_in_any_conversation(chat, image_files):
    first = ask(chat, image_files[:2])
    given, again = passes(chat.model), Chat(chat.model, chat.tokenizer, chat.album)
    assert ask(again, image_files[:2]) == first
    text = len(encode_round(Round(tuple(image_files[:2]), "?"), 0, True, chat.tokenizer, 4).ids) - 2 * 4
    assert given["vit"] == [] and given["llama"][0] == text and set(given["llama"][1:]) == {1}
    ask(again, image_files[2:3])
    assert given["vit"] == [1]


def test_images_are_kept_on_disk_and_a_damaged_file_is_made_anew(chat, image_files, tmp_path):
    kept = Chat(chat.model, chat.tokenizer, Album(chat.model, tmp_path / "album"))
    first = ask(kept, [*image_files[:2], image_files[0]])
    assert first == ask(chat, [*image_files[:2], image_files[0]])
    assert len(list((tmp_path / "album").iterdir())) == 2
    given, later = passes(chat.model), Chat(chat.model, chat.tokenizer, Album(chat.model, tmp_path / "album"))
    assert ask(later, [*image_files[:2], image_files[0]]) == first and given["vit"] == []
    for damage in ("nonsense", "another shape", "no checksum", "another value"):
        for file in (tmp_path / "album").iterdir():
            found = read_file(file)
            found["image_kv"] = torch.zeros(3) if damage == "another shape" else found["image_kv"] + 1
            if damage == "no checksum":
                del found["checksum"]
            file.write_bytes(b"nonsense" if damage == "nonsense" else serialize(found))
        for passes_of_vit in ([3], []):                         # damaged: looked at again; then kept again
            given["vit"].clear()
            again = Chat(chat.model, chat.tokenizer, Album(chat.model, tmp_path / "album"))
            assert ask(again, [*image_files[:2], image_files[0]]) == first and given["vit"] == passes_of_vit


def test_the_album_holds_the_newest_images(chat, image_files, monkeypatch):
    monkeypatch.setattr(Album, "NEWEST", 2)
    ask(chat, image_files[:3])
    digests = [digest(file) for file in image_files]
    assert [chat.album.find(digest) is None for digest in digests] == [True, False, False, True]
    given = passes(chat.model)
    assert chat.album.find_all(digests[:3]) is None and chat.album.find_all(digests[1:3]).shape[3] == 2 * 4
    chat.clear()
    ask(chat, image_files[1:3])
    assert given["vit"] == []
    chat.clear()
    ask(chat, image_files[:3])
    assert given["vit"] == [3]                                  # with one that is new, all are


def test_an_image_that_is_used_again_is_the_newest_again(chat, image_files, monkeypatch):
    monkeypatch.setattr(Album, "NEWEST", 2)
    for number in (0, 1, 0, 2):
        chat.clear()
        chat.ask("?", image_files[number])
    assert list(chat.album.known) == [digest(image_files[number]) for number in (0, 2)]


def test_images_found_in_a_folder_do_not_fill_the_memory(chat, image_files, tmp_path, monkeypatch):
    ask(Chat(chat.model, chat.tokenizer, Album(chat.model, tmp_path)), image_files)
    monkeypatch.setattr(Album, "NEWEST", 2)
    album = Album(chat.model, tmp_path)
    assert album.find_all([digest(file) for file in image_files]).shape[3] == 4 * 4
    assert len(album.known) == 2


def test_what_was_seen_is_kept_even_if_the_file_changes_while_the_answer_is_made(chat, image_files, tmp_path):
    file = tmp_path / "a.png"
    shutil.copy(image_files[0], file)
    for _ in chat.stream("?", file):
        shutil.copy(image_files[1], file)
    assert list(chat.album.known) == [digest(image_files[0])]


def test_an_answer_that_is_not_read_to_its_end_leaves_its_images_known(chat, image_files):
    chat.max_new_tokens = 4
    next(chat.stream("?", image_files[0]))
    chat.ask("?", image_files[1])                               # the first answer ends here
    kept, chat.album.known = chat.album.known, {}
    chat.clear()
    for file in image_files[:2]:
        chat.ask("?", file)
        torch.testing.assert_close(kept[digest(file)], chat.album.known[digest(file)], atol=1e-4, rtol=1e-4)


def test_another_training_result_or_tower_has_another_fingerprint(overfitted, config, tmp_path):
    parts = {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}
    names = []
    for folder in ("a", "b", "c"):
        save(tmp_path / folder, parts if folder != "b" else {name: p + 1 for name, p in parts.items()}, config)
        names.append(fingerprint(tmp_path / folder, config))
    assert names[0] == names[2] != names[1]
    shutil.copytree(config.vit, tmp_path / "vit")
    assert fingerprint(tmp_path / "a", replace(config, vit=str(tmp_path / "vit"))) != names[0]


# ---- kept features ----

def test_features_are_what_the_vit_makes_and_are_made_once(model, tokenizer, image_files, tmp_path, monkeypatch):
    vit, conversations = model.vit, conversations_about(image_files)
    features = KeptFeatures(tmp_path, vit)
    features.fill(image_files, vit)
    live, kept = (collate(list(Conversations(conversations, tokenizer, vit.config, features=given)))
                  for given in (None, features))
    assert "features" not in live and "images" not in kept and kept["features"].dtype == torch.float16
    torch.testing.assert_close(kept["features"].float(), vit(normalized(live["images"])), atol=2e-3, rtol=2e-3)
    assert model(**kept)[0].mean().item() == pytest.approx(model(**live)[0].mean().item(), abs=2e-3)
    monkeypatch.setattr(type(vit), "forward", lambda *args: 1 / 0)
    features.fill(image_files, vit)                             # nothing is left to do
    model(**kept)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(image_files)


def test_features_do_not_depend_on_what_was_kept_before(tmp_path):
    vit = VisionTransformer.from_pretrained(find_weights("tiny/vit"), torch.float32)    # alone other last bits
    write_world(tmp_path, 24, seed=1)
    images = sorted((tmp_path / "coco/train2017").iterdir())
    together, later = (KeptFeatures(tmp_path / name, vit) for name in ("together", "later"))
    together.fill(images, vit)
    for image in images[::2]:
        later.fill([image], vit)
    later.fill(images, vit)
    assert all(torch.equal(together.load(image), later.load(image)) for image in images)


def test_features_belong_to_their_image_s_bytes_and_their_encoder(model, image_files, tmp_path):
    vit = model.vit
    features = KeptFeatures(tmp_path, vit)
    features.fill(image_files[:1], vit)
    copy = tmp_path / "copy.png"
    copy.write_bytes(image_files[0].read_bytes())
    assert torch.equal(features.load(copy), features.load(image_files[0]))
    with pytest.raises(ValueError, match=f"no features were kept of {image_files[1]}"):
        features.load(image_files[1])
    with torch.no_grad():
        vit.ln_post.bias += 1
    with pytest.raises(ValueError, match="no features were kept"):
        KeptFeatures(tmp_path, vit).load(image_files[0])


def test_an_image_of_which_the_encoder_makes_no_numbers_is_named(model, image_files, tmp_path, monkeypatch):
    whole, bad = type(model.vit).forward, normalized(load_pixels(image_files[1], 16)[None])

    def overflowing(vit, images):
        return whole(vit, images) / (0 if torch.equal(images, bad) else 1)

    monkeypatch.setattr(type(model.vit), "forward", overflowing)
    with pytest.raises(ValueError, match=f"the ViT makes values of {image_files[1]} that are no finite numbers"):
        KeptFeatures(tmp_path / "strict", model.vit).fill(image_files, model.vit)
    features = KeptFeatures(tmp_path / "skipping", model.vit)
    features.fill(image_files, model.vit, skip_bad=True)
    assert [features.file(image).exists() for image in image_files[:2]] == [True, False]
    with pytest.raises(ValueError, match=f"no features were kept of {image_files[1]}"):
        features.load(image_files[1])


def test_damaged_features_are_refused_whatever_bit_is_wrong(model, image_files, tmp_path):
    features = KeptFeatures(tmp_path, model.vit)
    features.fill(image_files[:1], model.vit)
    file = features.file(image_files[0])
    whole, rng = file.read_bytes(), random.Random(0)
    for _ in range(30):
        at = len(whole) - 1 - rng.randrange(2 * features.load(image_files[0]).numel())     # of FP16 values
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
        with pytest.raises(ValueError, match=file.name):
            features.load(image_files[0])
        file.write_bytes(whole)
    save_file({"features": torch.zeros(3, 3)}, file)
    with pytest.raises(ValueError, match=f"{file} is damaged, or does not hold features .*: delete it"):
        features.load(image_files[0])


def test_kept_features_of_conversations_without_an_image_are_none_in_the_same_type(model, tokenizer, image_files,
                                                                                   tmp_path):
    features = KeptFeatures(tmp_path, model.vit)
    features.fill(image_files[:1], model.vit)
    none, one = (to_tensors(encode([Round(tuple(image_files[:n]), "Q?", "A.")], tokenizer, N), 16, features)
                 for n in (0, 1))
    assert none["features"].shape == (0, N, 128) and set(none) == {"ids", "kind", "labels", "features"}
    assert collate([none, one])["features"].dtype == none["features"].dtype == torch.float16
