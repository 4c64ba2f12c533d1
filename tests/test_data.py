"""Claims about data.py: the template and its labels, truncation, nine published formats, bad input, batches."""
import base64
import json
import os
import subprocess
import sys
from io import BytesIO
from itertools import combinations, groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import data as data_module
from data import (RECIPES, SOURCES, SYSTEM, TAGS, Conversation, Conversations, Features, Round, collate, encode,
                  encode_round, open_picture, order, pack, packed, read, scan, split, tensors)
from mmca import IMAGE, TEXT
from visualchat import IGNORE
from vit import VisionConfig, open_image

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
    with pytest.raises(ValueError, match=f"takes {n} positions, .* allow {n - 1}: 2 images and .*What is it"):
        encode(rounds, tokenizer, N, n - 1)


# ---- published records ----

PICTURE = BytesIO()
Image.new("RGB", (3, 2), "red").save(PICTURE, "PNG")
NAMES = [*SOURCES]


@pytest.fixture
def folder(tmp_path):
    """A function that writes files into a data folder: text as it is, bytes as they are, all else as JSON."""
    def write(**files):
        for name, content in {"coco/train2017/.keep": "", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path
    return write


def pictures_in(place, *names):
    return {f"{place}/{name}": PICTURE.getvalue() for name in names}


def rounds_of(data, *names, **settings):
    return [talk.rounds for talk in read(data, names, **settings)]


def record(*turns, **extra):
    """A LLaVA record of question, answer, question, answer …"""
    return {"id": "007", "image": "a.jpg", **extra, "conversations": [
        {"from": speaker, "value": text} for speaker, text in zip(["human", "gpt"] * len(turns), turns)]}


LLAVA = {"llava/detail_23k.json": [], "llava/complex_reasoning_77k.json": [], "llava/conversation_58k.json": [],
         **pictures_in("coco/train2017", "a.jpg", "b.jpg", "c.jpg")}


def test_llava_records_become_rounds_in_order(folder):
    data = folder(**LLAVA | {"llava/conversation_58k.json": [
        record("<image><image> Same?", "No.", "<image>\nNow?", "Yes.", image=["a.jpg", "b.jpg", "c.jpg"])]})
    a, b, c = (data / f"coco/train2017/{name}.jpg" for name in "abc")
    assert rounds_of(data, "llava_dial") == [[Round((a, b), "Same?", "No."), Round((c,), "Now?", "Yes.")]]
    for text in ("<image>\nWhat is\nthis?", "What is this?\n<image>"):
        folder(**{"llava/detail_23k.json": [record(text, " A cat.\n", "Sure?", "Yes.")]})
        assert rounds_of(data, "llava") == [[Round((a,), "What is this?", "A cat."), Round((), "Sure?", "Yes.")]]
    folder(**{"llava/detail_23k.json": [record("No picture?", "None.", image=[])]})
    assert rounds_of(data, "llava") == [[Round((), "No picture?", "None.")]]


@pytest.mark.parametrize("name, file, most", [("llava", "llava/complex_reasoning_77k.json", 3),
                                              ("llava_dial", "llava/conversation_58k.json", 2)])
def test_concatenation_keeps_every_record_exactly_once(folder, name, file, most):
    several = record("<image><image> S?", "A.", image=["a.jpg", "b.jpg"])
    records = [record(f"<image> Q{i}?", "A.", f"R{i}?", "A.") for i in range(200)]
    data = folder(**LLAVA | {file: [*records, several]})
    talks = rounds_of(data, name)
    questions = [turn.question for talk in talks for turn in talk]
    assert sorted(questions) == sorted([f"{letter}{i}?" for letter in "QR" for i in range(200)] + ["S?"])
    first = [int(question[1:-1]) for question in questions if question[0] == "Q"]
    assert first != sorted(first) != first[::-1]                # neighbours in the file are not always together
    for talk in talks:
        if talk[0].question != "S?":            # records stay whole, each with its image
            assert [turn.question[1:] for turn in talk[::2]] == [turn.question[1:] for turn in talk[1::2]]
            assert [len(turn.images) for turn in talk] == [1, 0] * (len(talk) // 2)
    assert {len(talk) for talk in talks} == {1, *(2 * n for n in range(1, most + 1))}
    assert talks == rounds_of(data, name) != rounds_of(data, name, seed=1)


def instruction(text, images, related=()):
    return {"instruction": text, "answer": f"{text} yes", "image_ids": images, "rel_ins_ids": list(related)}


def test_cgd_instructions_about_the_same_images_are_one_conversation(folder):
    one, two = "CGD_IMG_000000000001", "CGD_IMG_000000000002"
    data = folder(**pictures_in("coco/train2017", "000000000001.jpg", "000000000002.jpg"), **{
        "MIMIC-IT/CGD_instructions.json": {"meta": {}, "data": {
            "CGD_INS_0": instruction("A", [two, one], ["CGD_INS_2", "CGD_INS_2", "CGD_INS_1", "CGD_INS_9"]),
            "CGD_INS_1": instruction("B", [one, two], ["CGD_INS_0"]),           # another order: not the same
            "CGD_INS_2": instruction("C", [two, one], ["CGD_INS_0"]),
            "CGD_INS_3": instruction("D", [one, "CGD_IMG_000000000003"]),       # one image is absent
            "CGD_INS_4": instruction("E", ["CGD_IMG_000000000003"]),
            "CGD_INS_5": instruction("F", [one] * 9)}}})
    first, second = (data / f"coco/train2017/00000000000{n}.jpg" for n in (1, 2))
    told = []
    assert rounds_of(data, "otter_mimicit_cgd", tell=told.append) == [
        [Round((second, first), "A", "A yes"), Round((), "C", "C yes")],
        [Round((first, second), "B", "B yes")], [Round((first,), "D", "D yes")]]
    assert told == ["otter_mimicit_cgd: 1 records kept without an image that is not there",
                    "otter_mimicit_cgd: 1 records left out: none of its images is there",
                    "otter_mimicit_cgd: 1 records left out: more than 8 images"]


def test_pictures_of_cgd_do_not_depend_on_the_order_of_a_set(folder):
    """Ranks are processes of their own, each with its own order of sets."""
    names = [f"{i:012d}.{end}" for i in range(9) for end in ("jpg", "png")]
    data = folder(**pictures_in("coco/train2017", *names), **{"MIMIC-IT/CGD_instructions.json": {"data": {
        f"CGD_INS_{i}": instruction("A", [f"CGD_IMG_{i:012d}"]) for i in range(9)}}})
    code = f"import pathlib, data; print(data.read(pathlib.Path({str(data)!r}), ['otter_mimicit_cgd']))"
    found = {subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True,
                            text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
             for seed in "12"}
    assert len(found) == 1 and "000000000008.jpg" in found.pop()


@pytest.mark.parametrize("code", ["SD", "SN", "TVC", "VST"])
def test_images_in_base64_are_read_from_their_place_in_the_file(folder, code):
    shades = {}
    for i in range(3):
        file = BytesIO()
        Image.new("RGB", (4, 4), (100 * i, 0, 0)).save(file, "PNG")
        shades[f"{code}_IMG_{i}"] = base64.b64encode(file.getvalue()).decode()
    data = folder(**{f"MIMIC-IT/{code}.json": json.dumps(shades).replace("/", "\\/"),   # as some encoders do
                     f"MIMIC-IT/{code}_instructions.json": {"data": {
                         "X": instruction("A", [f"{code}_IMG_2", f"{code}_IMG_0"], ["Y"]),
                         "Y": instruction("B", [f"{code}_IMG_2", f"{code}_IMG_0"], ["X"])}}})
    before = {file for file in data.rglob("*") if file.is_file()}
    (first, second), = rounds_of(data, f"otter_mimicit_{code.lower()}")
    assert [open_image(BytesIO(image.read_bytes())).getpixel((0, 0))[0] for image in first.images] == [200, 0]
    assert (first.question, first.answer, second) == ("A", "A yes", Round((), "B", "B yes"))
    assert {file for file in data.rglob("*") if file.is_file()} - before == {data / f"MIMIC-IT/{code}.json.index"}


keys = st.text(st.characters(codec="utf-8", exclude_characters='"\\', exclude_categories=["C"]), max_size=12)
texts = st.text(st.sampled_from("AZaz09+/="), max_size=40)


@settings(deadline=None, max_examples=100)
@given(content=st.dictionaries(keys, texts, max_size=6), indent=st.sampled_from([None, 0, 2]),
       chunk=st.integers(1, 60))
def test_the_scan_finds_what_json_holds_however_the_file_is_cut(tmp_path_factory, content, indent, chunk):
    file = tmp_path_factory.mktemp("scan") / "SD.json"
    file.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "CHUNK", chunk)
        found = {key: file.read_bytes()[start:start + n].decode() for key, start, n in scan(file)}
    assert found == content


@pytest.mark.parametrize("content", ["", "{", "[]", '["a", "b"]', '{"a": 1}', '{"a": {"b": "c"}}', '{"a": "b"',
                                     '{"a": "b", }', '{"a": "b" "c": "d"}', '{"a" "b"}', '{"a": "b\\"c"}',
                                     '{"a": "b"} x', "x" * 30000, '{"a": "', '{"a', "}", '{"a": "b"{}',
                                     "[1, 2" + " " * 20000 + '{"a": "b"}', '{"a" 1' + " " * 2000 + ': "b"}'])
def test_a_file_that_is_no_object_of_texts_is_refused(tmp_path, content):
    (tmp_path / "SD.json").write_text(content)
    with pytest.raises(ValueError, match="SD.json is no JSON object of base64 texts"):
        list(scan(tmp_path / "SD.json"))


def test_the_index_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "SD.json"
    file.write_text('{"a": "QQ=="}')
    assert packed(file)["a"].read_bytes() == b"A"
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "scan", lambda file: 1 / 0)
        assert packed(file)["a"].read_bytes() == b"A"
    file.write_text('{"new": "QUI="}')
    assert packed(file)["new"].read_bytes() == b"AB" and set(packed(file)) == {"new"}
    file.write_text('{"old": "QUI="}')                          # as long as before
    os.utime(file, ns=(1, 1))
    assert set(packed(file)) == {"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SD.json", "SD.json.index"]


