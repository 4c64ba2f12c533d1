"""Claims about visualchat.py: images in their slots, the loss, what is trained, generating, saving and finding."""
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from data import Round, collate, encode, to_tensors
from llama import Cache, Tokenizer
from mmca import IMAGE, TEXT
from pixels import normalized
from visualchat import (CONFIG, IGNORE, TEMPLATE, TRAINED, ModelConfig, Sampling, build, choose, load, readable,
                        save, towers, whole_answers)

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


def embed(model, batch):
    return model.embed(batch["ids"], batch["kind"], model.image_tokens(batch["images"]))


# ---- images between words ----

def test_image_1_is_in_the_first_slot_and_swapping_images_swaps_exactly_the_slots(model, rows):
    batch = collate(rows[:1])
    swapped = batch | {"images": batch["images"].flip(0)}
    before, after, slots = embed(model, batch), embed(model, swapped), batch["kind"] == IMAGE
    first, second = before[slots].split(4)
    same(first, model.image_tokens(batch["images"][:1])[0])
    same(after[slots], torch.cat((second, first)))
    assert not torch.allclose(first, second, atol=0.1) and torch.equal(before[~slots], after[~slots])


def test_images_land_in_their_own_rows_and_words_keep_their_embeddings(model, rows):
    batch = collate(rows)
    x, words = embed(model, batch), batch["kind"] == TEXT
    for row, found in zip(rows, x[0].split(batch["lengths"])):
        same(found, embed(model, collate([row]))[0])
    assert torch.equal(x[words], model.llama.embed_tokens.weight[batch["ids"][words]])


@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_wrong_number_of_images_is_refused(model, rows, images):
    with pytest.raises(ValueError, match=f"8 positions for image tokens, but {images} images of 4 tokens"):
        embed(model, collate(rows[:1]) | {"images": torch.zeros(images, 3, 16, 16)})


# ---- the loss ----

def test_a_row_s_losses_are_the_same_alone_and_in_a_mixed_batch(model, rows):
    same(model(**collate(rows))[0], torch.cat([model(**collate([row]))[0] for row in rows]))


def test_losses_are_float32_in_every_precision(model, rows):
    for dtype in (torch.float32, torch.bfloat16):
        assert model.to(dtype)(**collate(rows))[0].dtype == torch.float32


def test_kept_features_stand_for_the_images(model, rows):
    batch = collate(rows)
    kept = {name: x for name, x in batch.items() if name != "images"}
    kept["features"] = model.vit(normalized(batch["images"]))
    same(model(**kept)[0], model(**batch)[0])


def test_loss_is_transformers_cross_entropy(config, model, rows):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(config.llama).eval()
    batch = collate([rows[2]])
    same(model(**batch)[0].mean(), theirs(batch["ids"], labels=batch["labels"]).loss)


BLANK = {"ids": torch.zeros(4, dtype=torch.long), "kind": torch.full((4,), IMAGE),
         "labels": torch.full((4,), IGNORE), "images": torch.zeros(1, 3, 16, 16)}


def test_text_alone_has_losses_and_gradients(model, rows):
    model.freeze()
    losses, _ = model(**collate([rows[2]]))
    losses.sum().backward()
    assert len(losses) and losses.isfinite().all() and model.llama.embed_tokens.weight.grad.any()


def test_a_blank_image_without_text_changes_no_loss_and_has_gradients_of_zero(model, rows):
    """train.py gives one to a batch without images, so that all ranks run the same modules."""
    model.freeze()
    model.projection.bias.data.fill_(1000)                      # large: nothing of it may reach the other losses
    losses, _ = model(**collate([rows[2], BLANK]))
    same(losses, model(**collate([rows[2]]))[0])
    losses.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projection.parameters())
    assert model.half()(**collate([rows[2], BLANK]))[0].isfinite().all()


def test_a_batch_that_is_one_blank_image_loses_nothing_and_has_gradients_of_zero(model):
    model.freeze()
    losses, right = model(**collate([BLANK]))
    losses.sum().backward()
    assert len(losses) == len(right) == 0
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_without_labels_there_are_no_losses_and_gradients_are_finite(model, rows):
    model.freeze()
    batch = collate(rows)
    losses, _ = model(**batch | {"labels": torch.full_like(batch["labels"], IGNORE)})
    losses.sum().backward()
    assert losses.sum() == 0 and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


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
    model.freeze()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == NAMES


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
            whole = whole_answers(batch["labels"], model(**batch)[1]).tolist()
            for (start, end), right in zip(answers(row), whole, strict=True):
                said = generated(model, collate([cut(row, start)]), end - start)
                assert (said[0].tolist() == row["ids"][start:end].tolist()) == right
                results.append(right)
    assert 0 < sum(results) < len(results)


