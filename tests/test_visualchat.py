"""Claims about visualchat.py: images in their slots, the loss, what is trained, generating, saving and finding."""
import json
import os
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from data import collate
from llama import Cache
from mmca import IMAGE, TEXT
from visualchat import (CONFIG, IGNORE, TRAINED, ModelConfig, build, choose, find, load, readable, save, towers,
                        whole_answers)

NAMES = {"projection.weight", "projection.bias", "llama.embed_tokens.weight"}


def answers(row):
    """Where the row's answers begin and end."""
    return F.pad((row["labels"] != IGNORE).int(), (1, 1)).diff().nonzero().view(-1, 2).tolist()


def cut(row, end):
    """The row's first `end` positions and the images in them."""
    n = int((row["kind"][:end] == IMAGE).sum()) // 4
    return {name: row[name][:end] for name in ("ids", "kind", "labels")} | {"images": row["images"][:n]}


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def splice(model, batch):
    return model.splice(batch["ids"], batch["kind"], batch["images"])


# ---- the splice ----

def test_image_1_is_in_the_first_slot_and_swapping_images_swaps_exactly_the_slots(model, rows):
    batch = collate(rows[:1])
    swapped = batch | {"images": batch["images"].flip(0)}
    before, after, places = splice(model, batch), splice(model, swapped), batch["kind"] == IMAGE
    first, second = before[places].split(4)
    same(first, model.see(batch["images"][:1])[0])
    same(after[places], torch.cat((second, first)))
    assert not torch.allclose(first, second, atol=0.1) and torch.equal(before[~places], after[~places])


def test_images_land_in_their_own_rows_and_words_keep_their_embeddings(model, rows):
    batch = collate(rows)
    x, words = splice(model, batch), batch["kind"] == TEXT
    for row, found in zip(rows, x[0].split(batch["lengths"])):
        same(found, splice(model, collate([row]))[0])
    assert torch.equal(x[words], model.llama.embed_tokens.weight[batch["ids"][words]])


@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_wrong_number_of_images_is_refused(model, rows, images):
    with pytest.raises(ValueError, match=f"8 places for image tokens, but {images} images of 4 tokens each"):
        splice(model, collate(rows[:1]) | {"images": torch.zeros(images, 3, 16, 16)})


# ---- the loss ----

def test_a_row_s_losses_are_the_same_alone_and_in_a_mixed_batch(model, rows):
    same(model.score(**collate(rows))[0], torch.cat([model.score(**collate([row]))[0] for row in rows]))


def test_forward_is_the_mean_of_score_in_float32(model, rows):
    for dtype in (torch.float32, torch.bfloat16):
        loss, _ = model.to(dtype).score(**collate(rows))
        assert loss.dtype == torch.float32 and torch.equal(model(**collate(rows)), loss.sum() / len(loss))


def test_loss_is_transformers_cross_entropy(config, model, rows):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(config.llama).eval()
    batch = collate([rows[2]])
    same(model(**batch), theirs(batch["ids"], labels=batch["labels"]).loss)


def test_without_images_the_projection_has_a_gradient_of_zero(model, rows):
    model.freeze()
    loss = model(**collate([rows[2]]))
    loss.backward()
    assert loss.isfinite() and model.llama.embed_tokens.weight.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.projection.parameters())


def test_without_images_a_large_projection_does_not_overflow_in_float16(model, rows):
    model.projection.bias.data.fill_(1000)
    assert model.half()(**collate([rows[2]])).isfinite()


def test_an_empty_batch_loses_nothing_and_has_gradients_of_zero(model, rows):
    model.freeze()
    batch = {name: x[:, :0] if x.ndim == 2 else x[:0] for name, x in collate(rows).items() if name != "lengths"}
    loss = model(**batch, lengths=[0])
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_without_labels_the_loss_is_exactly_zero(model, rows):
    model.freeze()
    batch = collate(rows)
    loss = model(**batch | {"labels": torch.full_like(batch["labels"], IGNORE)})
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), b=st.integers(1, 3), t=st.integers(2, 9))
def test_whole_answers_agrees_with_a_loop(data, b, t):
    scored = data.draw(st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=b, max_size=b))
    labels = torch.tensor([[IGNORE, *(7 if s else IGNORE for s in row[1:])] for row in scored])     # never <s>
    n = int((labels == 7).sum())
    right = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    expected, tokens = [], iter(right)
    for row in labels.tolist():
        for before, label in zip([IGNORE, *row], row):
            if label != IGNORE:
                if before == IGNORE:
                    expected.append(True)
                expected[-1] &= next(tokens)
    assert whole_answers(labels, torch.tensor(right, dtype=torch.bool)).tolist() == expected


# ---- training ----

def test_freeze_leaves_the_projection_and_the_word_embeddings(model):
    line = model.freeze()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == NAMES
    trainable = 128 * 64 + 64 + model.llama.config.vocab_size * 64
    assert line == f"trainable {readable(trainable)} of {readable(sum(p.numel() for p in model.parameters()))}"