@pytest.mark.parametrize("index", ["", "{", "[]", '{"state": STATE}', '{"state": STATE, "texts": {"a": [7]}}',
                                   '{"state": STATE, "texts": {"a": [7, -1]}}',
                                   '{"state": STATE, "texts": {"a": [7, 4000]}}',
                                   '{"state": STATE, "texts": {"a": ["7", 4]}}'])
def test_a_damaged_index_is_made_again(tmp_path, index):
    file = tmp_path / "SD.json"
    file.write_text('{"a": "QQ=="}')
    state = f"[{file.stat().st_size}, {file.stat().st_mtime_ns}]"
    (tmp_path / "SD.json.index").write_text(index.replace("STATE", state))
    assert packed(file)["a"].read_bytes() == b"A"
    assert json.loads((tmp_path / "SD.json.index").read_text())["texts"] == {"a": [7, 4]}


def test_text_that_is_no_base64_is_named(tmp_path):
    (tmp_path / "SD.json").write_text('{"a": "QQ", "b": "Q QQ==", "c": "AAAA"}')
    images = packed(tmp_path / "SD.json")
    for key in "ab":
        with pytest.raises(ValueError, match=f"SD.json, {key} is no base64 text"):
            images[key].read_bytes()
    with pytest.raises(ValueError, match="SD.json, c is no readable picture"):
        open_picture(images["c"], 16)