# ---- generating ----

def generate(model, batch, n=512, cache=None, image_kv=None):
    ids, kind, lengths = batch["ids"], batch["kind"], batch["lengths"]
    cache = cache or Cache(model.llama, len(lengths), max(lengths) + n)
    x = embed(model, batch) if image_kv is None else model.llama.embed_tokens(ids)
    return model.generate(model.prefill(x, kind, cache, lengths, image_kv), cache, n)


def generated(model, batch, n=512, cache=None, image_kv=None):
    return torch.stack(list(generate(model, batch, n, cache, image_kv)), dim=1)


def image_kv_of(model, images):
    tokens, cache = model.image_tokens(images).flatten(0, 1)[None], Cache(model.llama, 1, room=0)
    model.llama(tokens, torch.full((1, tokens.shape[1]), IMAGE), cache=cache)
    return cache.newest_images(tokens.shape[1])


def questions(rows):
    """The rows up to their first answer, where the model goes on, as a batch."""
    return collate([cut(row, answers(row)[0][0]) for row in rows])


def from_scratch(model, row, n):
    """n likeliest tokens, each from a forward pass over everything before it."""
    ids, kind, _, images, _ = questions([row]).values()
    for _ in range(n):
        x = model.embed(ids, kind, model.image_tokens(images))
        token = model.llama.lm_head(model.llama(x, kind)[None, -1:]).argmax(-1)
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
    second = collate([{**row, "ids": torch.cat((row["said"], row["ids"])),      # the cache lacks the last token
                       "kind": F.pad(row["kind"], (1, 0), value=TEXT)} for row in new])
    found = generated(model, second, 6, cache=cache)
    parts = [{**cut(row, answers(row)[0][0]), "said": tokens} for row, tokens in zip((rows[0], rows[2]), said)]
    whole = [{"ids": torch.cat((part["ids"], part["said"], new["ids"])), "labels": part["labels"],
              "kind": torch.cat((part["kind"], torch.full_like(part["said"], TEXT), new["kind"])),
              "images": torch.cat((part["images"], new["images"]))}
             for part, new in zip(parts, (cut(row, answers(row)[0][0]) for row in (rows[2], rows[3])))]
    assert torch.equal(found, generated(model, collate(whole), 6))


def test_image_tokens_and_what_fills_their_positions_are_as_many(model, rows):
    batch = questions(rows)
    image_kv, cache = image_kv_of(model, batch["images"]), Cache(model.llama, len(rows), 100)
    with pytest.raises(ValueError, match="positions for image tokens, but 0 images"):
        embed(model, batch | {"images": batch["images"][:0]})
    with pytest.raises(ValueError, match="keys and values of 8 image tokens, expected 12"):
        generate(model, batch, 8, image_kv=image_kv[:, :, :, 4:])
    with torch.no_grad():                                       # as in all that uses a cache
        x = model.llama.embed_tokens(batch["ids"])
        read = model.llama(x, batch["kind"], None, batch["lengths"], cache, image_kv)
    assert len(read) == int((batch["kind"] == TEXT).sum())      # by default all that was computed


def test_keys_and_values_made_once_stand_for_the_images(model, rows):
    batch = questions(rows)
    found = generated(model, batch, 8, image_kv=image_kv_of(model, batch["images"]))
    assert torch.equal(found, generated(model, batch, 8))


def test_the_written_form_gives_the_losses_and_the_answers_of_the_fast_one(model, rows):
    batch, losses, answered = collate(rows), [], []
    for model.llama.attention in ("mmca", "written"):
        losses.append(model(**batch)[0])
        answered.append(generated(model, questions(rows), 8))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=0)
    assert torch.equal(*answered)


def test_the_written_form_runs_the_shipped_towers_to_the_same_losses_and_answers():
    torch.manual_seed(0)
    model, tokenizer = build(ModelConfig()), Tokenizer(towers(ModelConfig())[0])
    examples = [Path(__file__).parent.parent / f"examples/{name}.png" for name in "abc"]
    rounds = [Round(tuple(examples[:2]), "What changed from image 1 to image 2?", "the color"),
              Round((examples[2],), "Describe the image.", "A small yellow star at the top."),
              Round((), "Which image shows a small shape?", "image 3")]
    whole = collate([to_tensors(encode(rounds, tokenizer, 4), 64)])
    asked = collate([to_tensors(encode([*rounds[:2], replace(rounds[2], answer=None)], tokenizer, 4), 64)])
    losses, said = [], []
    for model.llama.attention in ("mmca", "written"):
        losses.append(model(**whole)[0])
        said.append(generated(model, asked, 12))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=0)
    assert torch.equal(*said)


