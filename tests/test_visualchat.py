"""Claims about visualchat.py: images in their slots, the loss, what is trained, generating, saving and finding."""
import copy
import json
import os
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from data import Round, collate, encode, tensors
from mmca import IMAGE, TEXT
from visualchat import CONFIG, IGNORE, TRAINED, ModelConfig, build, find, load, readable, save, towers, whole_answers

NAMES = {"projection.weight", "projection.bias", "llama.embed_tokens.weight"}


@pytest.fixture(scope="session")
def rows(tokenizer, pictures):
    """Conversations with two images in one round, one image in a later round, and none; of different lengths."""
    a, b, c, d = pictures
    told = [[Round((a, b), "Which is it?", "A cat.")],
            [Round((), "What is it?", "Question 1."), Round((c,), "What is image 1?", "You look at it.")],
            [Round((), "Is it a cat?", "A question.")],
            [Round((d,), "What is image 1?", "Answer: images.")]]
    return [tensors(encode(rounds, tokenizer, 4), 16) for rounds in told]


def same(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


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
    assert (first - second).abs().min(dim=1).values.max() > 1e-3 and torch.equal(before[~places], after[~places])


def test_images_land_in_the_rows_that_they_belong_to(model, rows):
    x = splice(model, collate(rows))
    for row, found in zip(rows, x):
        same(found[:len(row["ids"])], splice(model, collate([row]))[0])


def test_words_keep_their_embeddings(model, rows):
    batch = collate(rows)
    words = batch["kind"] == TEXT
    assert torch.equal(splice(model, batch)[words], model.llama.embed_tokens.weight[batch["ids"][words]])


@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_wrong_number_of_images_is_refused(model, rows, images):
    with pytest.raises(ValueError, match=f"8 places for image tokens, but {images} images of 4 tokens each"):
        splice(model, collate(rows[:1]) | {"images": torch.zeros(images, 3, 16, 16)})


# ---- the loss ----

def test_a_row_s_losses_are_the_same_alone_and_in_a_mixed_batch(model, rows):
    together, alone = model.score(**collate(rows))[0], [model.score(**collate([row]))[0] for row in rows]
    same(together, torch.cat(alone))


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
    labels = torch.tensor([[IGNORE, *(7 if s else IGNORE for s in row[1:])] for row in scored])   # <s> is never scored
    right = data.draw(st.lists(st.booleans(), min_size=int((labels == 7).sum()), max_size=int((labels == 7).sum())))
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
    counts = [sum(p.numel() for p in parameters) for parameters in
              ([p for p in model.parameters() if p.requires_grad], model.parameters())]
    assert line == f"trainable {readable(counts[0])} of {readable(counts[1])}"


@pytest.mark.parametrize("count, text", [(16_781_312, "16.8 M"), (8_670_000_000, "8.67 B"), (1234, "1,234")])
def test_counts_are_readable(count, text):
    assert readable(count) == text


@pytest.fixture(scope="module")
def overfitted(config, rows):
    """The model before, when the first but not all answers were right, and at the end; its last loss."""
    torch.manual_seed(0)
    model, batch, halfway = build(config), collate(rows), None
    before = copy.deepcopy(model)
    model.freeze()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2, (0.0, 0.95), weight_decay=0)
    for _ in range(300):
        losses, right = model.score(**batch)
        whole = whole_answers(batch["labels"], right)
        if halfway is None and whole.any() and not whole.all():
            halfway = copy.deepcopy(model)
        if losses.mean() < 0.05:
            break
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return before, halfway, model, losses.mean().item()


def test_a_batch_can_be_overfitted(overfitted):
    assert overfitted[-1] < 0.05


def test_training_changes_what_is_trained_and_nothing_else(overfitted):
    before, _, after, _ = overfitted
    changed = {name for (name, old), new in zip(before.named_parameters(), after.parameters()) if not torch.equal(old, new)}
    assert changed == NAMES