@pytest.mark.parametrize("count, text", [(16_781_312, "16.8 M"), (8_670_000_000, "8.67 B"), (1234, "1,234")])
def test_counts_are_readable(count, text):
    assert readable(count) == text


def test_a_batch_can_be_overfitted_and_nothing_frozen_changes(overfitted):
    before, _, after, loss = overfitted
    new = dict(after.named_parameters())
    changed = {name for name, old in before.named_parameters() if not torch.equal(old, new[name])}
    assert loss < 0.05 and changed == NAMES


def test_all_tokens_likeliest_means_that_greedy_decoding_gives_the_answer(overfitted, rows):
    results = []
    for model in overfitted[:3]:
        for row in rows:
            batch = collate([row])
            whole = whole_answers(batch["labels"], model.score(**batch)[1]).tolist()
            for (start, end), right in zip(answers(row), whole, strict=True):
                said = generated(model, collate([cut(row, start)]), end - start)
                assert (said[0].tolist() == row["ids"][start:end].tolist()) == right
                results.append(right)
    assert 0 < sum(results) < len(results)


# ---- generating ----

def generate(model, batch, *options, **more):
    return model.generate(batch["ids"], batch["kind"], batch["images"], batch["lengths"], *options, **more)


def generated(model, batch, *options, **more):
    return torch.stack(list(generate(model, batch, *options, **more)), dim=1)


def questions(rows):
    """The rows up to their first answer, where the model goes on, as a batch."""
    return collate([cut(row, answers(row)[0][0]) for row in rows])


def from_scratch(model, row, n):
    """n likeliest tokens, each from a forward pass over everything before it."""
    ids, kind, _, images, _ = questions([row]).values()
    for _ in range(n):
        token = model.llama.lm_head(model.llama(model.splice(ids, kind, images), kind)[None, -1:]).argmax(-1)
        ids, kind = torch.cat((ids, token), dim=1), torch.cat((kind, torch.full_like(token, TEXT)), dim=1)
    return ids[0, -n:]


def test_generated_tokens_are_the_likeliest_of_a_full_forward_pass(model, rows):
    found = generated(model, questions(rows), 8)
    assert torch.equal(found, torch.stack([from_scratch(model, row, 8) for row in rows]))
    assert len(found.unique()) > 8          # not one token over and over, whatever comes before


def test_the_caller_can_stop_and_the_context_ends(model, rows):
    batch = questions(rows[:1])
    assert len(list(islice(generate(model, batch), 2))) == 2
    model.llama.config = replace(model.llama.config, max_position_embeddings=batch["ids"].shape[1] + 3)
    assert generated(model, batch).shape == (1, 3) and generated(model, batch, 2).shape == (1, 2)


def test_two_rounds_with_one_cache_equal_the_whole_at_once(model, rows):
    first, cache = questions([rows[0], rows[2]]), Cache(model.llama, 2, 200)
    said = generated(model, first, 5, cache=cache)          # row 0 begins with two images, row 1 gets one later
    new = [{**cut(row, answers(row)[0][0]), "said": tokens[-1:]} for row, tokens in zip((rows[2], rows[3]), said)]
    second = collate([{**row, "ids": torch.cat((row["said"], row["ids"])),           # the cache lacks the last token
                       "kind": F.pad(row["kind"], (1, 0), value=TEXT)} for row in new])
    found = generated(model, second, 6, cache=cache)
    parts = [{**cut(row, answers(row)[0][0]), "said": tokens} for row, tokens in zip((rows[0], rows[2]), said)]
    whole = [{"ids": torch.cat((part["ids"], part["said"], new["ids"])), "labels": part["labels"],
              "kind": torch.cat((part["kind"], torch.full_like(part["said"], TEXT), new["kind"])),
              "images": torch.cat((part["images"], new["images"]))}
             for part, new in zip(parts, (cut(row, answers(row)[0][0]) for row in (rows[2], rows[3])))]
    assert torch.equal(found, generated(model, collate(whole), 6))


def test_image_tokens_and_what_fills_their_places_are_as_many(model, rows):
    batch = questions(rows)
    ids, kind, lengths, image_kv = batch["ids"], batch["kind"], batch["lengths"], model.image_kv(batch["images"])
    for given in (None, image_kv[:, :, 4:]):
        with pytest.raises(ValueError, match="places"):
            next(model.generate(ids, kind, None, lengths, 8, image_kv=given))
    read = model.llama(model.llama.embed_tokens(ids), kind, None, lengths, image_kv=image_kv)
    assert len(read) == int((kind == TEXT).sum())               # by default all that was given
    model.llama.attention = "causal"
    with pytest.raises(ValueError, match="causal attention"):
        model.image_kv(batch["images"])


