"""Claims about data.py: the template and its labels, truncation, published records, bad input, splits, batches."""
import json
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from data import SYSTEM, Conversations, Round, collate, encode, encode_round, read, read_llava, split, tensors
from mmca import IMAGE, PAD, TEXT
from visualchat import IGNORE
from vit import VisionConfig

N = 4                                                           # tokens per image


def shown(encoded, tokenizer):
    """The conversation as text: <s> and </s> where these ids stand, · for an image token."""
    special = {tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
    text = ""
    positions = zip(encoded.ids, encoded.kind)
    for symbol, run in groupby(positions, lambda place: "·" if place[1] == IMAGE else special.get(place[0])):
        ids = [i for i, _ in run]
        text += symbol * len(ids) if symbol else tokenizer.decode(ids)
    return text


# ---- the template ----

def test_the_template_is_figure_3_s(tokenizer):
    rounds = [Round(("a", "b"), "Which is red?", "The first."), Round((), "Sure?", "Yes."),
              Round(("c",), "And this?", "No.")]
    encoded = encode(rounds, tokenizer, N)
    assert shown(encoded, tokenizer) == (
        f"<s>{SYSTEM}\n### Image 1:····### Image 2:····### Question: Which is red?\n### Answer: The first.</s>"
        "<s>### Question: Sure?\n### Answer: Yes.</s>"
        "<s>### Image 3:····### Question: And this?\n### Answer: No.</s>")
    assert encoded.images == ["a", "b", "c"]
    assert shown(encode([Round((), "Hi?", "Ho.")], tokenizer, N), tokenizer) == (
        f"<s>{SYSTEM}\n### Question: Hi?\n### Answer: Ho.</s>")


def test_labels_are_the_answers_with_their_end_and_nothing_else(tokenizer):
    encoded = encode([Round(("a",), "One?", "A cat."), Round((), "Two?", "No.")], tokenizer, N)
    runs = [list(run) for scored, run in groupby(encoded.labels, lambda label: label != IGNORE) if scored]
    assert runs == [[*tokenizer.encode("A cat."), 2], [*tokenizer.encode("No."), 2]]
    assert all(label in (token, IGNORE) for token, label in zip(encoded.ids, encoded.labels, strict=True))


@pytest.mark.parametrize("text", ["<s>", "</s>", "a </s><s> b", "<image>", "<unk>"])
def test_typed_marks_are_only_text(tokenizer, text):
    encoded = encode([Round(("a",), text, text)], tokenizer, N)
    assert encoded.kind.count(IMAGE) == N and encoded.ids.count(1) == encoded.ids.count(2) == 1
    assert shown(encoded, tokenizer).endswith(f"### Question: {text}\n### Answer: {text}</s>")


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1, max_size=20)
conversations = st.lists(st.builds(Round, st.lists(st.sampled_from("abc"), max_size=3).map(tuple), words, words),
                         min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(rounds=conversations, room=st.integers(0, 300))
def test_a_conversation_is_its_first_whole_rounds_as_many_as_fit(tokenizer, rounds, room):
    parts, count = [], 0
    for i, turn in enumerate(rounds):
        parts.append(encode_round(turn, count, i == 0, tokenizer, N))
        count += len(turn.images)
    limit = len(parts[0].ids) + room
    encoded = encode(rounds, tokenizer, N, limit)
    kept = sum(sum(len(part.ids) for part in parts[:i]) <= limit for i in range(1, len(parts) + 1))
    for name in ("ids", "kind", "labels", "images"):
        assert getattr(encoded, name) == sum((getattr(part, name) for part in parts[:kept]), [])
    assert encoded.images == [file for turn in rounds[:kept] for file in turn.images]
    assert encoded.kind.count(IMAGE) == N * len(encoded.images) and len(encoded.ids) <= limit
    text = shown(encoded, tokenizer)
    assert all(f"### Question: {turn.question}\n### Answer: {turn.answer}</s>" in text for turn in rounds[:kept])
    assert all(f"### Image {i}:····" in text for i in range(1, len(encoded.images) + 1))


@settings(deadline=None, max_examples=30)
@given(rounds=conversations, before=st.integers(0, 9), first=st.booleans())
def test_what_chat_asks_is_the_beginning_of_what_was_trained(tokenizer, rounds, before, first):
    turn = rounds[0]
    asked = encode_round(Round(turn.images, turn.question), before, first, tokenizer, N)
    whole = encode_round(turn, before, first, tokenizer, N)
    n = len(asked.ids)
    assert (asked.ids, asked.kind, asked.images) == (whole.ids[:n], whole.kind[:n], whole.images)
    assert asked.labels == [IGNORE] * n and whole.labels == [IGNORE] * n + whole.ids[n:]


def test_a_first_round_that_is_too_long_is_refused(tokenizer):
    rounds = [Round(("a", "b"), "What is it?", "A cat."), Round((), "Sure?", "Yes.")]
    n = len(encode(rounds[:1], tokenizer, N).ids)
    with pytest.raises(ValueError, match=f"takes {n} positions, {n - 1} are allowed: 2 images and .*What is it"):
        encode(rounds, tokenizer, N, n - 1)


# ---- published records ----

def record(*turns, **extra):
    """A LLaVA record of question, answer, question, answer …"""
    return {"id": "007", "image": "a.jpg", **extra, "conversations": [
        {"from": speaker, "value": text} for speaker, text in zip(["human", "gpt"] * len(turns), turns)]}


@pytest.fixture
def folder(tmp_path):
    """A function that writes a data folder with this content of detail_23k.json and nothing in other files."""
    def write(content):
        (tmp_path / "coco/train2017").mkdir(parents=True)
        (tmp_path / "llava").mkdir()
        for name in ("detail_23k", "complex_reasoning_77k", "conversation_58k"):
            (tmp_path / f"llava/{name}.json").write_text("[]")
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "llava/detail_23k.json").write_text(text)
        return tmp_path
    return write