def test_all_tokens_likeliest_means_that_greedy_decoding_gives_the_answer(overfitted, rows):
    results = []
    for model in overfitted[:3]:
        for row in rows:
            batch = collate([row])
            whole = whole_answers(batch["labels"], model.score(**batch)[1]).tolist()
            scored = (row["labels"] != IGNORE).int()
            starts, ends = ((scored.diff() == step).nonzero().flatten() + 1 for step in (1, -1))
            for start, end, right in zip(starts, [*ends.tolist(), len(scored)], whole):
                places = int((row["kind"][:start] == IMAGE).sum())
                said = torch.cat(list(model.generate(row["ids"][None, :start], row["kind"][None, :start],
                                                     row["images"][:places // 4], int(end - start))))
                assert torch.equal(said, row["ids"][start:end]) == right
                results.append(right)
    assert 0 < sum(results) < len(results)


# ---- generating ----

def questions(rows):
    """The rows up to their first answer, so that they end where the model goes on; padded by collate."""
    return collate([{name: row[name][:(row["labels"] != IGNORE).int().argmax()] for name in ("ids", "kind", "labels")}
                    | {"images": row["images"]} for row in rows])


def from_scratch(model, row, n):
    """n likeliest tokens, each from a forward pass over everything before it."""
    ids, kind = (row[name][:(row["labels"] != IGNORE).int().argmax()][None] for name in ("ids", "kind"))
    for _ in range(n):
        token = model.llama.lm_head(model.llama(model.splice(ids, kind, row["images"]), kind)[:, -1]).argmax(-1)
        ids, kind = torch.cat((ids, token[None]), dim=1), torch.cat((kind, torch.tensor([[TEXT]])), dim=1)
    return ids[0, -n:]


def generate(model, batch, **options):
    return model.generate(batch["ids"], batch["kind"], batch["images"], **options)


def test_generated_tokens_are_the_likeliest_of_a_full_forward_pass(model, rows):
    some = [rows[0], rows[2], rows[3]]                          # every image stands before the first answer
    found = torch.stack(list(generate(model, questions(some), max_new_tokens=8)), dim=1)
    assert torch.equal(found, torch.stack([from_scratch(model, row, 8) for row in some]))
    assert len(found.unique()) > 8                              # not one token over and over, whatever comes before


def test_the_caller_can_stop_and_the_context_ends(model, rows):
    batch = questions(rows[:1])
    assert len(list(islice(generate(model, batch), 2))) == 2
    room = batch["ids"].shape[1] + 3
    model.llama.config = replace(model.llama.config, max_position_embeddings=room)
    assert len(list(generate(model, batch))) == 3 and len(list(generate(model, batch, max_new_tokens=2))) == 2


def test_two_rounds_with_one_cache_equal_the_whole_at_once(model, rows):
    first, second, cache = questions([rows[0], rows[2]]), questions([rows[3], rows[0]]), {}
    said = torch.stack(list(generate(model, first, max_new_tokens=5, cache=cache)), dim=1)
    ids = torch.cat((first["ids"], said, second["ids"]), dim=1)
    kind = torch.cat((first["kind"], torch.full_like(said, TEXT), second["kind"]), dim=1)
    images = torch.cat((first["images"], second["images"]))     # row 0 has images 1, 2 and then d; row 1 later a, b
    together = list(model.generate(ids, kind, images[[0, 1, 2, 3, 4]], 6))
    apart = list(model.generate(second["ids"], kind, second["images"], 6, cache))
    assert torch.equal(torch.stack(together), torch.stack(apart))


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
    ({"projection.bias": torch.ones(3)}, r"projection.bias is \(3,\), expected \(64,\)")], ids=lambda x: str(x)[:12])
def test_loading_is_strict(model, config, tmp_path, change, message):
    save(tmp_path, trained(model), config)
    save_file({name: t.detach() for name, t in (trained(model) | change).items() if t is not None}, tmp_path / TRAINED)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_damaged_result_is_named(model, config, tmp_path):
    save(tmp_path, trained(model), config)
    (tmp_path / TRAINED).write_bytes((tmp_path / TRAINED).read_bytes()[:1000])
    with pytest.raises(ValueError, match=TRAINED):
        load(tmp_path)


def test_unknown_settings_and_absent_files_are_named(model, config, tmp_path):
    save(tmp_path, trained(model), config)
    (tmp_path / CONFIG).write_text(json.dumps(vars(config) | {"lora": 8}))
    with pytest.raises(ValueError, match="lora"):
        load(tmp_path)
    (tmp_path / TRAINED).unlink()
    with pytest.raises(FileNotFoundError, match=TRAINED):
        load(tmp_path)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A working folder without weights, and the snapshots of Hugging Face's cache there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf/hub/models--Qwen--Qwen-VL/snapshots"


def test_absent_weights_are_named_with_the_command_that_gets_them(nowhere, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        find("Qwen/Qwen-VL")
    for text in (tmp_path / "weights/Qwen-VL", nowhere, "hf download Qwen/Qwen-VL --local-dir weights/Qwen-VL"):
        assert str(text) in str(error.value)
    with pytest.raises(FileNotFoundError, match="python shapes.py"):
        find("tiny/llama")


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