def test_keys_and_values_made_once_stand_for_the_images(model, rows):
    batch = questions(rows)
    ids, kind, lengths = batch["ids"], batch["kind"], batch["lengths"]
    found = model.generate(ids, kind, None, lengths, 8, image_kv=model.image_kv(batch["images"]))
    assert torch.equal(torch.stack(list(found), dim=1), generated(model, batch, 8))


def test_sampling_draws_from_the_likeliest_tokens_by_their_chances():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log().expand(20_000, 4)
    for temperature, top_p, expected in ((0, 1, [1, 0, 0, 0]), (1, 1, [.5, .1, .3, .1]), (1, .6, [.625, 0, .375, 0]),
                                         (.5, 1, [25 / 36, 1 / 36, 9 / 36, 1 / 36]), (1, .001, [1, 0, 0, 0]),
                                         (1e-45, 1, [1, 0, 0, 0]), (1e-320, 1, [1, 0, 0, 0])):
        share = choose(logits, temperature, top_p).bincount(minlength=4) / len(logits)
        assert share.tolist() == pytest.approx(expected, abs=0.015)


# ---- folders ----

def trained(model):
    return {name: p for name, p in model.named_parameters() if name in NAMES}


def test_saving_and_loading_gives_the_same_model(overfitted, config, tmp_path):
    model = overfitted[2]
    config = replace(config, attention="causal")
    save(tmp_path / "new/run", trained(model), config)
    again, found = load(tmp_path / "new/run")
    assert found == config and load_file(tmp_path / "new/run" / TRAINED).keys() == NAMES
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == NAMES


@pytest.mark.parametrize("change, message", [
    ({"projection.bias": None}, r"missing projection.bias \(64,\)"),
    ({"projection.scale": torch.ones(1)}, r"unexpected projection.scale \(1,\)"),
    ({"projection.bias": torch.ones(3)}, r"projection.bias is \(3,\), expected \(64,\)")],
    ids=["missing", "extra", "shape"])
def test_loading_is_strict(model, config, tmp_path, change, message):
    save(tmp_path, trained(model), config)
    changed = {name: t.detach() for name, t in (trained(model) | change).items() if t is not None}
    save_file(changed, tmp_path / TRAINED)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_damaged_foreign_and_absent_results_are_named(model, config, tmp_path):
    save(tmp_path, trained(model), config)
    (tmp_path / CONFIG).write_text(json.dumps(vars(config) | {"lora": 8}))
    with pytest.raises(ValueError, match="lora"):
        load(tmp_path)
    (tmp_path / TRAINED).unlink()
    with pytest.raises(FileNotFoundError, match=TRAINED):
        load(tmp_path)
    save(tmp_path, trained(model), config)
    (tmp_path / TRAINED).write_bytes((tmp_path / TRAINED).read_bytes()[:1000])
    with pytest.raises(ValueError, match=TRAINED):
        load(tmp_path)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A working folder without weights, and the snapshots of Hugging Face's cache there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("visualchat.HERE", tmp_path / "code")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf/hub/models--Qwen--Qwen-VL/snapshots"


def test_absent_weights_are_named_with_the_command_that_gets_them(nowhere, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        find("Qwen/Qwen-VL")
    for text in (tmp_path / "weights/Qwen-VL", nowhere, "hf download Qwen/Qwen-VL --local-dir weights/Qwen-VL"):
        assert str(text) in str(error.value)
    with pytest.raises(FileNotFoundError, match="python shapes.py"):
        find("tiny/llama")


def test_weights_beside_the_code_are_found_from_any_folder(nowhere, tmp_path):
    (tmp_path / "code/weights/tiny/llama").mkdir(parents=True)
    (tmp_path / "code/weights/tiny/llama/config.json").touch()
    assert find("tiny/llama") == tmp_path / "code/weights/tiny/llama"


def test_the_newest_snapshot_is_found_and_a_local_folder_before_it(nowhere, tmp_path):
    for name, time in (("new", 2e9), ("old", 1e9)):
        (nowhere / name).mkdir(parents=True)
        (nowhere / name / CONFIG).touch()
        os.utime(nowhere / name, (time, time))
    assert find("Qwen/Qwen-VL") == nowhere / "new"
    (tmp_path / "weights/Qwen-VL").mkdir(parents=True)
    (tmp_path / "weights/Qwen-VL" / CONFIG).touch()
    assert find("Qwen/Qwen-VL").samefile(tmp_path / "weights/Qwen-VL")


def test_unknown_names_are_answered_with_the_known_ones(config):
    with pytest.raises(ValueError, match="no size '8b'; there are tiny, 7b, 13b, 70b"):
        towers(ModelConfig(size="8b"))
    with pytest.raises(ValueError, match="no attention 'full'; there are mmca, causal"):
        build(replace(config, attention="full"))


def test_both_attentions_build_and_differ(config, rows):
    losses = []
    for attention in ("mmca", "causal"):
        torch.manual_seed(0)
        losses.append(build(replace(config, attention=attention))(**collate(rows[:1])))
    assert all(loss.isfinite() for loss in losses) and losses[0] != losses[1]