def test_a_blend_talks_about_each_image_first_and_introduces_each_once(folder):
    names = [f"{i:012d}" for i in range(6)]
    talks = [record(f"<image> {name} {k}?", "A.", f"{name} {k}, more?", "A.", image=f"{name}.jpg")
             for name in names[:5] for k in range(3)]
    pairs = {f"{i}{j}": (names[i], names[j]) for i in range(6) for j in range(6) if i != j}
    instructions = {f"CGD_INS_{key}{k}": instruction(f"{key}{k}", [f"CGD_IMG_{image}" for image in pair],
                                                     [f"CGD_INS_{key}{1 - k}"])
                    for key, pair in pairs.items() for k in (0, 1)}
    data = folder(**LLAVA | pictures_in("coco/train2017", *(f"{name}.jpg" for name in names)) | {
        "llava/detail_23k.json": talks[::2], "llava/conversation_58k.json": talks[1::2],
        "MIMIC-IT/CGD_instructions.json": {"data": instructions}})
    told, last_alone = [], set()
    found = rounds_of(data, "llava_otter_blend", tell=told.append)
    assert told == ["llava_otter_blend: 5 records left out: an image that LLaVA does not talk about"]
    assert len(found) == 25                     # the last image alone may be without talk
    for rounds in found:
        shown = [image.stem for turn in rounds for image in turn.images]
        assert len(shown) == len(set(shown)) == 2
        about_both = [turn for turn in rounds if " " not in turn.question]
        assert about_both and rounds[-len(about_both):] == about_both
        assert all(tuple(shown) == pairs[turn.question[:2]] for turn in about_both)
        current = []
        for turn in rounds[:-len(about_both)]:  # LLaVA's talk is about the image shown last, and comes whole
            current += [image.stem for image in turn.images]
            assert turn.question.startswith(current[-1])
        assert current[:1] == shown[:1]
        last_alone.add(len(current) == 2)
        more = [turn.question.endswith("more?") for turn in rounds[:-len(about_both)]]
        assert more == [False, True] * (len(more) // 2)
    assert last_alone == {True, False}
    assert {len({turn.question for turn in rounds if " " not in turn.question}) for rounds in found} == {1, 2}
    assert {sum(len(turn.images) == 0 for turn in rounds) for rounds in found} > {2, 3}   # not all talk is used
    assert found == rounds_of(data, "llava_otter_blend", tell=told.append)


def sparkle(*messages):
    """A Sparkles record of (text, ids of images, answer)."""
    turns = []
    for text, ids, answer in messages:
        turns += [{"role": "user", "content": text, "images": [{"image_id": id, "caption": ""} for id in ids]},
                  {"role": "assistant", "content": answer}]
    return {"dialogue": turns}


def sparkles(folder, records, names=("14.jpg", "1417.jpg", "804.jpg")):
    return folder(**{"SparklesDialogueCC/annotations/SparklesDialogueCC.json": records,
                     "SparklesDialogueVG/annotations/SparklesDialogueVG.json": [],
                     "SparklesDialogueVG/images/.keep": ""},
                  **pictures_in("SparklesDialogueCC/images", *names))


def test_sparkles_tags_are_whole_ids_in_one_style_per_conversation(folder):
    mark = "<Img><ImageHere></Img>"
    talk = sparkle((f"Compare IMAGE#1417{mark} and\nIMAGE#14{mark}.", [1417, 14],
                    "IMAGE#14 is big. IMAGE#1417 too."),
                   (f"And IMAGE#804{mark}?", [804], "Like IMAGE#1417, not IMAGE#14!"))
    data = sparkles(folder, [talk] * 60)
    images = data / "SparklesDialogueCC/images"
    found = rounds_of(data, "sparkles_dialogue")
    expected = []
    for names in TAGS:
        one, two, three = names[:3]
        capital = [name[0].upper() + name[1:] for name in names]
        expected.append([
            Round((images / "1417.jpg", images / "14.jpg"), f"Compare {one} and {two}.",
                  f"{capital[1]} is big. {capital[0]} too."),
            Round((images / "804.jpg",), f"And {three}?", f"Like {one}, not {two}!")])
    assert all(rounds in expected for rounds in found) and all(rounds in found for rounds in expected)
    assert found == rounds_of(data, "sparkles_dialogue")


def test_sparkles_leaves_out_what_does_not_qualify_and_counts_it(folder):
    good = sparkle(("IMAGE#14?", [14], "Yes."))
    data = sparkles(folder, [good, sparkle(("IMAGE#15?", [15], "Yes.")), sparkle(("Q?", [14] * 9, "Yes.")),
                             sparkle(("IMAGE#14?", [14], "IMAGE#1 is."))])
    told = []
    assert len(rounds_of(data, "sparkles_dialogue", tell=told.append)) == 1
    assert sorted(told) == [f"sparkles_dialogue: 1 records left out: {reason}" for reason in (
        "an image is missing", "more than 8 images", "the text names an image that is not shown")]


# ---- bad input ----

BAD_LLAVA = [
    (record("<image> Q?", "A.") | {"conversations": []}, "alternate human, gpt; found none"),
    (record("<image> Q?", "A.", "Q?"), "alternate human, gpt; found human, gpt, human"),
    (record("<image> Q?", "A.") | {"conversations": [{"from": "gpt", "value": "A."}] * 2}, "found gpt, gpt"),
    (record("<image> Q?", "A.") | {"conversations": [{"value": "Q?"}]}, "from"),
    (record("<image> Q?", "A.") | {"conversations": None}, "NoneType"),
    ({"id": "007", "image": "a.jpg"}, "conversations"),
    (record("<image> Q?", " \n"), "empty question or answer"),
    (record("<image>\n", "A."), "empty question or answer"),
    (record("<image> Q?", None), "NoneType"),
    (record("<image> Q?", "A.", "<image> Q?", "A."), "1 images, but 2 <image> marks"),
    (record("Q?", "A."), "1 images, but 0 <image> marks"),
    (record("<image> Q?", "A.", image=[]), "0 images, but 1 <image> marks"),
    (record("<image> Q?", "A.", image=None), "NoneType"),
    (record("<image> Q?", "A.", image="z.jpg"), "no image 'z.jpg'"),
    (record("<image> Q?", "A.", image="../../x.jpg"), "'../../x.jpg' lies outside"),
    (record("<image> Q?", "A.", image=["/x.jpg"]), "'/x.jpg' lies outside"),
    (record("<image> Q?", "A.", image=""), "'' lies outside"),
    (record("<image> Q?", "A.", image="link.jpg"), "'link.jpg' lies outside"),
    (record("<image> Q?", "A.", image="x" * 300 + ".jpg"), "OSError"),
    (record("<image> Q?", "A.", image="loop.jpg"), "loop.jpg"),
    (record("<image> Q\ud800?", "A."), "UnicodeEncodeError")]


@pytest.mark.parametrize("bad, message", BAD_LLAVA, ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_llava_record_is_named_or_skipped_and_counted(folder, bad, message):
    data = folder(**LLAVA | {"x.jpg": PICTURE.getvalue(),
                             "llava/detail_23k.json": [record("<image> Q?", "A.", id="001"), bad]})
    (data / "coco/train2017/link.jpg").symlink_to(data / "x.jpg")
    (data / "coco/train2017/loop.jpg").symlink_to("loop.jpg")
    with pytest.raises(ValueError, match=message) as error:
        read(data, ["llava"])
    assert str(data / "llava/detail_23k.json") in str(error.value) and "record 007" in str(error.value)
    assert "--skip-bad" in str(error.value)
    told = []
    assert len(read(data, ["llava"], skip_bad=True, tell=told.append)) == 1
    assert len(told) == 1 and told[0].startswith("llava: 1 bad records skipped") and "record 007" in told[0]


@pytest.mark.parametrize("bad, message", [
    (sparkle(("Q?", [], "A.")) | {"dialogue": [{"role": "user", "content": "Q?"}]}, "found user"),
    ({"dialogue": []}, "found none"), ({}, "dialogue"), ("x", "TypeError"),
    (sparkle(("Q?", [14], " ")), "empty question or answer"),
    ({"dialogue": [{"role": "user", "content": "Q?", "images": [{}]}, {"role": "assistant", "content": "A."}]},
     "image_id")])
def test_a_bad_sparkles_record_is_named(folder, bad, message):
    data = sparkles(folder, [sparkle(("Q?", [14], "A.")), bad])
    with pytest.raises(ValueError, match=f"SparklesDialogueCC.json, record 1: .*{message}"):
        read(data, ["sparkles_dialogue"])


def test_a_sparkles_id_cannot_lead_out_of_the_folder(folder):
    data = sparkles(folder, [sparkle(("Q?", ["../../../x"], "A."))])
    (data / "x.jpg").write_bytes(PICTURE.getvalue())
    assert read(data, ["sparkles_dialogue"], tell=lambda line: None) == []


@pytest.mark.parametrize("bad, message", [
    ({"instruction": "Q?", "image_ids": ["CGD_IMG_a"], "rel_ins_ids": []}, "answer"), ("x", "TypeError"),
    (instruction(" ", ["CGD_IMG_a"]), "empty question"), (instruction("Q?", None), "NoneType"),
    (instruction("Q?", [3]), "none of its images")])
def test_a_bad_instruction_is_named(folder, bad, message):
    data = folder(**LLAVA, **{"MIMIC-IT/CGD_instructions.json": {"data": {"good": instruction("Q?", ["CGD_IMG_a"]),
                                                                          "bad": bad}}})
    told = []
    try:
        read(data, ["otter_mimicit_cgd"], tell=told.append)
    except ValueError as error:
        told.append(str(error))
        assert "CGD_instructions.json, record bad" in told[0]
    assert len(told) == 1 and message in told[0]


def test_a_record_without_an_id_is_named_by_its_number(folder):
    with pytest.raises(ValueError, match="record 1: "):
        read(folder(**LLAVA | {"llava/detail_23k.json": [record("<image> Q?", "A."), "no record"]}), ["llava"])


@pytest.mark.parametrize("content", ["[{", "{}", "3", "\0", "[" * 200_000, f"[{'9' * 5000}]"])
def test_a_file_that_is_no_list_is_named(folder, content):
    with pytest.raises(ValueError, match="detail_23k.json (is not valid JSON|holds a .*expected a list)"):
        read(folder(**LLAVA | {"llava/detail_23k.json": content}), ["llava"])


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_are_named_with_where_to_get_them(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="Get .*(huggingface|Hugging Face|github|cocodataset)") as error:
        read(tmp_path, [name])
    assert all(file in str(error.value) for file in SOURCES[name].files)


def test_the_parquet_flavour_is_told_from_the_json_one(folder):
    data = folder(**{"MIMIC-IT/SD_instructions.json": {"data": {}}, "MIMIC-IT/SD.parquet": b"PAR1"})
    with pytest.raises(FileNotFoundError, match="no MIMIC-IT/SD.json .*JSON files, not the parquet ones"):
        read(data, ["otter_mimicit_sd"])


def test_an_unknown_dataset_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no dataset 'sparkles'; there are llava, llava_dial.*set2"):
        read(tmp_path, ["llava", "sparkles"])


def test_mixtures_are_the_paper_s():
    eight = ("llava", "llava_dial", "otter_mimicit_cgd", "otter_mimicit_sd", "otter_mimicit_sn",
             "otter_mimicit_tvc", "otter_mimicit_vst", "llava_otter_blend")
    assert RECIPES == {"attention": eight[:2], "single": eight[:2], "set1": eight,
                       "set2": (*eight, "sparkles_dialogue")}


# ---- split and batches ----

def test_a_split_is_a_tenth_and_the_seed_decides_which():
    train, validation = split(list(range(50)), seed=1)
    assert len(validation) == 5 and sorted(train + validation) == list(range(50))
    assert split(list(range(50)), seed=1) == (train, validation) != split(list(range(50)), seed=2)


def test_a_batch_holds_conversations_one_after_the_other_and_images_in_order(tokenizer, pictures):
    turns = [Round((), "Q?", "A."), Round(tuple(pictures[:2]), "Which?", "This."),
             Round((pictures[2],), "Q?", "A.")]
    encoded = [encode([turn], tokenizer, N) for turn in turns]
    batch = collate([tensors(x, 16) for x in encoded])
    assert batch["lengths"] == [len(x.ids) for x in encoded]
    for name in ("ids", "kind", "labels"):
        assert batch[name].tolist() == [sum((getattr(x, name) for x in encoded), [])]
    alone = [tensors(encode([Round((file,), "Q?", "A.")], tokenizer, N), 16)["images"] for file in pictures[:3]]
    assert torch.equal(batch["images"], torch.cat(alone))
    assert set(batch["kind"].unique().tolist()) == {TEXT, IMAGE}


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_packing_keeps_every_conversation_whole_and_fills_what_it_can(lengths):
    rows = [{name: torch.full((length,), i) for name in ("ids", "kind", "labels")}
            | {"images": torch.full((i % 3, 1), i)} for i, length in enumerate(lengths)]
    batches = pack(rows, 50)
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


def talks(files, **extra):
    return [Conversation(f"record {i}", [Round((file,), "What is it?" * i, "A cat.")])
            for i, file in enumerate(files, 1)]


def test_an_unusable_conversation_is_named_or_replaced_and_counted(tokenizer, pictures, tmp_path, capsys):
    broken, bomb, vision = tmp_path / "broken.jpg", tmp_path / "bomb.png", VisionConfig(image_size=16, n_queries=N)
    file = BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "JPEG")
    broken.write_bytes(file.getvalue()[:300])
    Image.new("1", (20000, 20000)).save(bomb)
    conversations = talks([pictures[0], broken, bomb, tmp_path / "gone.png", pictures[1]])
    rows = Conversations(conversations, tokenizer, vision)
    for index, file in ((1, broken), (2, bomb), (3, tmp_path / "gone.png")):
        with pytest.raises(ValueError, match=f"record {index + 1}: .*{file.name}.*--skip-bad"):
            rows[index]
    rows = Conversations(conversations, tokenizer, vision, skip_bad=True)
    list(DataLoader(rows, 1, sampler=[0, 2], num_workers=2, collate_fn=collate))
    assert [*rows.skipped] == [0, 0, 1, 1, 0]                   # marked by the workers, too
    assert torch.equal(rows[1]["ids"], rows[4]["ids"])
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["skipped record 2"]
    assert [*rows.skipped] == [0, 1, 1, 1, 0] and len(list(rows)) == 5
    with pytest.raises(ValueError, match="none of the conversations"):
        Conversations(conversations[1:3], tokenizer, vision, skip_bad=True)[0]


def test_workers_make_the_same_batches(tokenizer, pictures):
    conversations = talks(pictures)
    rows = Conversations(conversations, tokenizer, VisionConfig(image_size=16, n_queries=N))
    here, there = (list(DataLoader(rows, 2, collate_fn=collate, num_workers=n)) for n in (0, 2))
    assert len(here) == len(there) == 2
    for ours, theirs in zip(here, there):
        assert ours.pop("lengths") == theirs.pop("lengths") and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- features, and the check of a folder ----

def test_features_are_what_the_vit_makes_and_are_made_once(model, tokenizer, pictures, tmp_path, monkeypatch):
    vit, rows = model.vit, talks(pictures)
    features = Features(tmp_path, vit)
    features.fill(pictures, vit, n=3)
    live, kept = (collate([Conversations(rows, tokenizer, vit.config, features=given)[i] for i in range(4)])
                  for given in (None, features))
    assert kept["images"].dtype == torch.float16
    torch.testing.assert_close(kept["images"].float(), vit(live["images"]), atol=2e-3, rtol=2e-3)
    assert model(**kept).item() == pytest.approx(model(**live).item(), abs=2e-3)
    monkeypatch.setattr(type(vit), "forward", lambda *args: 1 / 0)
    features.fill(pictures, vit)                                # nothing is left to do
    model(**kept)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(pictures)


def test_features_belong_to_their_picture_s_bytes_and_their_encoder(model, pictures, tmp_path):
    vit = model.vit
    features = Features(tmp_path, vit)
    features.fill(pictures[:1], vit)
    copy = tmp_path / "copy.png"
    copy.write_bytes(pictures[0].read_bytes())
    assert torch.equal(features.load(copy), features.load(pictures[0]))
    with pytest.raises(ValueError, match=f"no features were kept of {pictures[1]}"):
        features.load(pictures[1])
    with torch.no_grad():
        vit.ln_post.bias += 1
    with pytest.raises(ValueError, match="no features were kept"):
        Features(tmp_path, vit).load(pictures[0])
    save_file({"features": torch.zeros(3, 3)}, features.file(pictures[0]))
    with pytest.raises(ValueError, match=f"no features .* of {pictures[0]}: delete it"):
        features.load(pictures[0])


def test_the_check_of_a_folder_prints_examples_problems_and_nine_rows(folder, config, capsys, monkeypatch):
    data = folder(**LLAVA | {"coco/train2017/b.jpg": b"no picture", "llava/detail_23k.json": [
        record("<image> What is it?", "A cat.", id=str(i), image=name)
        for i, name in enumerate(["a.jpg", "b.jpg", "z.jpg"])]})
    monkeypatch.setattr(sys, "argv", ["data.py", str(data), "--llama", config.llama, "--images"])
    monkeypatch.chdir(Path(__file__).parent.parent)             # weights/tiny
    with pytest.raises(SystemExit, match="bad records"):
        data_module.main()
    printed = capsys.readouterr().out
    assert f":<{data}/coco/train2017/a.jpg>### Question: What is it?\n### Answer:[[A cat.</s>]]" in printed
    assert "b.jpg is no readable picture" in printed and "record 2: ValueError: no image 'z.jpg'" in printed
    assert "no MIMIC-IT/SD_instructions.json, MIMIC-IT/SD.json in" in printed
    header, *lines = printed.splitlines()[-12:-2]
    table = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert header.split()[:3] == ["dataset", "paper", "samples"] and [line[0] for line in table] == NAMES
    assert table[3][1:] == ["8006", *["missing"] * 6]
    assert table[0][1:5] == ["49924", "1", "0", "2"] and table[0][-1] == "0"
