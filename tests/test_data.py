"""Claims about data.py: the template and its labels, truncation, the order, batches."""
from io import BytesIO
from itertools import combinations, groupby

import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from data import (SYSTEM, Conversation, Conversations, Round, collate, encode, encode_round, line_ids, order, pack,
                  split, to_tensors)
from llama import Tokenizer
from mmca import IMAGE, TEXT
from sources import marked
from visualchat import IGNORE
from vit import VisionConfig
from weights import find_weights

N = 4                                                           # tokens per image


def shown(encoded, tokenizer):
    """The conversation as text: <s> and </s> where these ids stand, · for an image token."""
    special = {tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
    text = ""
    positions = zip(encoded.ids, encoded.kind)
    for symbol, run in groupby(positions, lambda pair: "·" if pair[1] == IMAGE else special.get(pair[0])):
        ids = [i for i, _ in run]
        text += symbol * len(ids) if symbol else tokenizer.decode(ids)
    return text


# ---- the template ----

def test_the_template_is_figure_3_s(tokenizer):
    rounds = [Round(("a", "b"), "Which is red?", "The first."), Round((), "Sure?", "Yes."),
              Round(("c",), "And this?", "No.")]
    encoded = encode(rounds, tokenizer, N)
    assert shown(encoded, tokenizer) == (
        "<s>You are a powerful vision-language assistant.\n"
        "### Image 1:····\n"
        "### Image 2:····\n"
        "### Question: Which is red?\n"
        "### Answer: The first.</s><s>\n"
        "### Question: Sure?\n"
        "### Answer: Yes.</s><s>\n"
        "### Image 3:····\n"
        "### Question: And this?\n"
        "### Answer: No.</s>")
    assert encoded.images == ["a", "b", "c"]
    assert shown(encode([Round((), "Hi?", "Ho.")], tokenizer, N), tokenizer) == (
        f"<s>{SYSTEM}\n### Question: Hi?\n### Answer: Ho.</s>")


def test_the_same_line_has_the_same_ids_wherever_it_stands(tokenizer):
    """In the first round and later ones, after the system sentence, an image or an answer."""
    def lines(rounds: list[Round]) -> list[tuple]:
        """The ids of each line that begins with ###; an image ends a line, and so do <s> and </s>."""
        encoded, found = encode(rounds, tokenizer, N), []
        for id, kind in zip(encoded.ids, encoded.kind):
            if id == line_break or kind == IMAGE or id in (tokenizer.bos, tokenizer.eos):
                found.append([])
            if kind != IMAGE:
                found[-1].append(id)
        return [tuple(line) for line in found if line[:1] == [line_break]]

    line_break, same = tokenizer.encode("\n")[-1], Round(("a", "b"), "What is it?", "A cat.")
    one, other = Round((), "Is it?", "Yes"), Round((), "What is it?", "A cat.")
    first, second, third = (lines([*before, same])[-4:] for before in ([], [other], [one, other]))
    assert first == second == third and len(set(first)) == 4
    images = lines([Round(("a",) * 5, "What?", "A cat.")])[:5]
    assert len({line[:3] for line in images}) == 1 and len(set(images)) == 5


@pytest.mark.parametrize("text", ["### Question: What is it?", "### Image 1:", " two  spaces ", ""])
def test_a_line_has_the_ids_that_it_has_inside_a_longer_text(tokenizer, text):
    whole = tokenizer.encode(f"A cat.\n{text}")
    assert tokenizer.encode("A cat.") + line_ids(text, tokenizer) == whole


def test_the_table_that_explains_a_round_is_true():
    tokenizer = Tokenizer(find_weights("tiny/llama"))
    encoded = encode_round(Round(("file",), "Which shape?", "star"), 1, False, tokenizer, 3)
    rows = [line.split() for line in encode_round.__doc__.splitlines() if line.startswith(" " * 8)]
    tokens, ids, kind, labels = ([*row[1:]] for row in rows)
    assert [row[0] for row in rows] == ["token", "ids", "kind", "labels"]
    assert ids == [str(id) for id in encoded.ids]
    assert kind == ["I" if number == IMAGE else "T" for number in encoded.kind]
    assert labels == ["-" if label == IGNORE else str(label) for label in encoded.labels]
    words = {tokenizer.bos: "<s>", tokenizer.eos: "</s>", tokenizer.encode("a\nb")[-2]: "↵"}
    assert tokens == ["·" if number == IMAGE else words.get(id) or tokenizer.decode([id])
                      for id, number in zip(encoded.ids, encoded.kind)]


def test_a_marked_conversation_shows_images_by_their_files_and_what_is_learned(tokenizer):
    rounds = [Round(("a.jpg", "b.jpg"), "What is it?", "A cat."), Round(("c.jpg",), "Sure?", "Yes.")]
    assert marked(encode(rounds, tokenizer, N), tokenizer) == (
        f"<s>{SYSTEM}\n### Image 1:<a.jpg>\n### Image 2:<b.jpg>\n### Question: What is it?\n"
        "### Answer:[[A cat.</s>]]"
        "<s>\n### Image 3:<c.jpg>\n### Question: Sure?\n### Answer:[[Yes.</s>]]")


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
    for i, round_ in enumerate(rounds):
        parts.append(encode_round(round_, count, i == 0, tokenizer, N))
        count += len(round_.images)
    limit = len(parts[0].ids) + room
    encoded = encode(rounds, tokenizer, N, limit)
    kept = sum(sum(len(part.ids) for part in parts[:i]) <= limit for i in range(1, len(parts) + 1))
    for name in ("ids", "kind", "labels", "images"):
        assert getattr(encoded, name) == sum((getattr(part, name) for part in parts[:kept]), [])
    assert encoded.images == [file for round_ in rounds[:kept] for file in round_.images]
    assert encoded.kind.count(IMAGE) == N * len(encoded.images) and len(encoded.ids) <= limit
    text = shown(encoded, tokenizer)
    assert all(f"### Question: {round_.question}\n### Answer: {round_.answer}</s>" in text
               for round_ in rounds[:kept])
    assert all(f"### Image {i}:····" in text for i in range(1, len(encoded.images) + 1))


def test_what_the_limit_cuts_is_counted(tokenizer):
    rounds = [Round(("a",), "What is it?", "A cat."), Round((), "What is image 1?", "A question.")]
    first, both = (len(encode(rounds[:n], tokenizer, N).ids) for n in (1, 2))
    many = [Conversation("one", rounds), Conversation("short", rounds[:1]), Conversation("three", rounds + rounds)]
    vision = VisionConfig(n_queries=N)
    found = {limit: Conversations(many, tokenizer, vision, limit).cut(range(3)).tolist()
             for limit in (first - 1, first, both, 500)}
    assert found == {first - 1: [0, 0, 3], first: [2, 1 + 3, 0], both: [1, 2, 0], 500: [0, 0, 0]}


@settings(deadline=None, max_examples=30)
@given(rounds=conversations, before=st.integers(0, 9), first=st.booleans())
def test_what_chat_asks_is_the_beginning_of_what_was_trained(tokenizer, rounds, before, first):
    round_ = rounds[0]
    asked = encode_round(Round(round_.images, round_.question), before, first, tokenizer, N)
    whole = encode_round(round_, before, first, tokenizer, N)
    n = len(asked.ids)
    assert (asked.ids, asked.kind, asked.images) == (whole.ids[:n], whole.kind[:n], whole.images)
    assert asked.labels == [IGNORE] * n and whole.labels == [IGNORE] * n + whole.ids[n:]


def test_a_conversation_without_a_round_is_refused(tokenizer):
    with pytest.raises(ValueError, match="a conversation without a round"):
        encode([], tokenizer, 4)


def test_a_first_round_that_is_too_long_is_refused(tokenizer):
    rounds = [Round(("a", "b"), "What is it?", "A cat."), Round((), "Sure?", "Yes.")]
    n = len(encode(rounds[:1], tokenizer, N).ids)
    with pytest.raises(ValueError, match=f"takes {n} positions, .* allow {n - 1}: 2 images and .*What is it"):
        encode(rounds, tokenizer, N, n - 1)


# ---- order and batches ----

def test_a_split_is_a_tenth_and_the_seed_decides_which():
    train, validation = split(list(range(50)), seed=1)
    assert len(validation) == 5 and sorted(train + validation) == list(range(50))
    assert split(list(range(50)), seed=1) == (train, validation) != split(list(range(50)), seed=2)


def test_a_batch_holds_conversations_one_after_the_other_and_images_in_order(tokenizer, image_files):
    rounds = [Round((), "Q?", "A."), Round(tuple(image_files[:2]), "Which?", "This."),
              Round((image_files[2],), "Q?", "A.")]
    encoded = [encode([round_], tokenizer, N) for round_ in rounds]
    batch = collate([to_tensors(x, 16) for x in encoded])
    assert batch["lengths"] == [len(x.ids) for x in encoded]
    for name in ("ids", "kind", "labels"):
        assert batch[name].tolist() == [sum((getattr(x, name) for x in encoded), [])]
    alone = [to_tensors(encode([Round((file,), "Q?", "A.")], tokenizer, N), 16)["images"]
             for file in image_files[:3]]
    assert torch.equal(batch["images"], torch.cat(alone))
    assert set(batch["kind"].unique().tolist()) == {TEXT, IMAGE}


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_packing_keeps_every_conversation_whole_and_fills_what_it_can(lengths):
    examples = [{name: torch.full((length,), i) for name in ("ids", "kind", "labels")}
                | {"images": torch.full((i % 3, 1), i)} for i, length in enumerate(lengths)]
    batches = pack(examples, 50)
    seen = []
    for batch in batches:
        assert sum(batch["lengths"]) <= 50 or len(batch["lengths"]) == 1
        parts = batch["ids"][0].split(batch["lengths"])
        seen += [(int(part[0]), len(part), len(part.unique())) for part in parts]
        assert batch["images"][:, 0].tolist() == [i for i, *_ in (seen[-len(parts):]) for _ in range(i % 3)]
    assert sorted(seen) == [(i, length, 1) for i, length in enumerate(lengths)]
    fits = [sum(batch["lengths"]) for batch in batches if sum(batch["lengths"]) <= 50]
    assert all(a + b > 50 for a, b in combinations(fits, 2))            # no two batches could be one


@settings(deadline=None, max_examples=100)
@given(n=st.integers(0, 60), seed=st.integers(0, 5), epoch=st.integers(0, 5), ranks=st.integers(1, 5))
def test_ranks_share_an_epoch_and_take_the_same_at_the_same_time(n, seed, epoch, ranks):
    whole = order(n, seed, epoch)
    assert sorted(whole) == list(range(n))
    parts = [order(n, seed, epoch, rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {n // ranks}
    assert [index for step in zip(*parts) for index in step] == whole[:n // ranks * ranks]
    assert n < 10 or whole != order(n, seed, epoch + 1) != order(n, seed + 1, epoch + 1)


def conversations_about(files):
    return [Conversation(f"record {i}", [Round((file,), "What is it?" * i, "A cat.")])
            for i, file in enumerate(files, 1)]


def test_an_unusable_conversation_is_named_or_replaced_and_counted(tokenizer, image_files, tmp_path, capsys):
    broken, bomb, vision = tmp_path / "broken.jpg", tmp_path / "bomb.png", VisionConfig(image_size=16, n_queries=N)
    file = BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "JPEG")
    broken.write_bytes(file.getvalue()[:300])
    Image.new("1", (20000, 20000)).save(bomb)
    conversations = conversations_about([image_files[0], broken, bomb, tmp_path / "gone.png", image_files[1]])
    examples = Conversations(conversations, tokenizer, vision)
    for index, file in ((1, broken), (2, bomb), (3, tmp_path / "gone.png")):
        with pytest.raises(ValueError, match=f"record {index + 1}: .*{file.name}.*--skip-bad"):
            examples[index]
    examples = Conversations(conversations, tokenizer, vision, skip_bad=True)
    list(DataLoader(examples, 1, sampler=[0, 2], num_workers=2, collate_fn=collate))
    assert [*examples.skipped] == [0, 0, 1, 1, 0]                   # marked by the workers, too
    assert torch.equal(examples[1]["ids"], examples[4]["ids"])
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["skipped record 2"]
    assert [*examples.skipped] == [0, 1, 1, 1, 0] and len(list(examples)) == 5
    with pytest.raises(ValueError, match="none of the conversations"):
        Conversations(conversations[1:3], tokenizer, vision, skip_bad=True)[0]


def test_workers_make_the_same_batches(tokenizer, image_files):
    conversations = conversations_about(image_files)
    examples = Conversations(conversations, tokenizer, VisionConfig(image_size=16, n_queries=N))
    here, there = (list(DataLoader(examples, 2, collate_fn=collate, num_workers=n)) for n in (0, 2))
    assert len(here) == len(there) == 2
    for ours, theirs in zip(here, there):
        assert ours.pop("lengths") == theirs.pop("lengths") and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