def test_sampling_draws_from_the_likeliest_tokens_by_their_chances():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log().expand(20_000, 4)
    for sampling, expected in ((Sampling(), [1, 0, 0, 0]), (Sampling(1), [.5, .1, .3, .1]),
                               (Sampling(1, top_p=.6), [.625, 0, .375, 0]),
                               (Sampling(1, top_k=2), [.625, 0, .375, 0]),
                               (Sampling(1, top_k=2, top_p=.6), [1, 0, 0, 0]),
                               (Sampling(1, top_k=9), [.5, .1, .3, .1]),
                               (Sampling(.5), [25 / 36, 1 / 36, 9 / 36, 1 / 36]),
                               (Sampling(1, top_p=.001), [1, 0, 0, 0]), (Sampling(1e-45), [1, 0, 0, 0]),
                               (Sampling(1e-320), [1, 0, 0, 0])):
        share = choose(logits, sampling).bincount(minlength=4) / len(logits)
        assert share.tolist() == pytest.approx(expected, abs=0.015)


def test_a_penalty_makes_what_was_said_less_likely_whatever_its_sign():
    logits = torch.tensor([[3.0, 2.0, -1.0], [-0.5, -0.6, -2.0]])
    said = [torch.tensor([0, 0]), torch.tensor([0, 2])]
    assert choose(logits, Sampling(), said).tolist() == [0, 0]
    # 3 / 2 < 2, -0.5 · 2 < -0.6
    assert choose(logits, Sampling(repetition_penalty=2.0), said).tolist() == [1, 1]


@pytest.mark.parametrize("given", [dict(temperature=-1.0), dict(temperature=torch.inf), dict(top_k=-1),
                                   dict(top_p=0.0), dict(top_p=1.1), dict(repetition_penalty=0.0),
                                   dict(top_k=5), dict(top_p=0.5)])
def test_a_way_of_sampling_that_cannot_be_is_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}.*(expected|without a temperature)"):
        Sampling(**given)


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
    (tmp_path / CONFIG).write_text(json.dumps(vars(config) | {"template": TEMPLATE, "lora": 8}))
    with pytest.raises(ValueError, match="lora"):
        load(tmp_path)
    (tmp_path / TRAINED).unlink()
    with pytest.raises(FileNotFoundError, match=TRAINED):
        load(tmp_path)
    save(tmp_path, trained(model), config)
    (tmp_path / TRAINED).write_bytes((tmp_path / TRAINED).read_bytes()[:1000])
    with pytest.raises(ValueError, match=TRAINED):
        load(tmp_path)


def test_a_result_of_another_prompt_template_is_refused(model, config, tmp_path):
    save(tmp_path, trained(model), config)
    written = json.loads((tmp_path / CONFIG).read_text())
    for version, changed in ((1, {name: x for name, x in written.items() if name != "template"}),
                             (3, written | {"template": 3})):
        (tmp_path / CONFIG).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"was trained with version {version} of the prompt template, and "
                                             f"this code has version {TEMPLATE}: train it again"):
            load(tmp_path)


@pytest.mark.parametrize("change, said", [
    ({"size": 3}, "unknown setting 'size': 3"), ({"size": "8b"}, "'size': '8b'; .* sizes tiny, 7b, 13b, 70b"),
    ({"attention": []}, "unknown setting 'attention'"), ({"vit": 7}, "unknown setting 'vit': 7"),
    ({"llama": "/nowhere"}, "llama is '/nowhere', no folder of weights: mend it"), ({"x" * 10 ** 6: ""}, "'xxx")])
def test_each_setting_of_a_result_is_checked(model, config, tmp_path, change, said):
    save(tmp_path, trained(model), config)
    written = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(written | change))
    with pytest.raises((ValueError, OSError), match=f"{tmp_path / CONFIG}: .*{said}") as raised:
        load(tmp_path)
    assert len(str(raised.value)) < 1000


def test_the_towers_of_a_result_are_found_from_any_working_folder(model, config, tmp_path, monkeypatch):
    here = Path(config.llama).parent
    monkeypatch.chdir(here)
    save(tmp_path, trained(model), replace(config, llama=Path(config.llama).name))
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path)[1].llama == config.llama


def test_unknown_names_are_answered_with_the_known_ones(config):
    with pytest.raises(ValueError, match="no size '8b'; there are tiny, 7b, 13b, 70b"):
        towers(ModelConfig(size="8b"))
    with pytest.raises(ValueError, match="no attention 'full'; there are mmca, causal, written"):
        build(replace(config, attention="full"))


def test_both_attentions_build_and_differ(config, rows):
    losses = []
    for attention in ("mmca", "causal"):
        torch.manual_seed(0)
        losses.append(build(replace(config, attention=attention))(**collate(rows[:1]))[0])
    assert all(loss.isfinite().all() for loss in losses) and not torch.allclose(*losses)