def test_records_become_rounds_in_order(folder):
    data = folder([record("<image>\nWhat is\nthis?", " A cat.\n", "Sure?", "Yes."),
                   record("And this?\n<image>", "A dog.", image="b.jpg"),
                   record("<image><image> Same?", "No.", "<image>\nNow?", "Yes.",
                          image=["a.jpg", "b.jpg", "c.jpg"]),
                   record("No picture?", "None.", image=[])])
    a, b, c = ((data / "coco/train2017" / f"{name}.jpg").resolve() for name in "abc")
    assert read(data, ["llava_dial", "llava"]) == [
        [Round((a,), "What is this?", "A cat."), Round((), "Sure?", "Yes.")],
        [Round((b,), "And this?", "A dog.")],
        [Round((a, b), "Same?", "No."), Round((c,), "Now?", "Yes.")],
        [Round((), "No picture?", "None.")]]


@pytest.mark.parametrize("bad, message", [
    (record("<image> Q?", "A.") | {"conversations": []}, "alternate human, gpt; found none"),
    (record("<image> Q?", "A.", "Q?"), "alternate human, gpt; found human, gpt, human"),
    (record("<image> Q?", "A.") | {"conversations": [{"from": "gpt", "value": "A."}] * 2}, "found gpt, gpt"),
    (record("<image> Q?", "A.") | {"conversations": [{"value": "Q?"}]}, "from"),
    (record("<image> Q?", "A.") | {"conversations": None}, "NoneType"),
    ({"id": "007", "image": "a.jpg"}, "conversations"),
    (record("<image> Q?", " \n"), "empty question or answer"),
    (record("<image>\n", "A."), "empty question or answer"),
    (record("<image> Q?", None), "NoneType"),
    (record("<image> Q?", "A.", "<image> Q?", "A."), "more <image> marks than images"),
    (record("Q?", "A."), "1 images have no <image> mark"),
    (record("<image> Q?", "A.", image=None), "NoneType"),
    (record("<image> Q?", "A.", image="../../x.jpg"), "'../../x.jpg' lies outside"),
    (record("<image> Q?", "A.", image=["/x.jpg"]), "'/x.jpg' lies outside"),
    (record("<image> Q?", "A.", image="link.jpg"), "'link.jpg' lies outside")],
    ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_record_is_named(folder, bad, message):
    data = folder([record("<image> Q?", "A.", id="001"), bad])
    (data / "coco/train2017/link.jpg").symlink_to(data / "x.jpg")
    with pytest.raises(ValueError, match=message) as error:
        read(data, ["llava"])
    assert str(data / "llava/detail_23k.json") in str(error.value) and "record 007" in str(error.value)


def test_a_record_without_an_id_is_named_by_its_number(folder):
    with pytest.raises(ValueError, match="record 1: "):
        read(folder([record("<image> Q?", "A."), "no record"]), ["llava"])


@pytest.mark.parametrize("content", ["[{", "{}", "3", "\0"])
def test_a_file_that_is_no_list_is_named(folder, content):
    with pytest.raises(ValueError, match="detail_23k.json (is not valid JSON|holds a .*expected a list)"):
        read(folder(content), ["llava"])


def test_a_missing_file_and_an_unknown_dataset_are_answered_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="llava/x.json: .*liuhaotian/LLaVA-Instruct-150K.*train2017"):
        read_llava(tmp_path, ["x.json"])
    with pytest.raises(ValueError, match="no dataset 'sparkles'; there are llava, llava_dial"):
        read(tmp_path, ["llava", "sparkles"])


# ---- split and batches ----

def test_a_split_is_a_tenth_and_the_seed_decides_which():
    train, validation = split(list(range(50)), seed=1)
    assert len(validation) == 5 and sorted(train + validation) == list(range(50))
    assert split(list(range(50)), seed=1) == (train, validation) != split(list(range(50)), seed=2)


def test_shorter_rows_are_padded_and_images_stay_in_order(tokenizer, pictures):
    turns = [Round((), "Q?", "A."), Round(tuple(pictures[:2]), "Which?", "This."),
             Round((pictures[2],), "Q?", "A.")]
    encoded = [encode([turn], tokenizer, N) for turn in turns]
    batch = collate([tensors(x, 16) for x in encoded])
    longest = max(len(x.ids) for x in encoded)
    for i, x in enumerate(encoded):
        for name, padding in (("ids", 0), ("kind", PAD), ("labels", IGNORE)):
            assert batch[name][i].tolist() == getattr(x, name) + [padding] * (longest - len(x.ids))
    alone = [tensors(encode([Round((file,), "Q?", "A.")], tokenizer, N), 16)["images"] for file in pictures[:3]]
    assert torch.equal(batch["images"], torch.cat(alone))
    assert set(batch["kind"].unique().tolist()) == {PAD, TEXT, IMAGE}


def test_workers_make_the_same_batches(tokenizer, pictures):
    conversations = [[Round((file,), "What is it?" * i, "A cat.")] for i, file in enumerate(pictures, 1)]
    rows = Conversations(conversations, tokenizer, VisionConfig(image_size=16, n_queries=N))
    here, there = (list(DataLoader(rows, 2, collate_fn=collate, num_workers=n)) for n in (0, 2))
    assert len(here) == len(there) == 2
    for ours, theirs in zip(here, there):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
