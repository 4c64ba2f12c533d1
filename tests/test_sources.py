"""Claims about sources.py: nine published formats, bad input, large files, mixtures, the check of a folder."""
import base64
import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

import sources
from data import Conversation, Round
from pixels import load_pixels, read_image
from sources import (MIXTURES, SOURCES, TAGS, dataset_names, encoded_images, n_sharing, parquet_texts,
                     read_datasets, related, scan)

# ---- published records ----

IMAGE_BYTES = BytesIO()
Image.new("RGB", (3, 2), "red").save(IMAGE_BYTES, "PNG")
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


def images_in(where, *names):
    return {f"{where}/{name}": IMAGE_BYTES.getvalue() for name in names}


def rounds_of(data, *names, **settings):
    return [conversation.rounds for conversation in read_datasets(data, names, **settings)]


def record(*texts, **extra):
    """A LLaVA record of question, answer, question, answer …"""
    return {"id": "007", "image": "a.jpg", **extra, "conversations": [
        {"from": speaker, "value": text} for speaker, text in zip(["human", "gpt"] * len(texts), texts)]}


LLAVA = {"llava/detail_23k.json": [], "llava/complex_reasoning_77k.json": [], "llava/conversation_58k.json": [],
         **images_in("coco/train2017", "a.jpg", "b.jpg", "c.jpg")}


def test_llava_records_become_rounds_in_order(folder):
    data = folder(**LLAVA | {"llava/conversation_58k.json": [
        record("<image><image> Same?", "No.", "<image>\nNow?", "Yes.", image=["a.jpg", "b.jpg", "c.jpg"])]})
    a, b, c = (data / f"coco/train2017/{name}.jpg" for name in "abc")
    assert rounds_of(data, "llava_dial") == [[Round((a, b), "Same?", "No."), Round((c,), "Now?", "Yes.")]]
    for text in ("<image>\nWhat is\nthis?", "What is this?\n<image>"):
        folder(**{"llava/detail_23k.json": [record(text, " A cat.\n", "Sure?", "Yes.")]})
        assert rounds_of(data, "llava") == [[Round((a,), "What is this?", "A cat."), Round((), "Sure?", "Yes.")]]


@pytest.mark.parametrize("extra", [{"image": []}, {"image": None}, {"image": None, "video": None, "images": []}])
def test_a_llava_record_without_an_image_is_text_only(folder, extra):
    data = folder(**LLAVA | {"llava/detail_23k.json": [record("No image?", "None.", **extra)]})
    assert rounds_of(data, "llava") == [[Round((), "No image?", "None.")]]
    absent = record("No image?", "None.")
    del absent["image"]
    folder(**{"llava/detail_23k.json": [absent]})
    assert rounds_of(data, "llava") == [[Round((), "No image?", "None.")]]


def test_links_to_files_and_folders_are_followed_and_a_link_to_nothing_is_an_absent_image(folder):
    one, two, three = (f"CGD_IMG_00000000000{n}" for n in (1, 2, 3))
    data = folder(**LLAVA | {
        "MIMIC-IT/CGD_instructions.json": {"data": {"A": instruction("A", [one, two]),
                                                    "B": instruction("B", [one, three])}},
        "SparklesDialogueCC/annotations/SparklesDialogueCC.json": [
            sparkle(("Q?", [1], "A.")), sparkle(("Q?", [3], "A."))],
        "SparklesDialogueVG/annotations/SparklesDialogueVG.json": [], "SparklesDialogueVG/images/.keep": "",
        "SparklesDialogueCC/keep": "", "llava/detail_23k.json": [
            record("<image> Q?", "A.", image="000000000001.jpg"), record("<image> R?", "A.", image="sub/1.jpg"),
            record("<image> S?", "A.", image="000000000003.jpg")]} | images_in("elsewhere", "1.jpg", "2.jpg"))
    for n in (1, 2, 3):                                         # the third leads to nothing, the fourth to itself
        (data / f"coco/train2017/00000000000{n}.jpg").symlink_to(data / f"elsewhere/{n}.jpg")
    (data / "coco/train2017/000000000004.jpg").symlink_to("000000000004.jpg")
    (data / "elsewhere/3.jpg").symlink_to(data / "gone.jpg")
    (data / "coco/train2017/sub").symlink_to(data / "elsewhere")
    (data / "SparklesDialogueCC/images").symlink_to(data / "elsewhere")
    notes = []
    found = rounds_of(data, "llava", "otter_mimicit_cgd", "sparkles_dialogue", skip_bad=True, tell=notes.append)
    assert sorted(round_.question for rounds in found for round_ in rounds) == ["A", "Q?", "Q?", "R?"]
    assert all(read_image(image) for rounds in found for round_ in rounds for image in round_.images)
    absent = "1 records left out: an image is missing, or is a link that leads to nothing"
    assert notes[1:] == [f"otter_mimicit_cgd: {absent}", f"sparkles_dialogue: {absent}"]
    assert "no image '000000000003.jpg'" in notes[0] and notes[0].endswith("only a link that leads to nothing")


@pytest.mark.parametrize("name, file, most", [("llava", "llava/complex_reasoning_77k.json", 3),
                                              ("llava_dial", "llava/conversation_58k.json", 2)])
def test_concatenation_keeps_every_record_exactly_once(folder, name, file, most):
    several = record("<image><image> S?", "A.", image=["a.jpg", "b.jpg"])
    records = [record(f"<image> Q{i}?", "A.", f"R{i}?", "A.") for i in range(200)]
    data = folder(**LLAVA | {file: [*records, several]})
    found = rounds_of(data, name)
    questions = [round_.question for rounds in found for round_ in rounds]
    assert sorted(questions) == sorted([f"{letter}{i}?" for letter in "QR" for i in range(200)] + ["S?"])
    first = [int(question[1:-1]) for question in questions if question[0] == "Q"]
    assert first != sorted(first) != first[::-1]                # neighbours in the file are not always together
    for rounds in found:
        if rounds[0].question != "S?":            # records stay whole, each with its image
            numbers = [round_.question[1:] for round_ in rounds]
            assert numbers[::2] == numbers[1::2]
            assert [len(round_.images) for round_ in rounds] == [1, 0] * (len(rounds) // 2)
    assert {len(rounds) for rounds in found} == {1, *(2 * n for n in range(1, most + 1))}
    assert found == rounds_of(data, name) != rounds_of(data, name, seed=1)


def instruction(text, images, related=()):
    return {"instruction": text, "answer": f"{text} yes", "image_ids": images, "rel_ins_ids": list(related)}


def test_cgd_instructions_about_the_same_images_are_one_conversation(folder):
    one, two = "CGD_IMG_000000000001", "CGD_IMG_000000000002"
    data = folder(**images_in("coco/train2017", "000000000001.jpg", "000000000002.jpg"), **{
        "MIMIC-IT/CGD_instructions.json": {"meta": {}, "data": {
            "CGD_INS_0": instruction("A", [two, one], ["CGD_INS_2", "CGD_INS_2", "CGD_INS_1", "CGD_INS_9"]),
            "CGD_INS_1": instruction("B", [one, two], ["CGD_INS_0"]),           # another order: not the same
            "CGD_INS_2": instruction("C", [two, one], ["CGD_INS_0"])}}})
    first, second = (data / f"coco/train2017/00000000000{n}.jpg" for n in (1, 2))
    assert rounds_of(data, "otter_mimicit_cgd", tell=pytest.fail) == [
        [Round((second, first), "A", "A yes"), Round((), "C", "C yes")], [Round((first, second), "B", "B yes")]]


@settings(deadline=None, max_examples=50)
@given(links=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=10))
def test_related_instructions_are_together_once_in_file_order_whichever_way_the_relation_points(links):
    names = [f"INS_{i}" for i in range(8)]
    records = {name: {"rel_ins_ids": [names[b] for a, b in links if names[a] == name]} for name in names}
    single = {name: Conversation(name, [Round((Path(f"{i % 2}.jpg"),), "Q?", "A.")])
              for i, name in enumerate(names)}
    smallest = list(range(8))                                   # the first instruction that each is linked with
    for a, b in 8 * links:
        if a % 2 == b % 2:                                      # about the same images
            smallest[a] = smallest[b] = min(smallest[a], smallest[b])
    found = [[conversation.name for conversation in group] for group in related(single, records)]
    groups = [[name for name, first in zip(names, smallest) if first == i] for i in range(8)]
    assert found == [group for group in groups if group]


def test_a_comparing_instruction_without_all_of_its_images_is_left_out_and_counted_with_the_reason(folder):
    one, absent = "CGD_IMG_000000000001", "CGD_IMG_000000000003"
    data = folder(**images_in("coco/train2017", "000000000001.jpg"), **{
        "MIMIC-IT/CGD_instructions.json": {"data": {
            "A": instruction("A", [one, absent]), "B": instruction("B", [absent]),
            "C": instruction("C", [one] * 9), "D": instruction("D", []), "E": instruction("E", [one], ["A"])}}})
    notes = []
    (only,), = rounds_of(data, "otter_mimicit_cgd", tell=notes.append)
    assert only.question == "E" and notes == [f"otter_mimicit_cgd: {reason}" for reason in (
        "2 records left out: an image is missing, or is a link that leads to nothing",
        "1 records left out: more than 8 images", "1 records left out: no image is named")]


@pytest.mark.parametrize("code, kept", [("SD", 0), ("SN", 1), ("TVC", 1), ("VST", 1)])
def test_parts_that_do_not_compare_keep_what_images_there_are(folder, code, kept):
    data = folder(**{f"MIMIC-IT/{code}.json": {f"{code}_IMG_0": "aGk="}, f"MIMIC-IT/{code}_instructions.json": {
        "data": {"X": instruction("A", [f"{code}_IMG_0", f"{code}_IMG_1"])}}})
    notes, name = [], f"otter_mimicit_{code.lower()}"
    found = rounds_of(data, name, tell=notes.append)
    assert [len(rounds[0].images) for rounds in found] == [1] * kept
    assert notes == [f"{name}: 1 records kept without images that are missing" if kept else
                     f"{name}: 1 records left out: an image is missing, or is a link that leads to nothing"]


def test_images_of_cgd_do_not_depend_on_the_order_of_a_set(folder):
    """Ranks are processes of their own, each with its own order of sets."""
    names = [f"{i:012d}.{end}" for i in range(9) for end in ("jpg", "png")]
    data = folder(**images_in("coco/train2017", *names), **{"MIMIC-IT/CGD_instructions.json": {"data": {
        f"CGD_INS_{i}": instruction("A", [f"CGD_IMG_{i:012d}"]) for i in range(9)}}})
    code = ("from pathlib import Path; from sources import read_datasets; "
            f"print(read_datasets(Path({str(data)!r}), ['otter_mimicit_cgd']))")
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
    assert [read_image(image).getpixel((0, 0))[0] for image in first.images] == [200, 0]
    assert (first.question, first.answer, second) == ("A", "A yes", Round((), "B", "B yes"))
    assert {file for file in data.rglob("*") if file.is_file()} - before == {data / f"MIMIC-IT/{code}.json.index"}


def write_parquet(file, **columns):
    """A parquet file; imported here, since the tests pass without pyarrow."""
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files are read with pyarrow, which is optional")
    parquet = pytest.importorskip("pyarrow.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file)


PNG = IMAGE_BYTES.getvalue()
TWO = {"MIMIC-IT/SD_instructions.json": {"data": {"X": instruction("A", ["SD_IMG_0", "SD_IMG_1"])}}}


@pytest.mark.parametrize("where", ["SD.parquet", "SD/a.parquet", "SD_Images/train-00000-of-00001.parquet"])
@pytest.mark.parametrize("layout", ["otter", "hub"])
def test_parquet_files_stand_for_the_json_file_of_images(folder, where, layout):
    data, keys = folder(**TWO), ["SD_IMG_0", "SD_IMG_1", "SD_IMG_2"]
    text = base64.b64encode(PNG).decode()
    columns = ({"base64": [text, text, None], "__index_level_0__": keys} if layout == "otter" else
               {"id": keys, "image": [{"bytes": PNG, "path": "a.png"}] * 2 + [{"bytes": None, "path": "b.png"}]})
    write_parquet(data / "MIMIC-IT" / where, **columns)
    for _ in "12":
        (only,), = rounds_of(data, "otter_mimicit_sd", tell=pytest.fail)
        assert [image.read_bytes() for image in only.images] == [PNG, PNG]
    assert encoded_images(data / "MIMIC-IT/SD.json").keys() == {"SD_IMG_0", "SD_IMG_1"}


def test_the_parts_of_a_parquet_folder_are_read_together_and_few_images_at_a_time(folder, monkeypatch):
    data = folder(**TWO)
    for n in range(2):
        write_parquet(data / f"MIMIC-IT/SD_Images/train-0000{n}-of-00002.parquet", id=[f"SD_IMG_{n}"], image=[PNG])
    assert len(rounds_of(data, "otter_mimicit_sd", tell=pytest.fail)) == 1
    write_parquet(data / "many.parquet", id=[f"SD_IMG_{n}" for n in range(100)], image=[PNG] * 100)
    parquet, sizes = pytest.importorskip("pyarrow.parquet"), []
    whole = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda self, *args, **named: (
        sizes.append(len(batch)) or batch for batch in whole(self, *args, **named)))
    assert len(list(parquet_texts(data / "many.parquet"))) == sum(sizes) == 100 and max(sizes) <= 16


@pytest.mark.parametrize("columns, message", [
    ({"id": ["a"], "instruction": ["b"]}, "found the columns id, instruction, expected keys, and `base64`"),
    ({"id": ["a"], "image": [PNG], "label": [1]}, "found the columns id, label, image"),
    ({"base64": ["QQ=="]}, "found the columns base64"), ({"id": [7], "base64": ["QQ=="]}, "found 7 with 'QQ=='"),
    ({"id": ["a"], "image": [7]}, "found 'a' with 7, expected a text and an image")])
def test_a_parquet_file_without_images_is_named(folder, columns, message):
    data = folder(**TWO)
    write_parquet(data / "MIMIC-IT/SD.parquet", **columns)
    with pytest.raises(ValueError, match=f"SD.parquet is no parquet file of images: {message}"):
        read_datasets(data, ["otter_mimicit_sd"])
    assert not (data / "MIMIC-IT/SD.json").exists()


def test_a_damaged_parquet_file_is_named(folder):
    pytest.importorskip("pyarrow", reason="parquet files are read with pyarrow, which is optional")
    with pytest.raises(ValueError, match="SD.parquet is no parquet file of images: "):
        read_datasets(folder(**TWO | {"MIMIC-IT/SD.parquet": b"PAR1"}), ["otter_mimicit_sd"])


def test_without_pyarrow_a_parquet_file_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)           # as if it were not installed
    with pytest.raises(ValueError, match="SD.parquet can be read with pyarrow only: pip install pyarrow"):
        read_datasets(folder(**TWO | {"MIMIC-IT/SD.parquet": b"PAR1"}), ["otter_mimicit_sd"])


keys = st.text(st.characters(codec="utf-8", exclude_characters='"\\', exclude_categories=["C"]), max_size=12)
texts = st.text(st.sampled_from("AZaz09+/="), max_size=40)


@settings(deadline=None, max_examples=100)
@given(content=st.dictionaries(keys, texts, max_size=6), indent=st.sampled_from([None, 0, 2]),
       chunk=st.integers(1, 60))
def test_the_scan_finds_what_json_holds_however_the_file_is_cut(tmp_path_factory, content, indent, chunk):
    file = tmp_path_factory.mktemp("scan") / "SD.json"
    file.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "READ_SIZE", chunk)
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
    assert encoded_images(file)["a"].read_bytes() == b"A"
    with monkeypatch.context() as patch:
        patch.setattr(sources, "scan", lambda file: 1 / 0)
        assert encoded_images(file)["a"].read_bytes() == b"A"
    file.write_text('{"new": "QUI="}')
    assert encoded_images(file)["new"].read_bytes() == b"AB" and set(encoded_images(file)) == {"new"}
    file.write_text('{"old": "QUI="}')                          # as long as before
    os.utime(file, ns=(1, 1))
    assert set(encoded_images(file)) == {"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SD.json", "SD.json.index"]


def test_a_text_that_is_too_long_for_an_image_is_not_read(tmp_path, monkeypatch):
    file = tmp_path / "SD.json"
    file.write_text(json.dumps({"SD_IMG_1": "QUJD" * 100}))
    image, = encoded_images(file).values()
    assert image.read_bytes() == b"ABC" * 100
    monkeypatch.setattr("sources.MAX_BYTES", 200)
    with pytest.raises(ValueError, match="SD.json, SD_IMG_1 takes 400 bytes, expected an image of at most 200"):
        image.read_bytes()


def test_a_key_that_is_no_text_is_named_with_its_file(tmp_path):
    (tmp_path / "SD.json").write_text('{"SD_IMG_\\q": "QUJD"}')
    with pytest.raises(ValueError, match="SD.json: the key at byte 0 is no JSON text"):
        encoded_images(tmp_path / "SD.json")


@pytest.mark.parametrize("index", ["", "{", "[]", '{"state": STATE}', '{"state": STATE, "texts": {"a": [7]}}',
                                   '{"state": STATE, "texts": {"a": [7, -1]}}',
                                   '{"state": STATE, "texts": {"a": [7, 4000]}}',
                                   '{"state": STATE, "texts": {"a": ["7", 4]}}'])
def test_a_damaged_index_is_made_again(tmp_path, index):
    file = tmp_path / "SD.json"
    file.write_text('{"a": "QQ=="}')
    state = f"[{file.stat().st_size}, {file.stat().st_mtime_ns}]"
    index = index.replace("STATE", state)
    if "texts" in index:                                        # one that somebody gave the right checksum
        index = json.dumps(json.loads(index) | {"checksum": sources.checksum(json.loads(index)["texts"])})
    (tmp_path / "SD.json.index").write_text(index)
    assert encoded_images(file)["a"].read_bytes() == b"A"
    assert json.loads((tmp_path / "SD.json.index").read_text())["texts"] == {"a": [7, 4]}


def test_text_that_is_no_base64_is_named(tmp_path):
    (tmp_path / "SD.json").write_text('{"a": "QQ", "b": "Q QQ==", "c": "AAAA"}')
    images = encoded_images(tmp_path / "SD.json")
    for key in "ab":
        with pytest.raises(ValueError, match=f"SD.json, {key} is no base64 text"):
            images[key].read_bytes()
    with pytest.raises(ValueError, match="SD.json, c is no readable image"):
        load_pixels(images["c"], 16)


def test_a_blend_is_about_each_image_first_and_shows_each_once(folder):
    names = [f"{i:012d}" for i in range(6)]
    records = [record(f"<image> {name} {k}?", "A.", f"{name} {k}, more?", "A.", image=f"{name}.jpg")
             for name in names[:5] for k in range(3)]
    pairs = {f"{i}{j}": (names[i], names[j]) for i in range(6) for j in range(6) if i != j}
    instructions = {f"CGD_INS_{key}{k}": instruction(f"{key}{k}", [f"CGD_IMG_{image}" for image in pair],
                                                     [f"CGD_INS_{key}{1 - k}"])
                    for key, pair in pairs.items() for k in (0, 1)}
    data = folder(**LLAVA | images_in("coco/train2017", *(f"{name}.jpg" for name in names)) | {
        "llava/detail_23k.json": records[::2], "llava/conversation_58k.json": records[1::2],
        "MIMIC-IT/CGD_instructions.json": {"data": instructions}})
    notes, last_alone = [], set()
    found = rounds_of(data, "llava_otter_blend", tell=notes.append)
    assert notes == ["llava_otter_blend: 5 records left out: an image that LLaVA does not talk about"]
    assert len(found) == 25                     # only the last image may be without
    for rounds in found:
        shown = [image.stem for round_ in rounds for image in round_.images]
        assert len(shown) == len(set(shown)) == 2
        about_both = [round_ for round_ in rounds if " " not in round_.question]
        assert about_both and rounds[-len(about_both):] == about_both
        assert all(tuple(shown) == pairs[round_.question[:2]] for round_ in about_both)
        current = []
        for round_ in rounds[:-len(about_both)]:  # LLaVA's are about the image shown last, and come whole
            current += [image.stem for image in round_.images]
            assert round_.question.startswith(current[-1])
        assert current[:1] == shown[:1]
        last_alone.add(len(current) == 2)
        more = [round_.question.endswith("more?") for round_ in rounds[:-len(about_both)]]
        assert more == [False, True] * (len(more) // 2)
    assert last_alone == {True, False}
    assert {len({round_.question for round_ in rounds if " " not in round_.question})
            for rounds in found} == {1, 2}
    assert {sum(len(round_.images) == 0 for round_ in rounds) for rounds in found} > {2, 3}   # not all are used
    assert found == rounds_of(data, "llava_otter_blend", tell=notes.append)


def sparkle(*rounds):
    """A Sparkles record of (text, ids of images, answer)."""
    messages = []
    for text, ids, answer in rounds:
        messages += [{"role": "user", "content": text, "images": [{"image_id": id, "caption": ""} for id in ids]},
                  {"role": "assistant", "content": answer}]
    return {"dialogue": messages}


def write_sparkles(folder, records, names=("14.jpg", "1417.jpg", "804.jpg")):
    return folder(**{"SparklesDialogueCC/annotations/SparklesDialogueCC.json": records,
                     "SparklesDialogueVG/annotations/SparklesDialogueVG.json": [],
                     "SparklesDialogueVG/images/.keep": ""},
                  **images_in("SparklesDialogueCC/images", *names))


def test_sparkles_tags_are_whole_ids_in_one_style_per_conversation(folder):
    mark = "<Img><ImageHere></Img>"
    compared = sparkle((f"Compare IMAGE#1417{mark} and\nIMAGE#14{mark}.", [1417, 14],
                    "IMAGE#14 is big. IMAGE#1417 too."),
                   (f"And IMAGE#804{mark}?", [804], "Like IMAGE#1417, not IMAGE#14!"))
    data = write_sparkles(folder, [compared] * 60)
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


@pytest.mark.parametrize("written, read", [
    ("IMAGE#14 is a lake.\\n\\nIMAGE#14 is calm.\\n", "Image is a lake.\n\nImage is calm."),
    ("One.\\r\\nTwo\\nthree", "One.\nTwo\nthree"), ("\\\\n and \\t and \\\\", "\\\\n and \\t and \\\\"),
    ("a\nb", "a\nb")])
def test_backslash_n_in_sparkles_is_a_line_break_and_other_backslashes_stay(folder, monkeypatch, written, read):
    monkeypatch.setattr(sources, "TAGS", [["image"]])
    data = write_sparkles(folder, [sparkle(("What is\\nin\\n\\nIMAGE#14?", [14], written))])
    (only,), = rounds_of(data, "sparkles_dialogue", tell=pytest.fail)
    assert (only.question, only.answer) == ("What is in image?", read)


def test_an_image_that_sparkles_shows_twice_keeps_its_first_name_and_both_showings_count(folder, monkeypatch):
    monkeypatch.setattr(sources, "TAGS", TAGS[:1])
    data = write_sparkles(folder, [sparkle(("See IMAGE#14 and IMAGE#804.", [14, 804], "IMAGE#14 and IMAGE#804."),
                                           ("See IMAGE#14 and IMAGE#1417.", [14, 1417], "IMAGE#14, IMAGE#1417."))])
    a, b, c = (data / f"SparklesDialogueCC/images/{name}.jpg" for name in (14, 804, 1417))
    assert rounds_of(data, "sparkles_dialogue", tell=pytest.fail) == [[
        Round((a, b), "See image 1 and image 2.", "Image 1 and image 2."),
        Round((a, c), "See image 1 and image 4.", "Image 1, image 4.")]]


def test_sparkles_leaves_out_what_does_not_qualify_and_counts_it(folder):
    good = sparkle(("IMAGE#14?", [14], "Yes."))
    data = write_sparkles(folder, [good, sparkle(("IMAGE#15?", [15], "Yes.")), sparkle(("Q?", [14] * 9, "Yes.")),
                             sparkle(("IMAGE#14?", [14], "IMAGE#1 is.")),
                             sparkle(("IMAGE#14?", [14], "IMAGE#804 is."), ("IMAGE#804?", [804], "Yes."))])
    notes = []
    assert len(rounds_of(data, "sparkles_dialogue", tell=notes.append)) == 1
    assert sorted(notes) == [f"sparkles_dialogue: {reason}" for reason in (
        "1 records left out: an image is missing, or is a link that leads to nothing",
        "1 records left out: more than 8 images",
        "2 records left out: the text names an image that is not shown before it")]


# ---- bad input ----

def with_field(found, name, value):
    return {**found, name: value}


GOOD = record("<image> Q?", "A.")
BAD_LLAVA = [
    (with_field(GOOD, "conversations", []), "`from` must alternate human, gpt; found none"),
    (record("<image> Q?", "A.", "Q?"), "alternate human, gpt; found human, gpt, human"),
    (with_field(GOOD, "conversations", [{"from": "gpt", "value": "A."}] * 2), "found gpt, gpt"),
    (with_field(GOOD, "conversations", [{"from": "\ud800", "value": "A."}] * 2), "found .ud800, .ud800"),
    (with_field(GOOD, "conversations", [{"value": "Q?"}]), "`from` is null or absent, expected a text"),
    (with_field(GOOD, "conversations", None), "`conversations` is null or absent, expected a list"),
    (with_field(GOOD, "conversations", "Q?"), "`conversations` is a text, expected a list"),
    (with_field(GOOD, "conversations", ["Q?"]), "found a text, expected an object with the field `from`"),
    ({"id": "007", "image": "a.jpg"}, "`conversations` is null or absent"),
    (record("<image> Q?", " \n"), "empty question or answer"),
    (record("<image>\n", "A."), "empty question or answer"),
    (record("<image> Q?", None), "`value` is null or absent, expected a text"),
    (record(7, "A."), "`value` is a number, expected a text"),
    (record("<image> Q?", "A.", "<image> Q?", "A."), "1 images, but 2 <image> marks"),
    (record("Q?", "A."), "1 images, but 0 <image> marks"),
    (record("<image> Q?", "A.", image=[]), "0 images, but 1 <image> marks"),
    (record("<image> Q?", "A.", image=None), "0 images, but 1 <image> marks"),
    (record("<image> Q?", "A.", image=7), "`image` is a number, expected a text or a list or null"),
    (record("<image> Q?", "A.", image={"path": "a.jpg"}), "`image` is an object, expected a text"),
    (record("<image> Q?", "A.", image=["a.jpg", None]), "`image.1.` is null or absent, expected a text"),
    (record("<image> Q?", "A.", image=True), "`image` is true or false, expected a text"),
    (record("Q?", "A.", image=None, images=["a.jpg"]), "`images` cannot be read: .*images in the field `image`"),
    (record("<video> Q?", "A.", image=None, video="a.mp4"), "`video` cannot be read"),
    (record("<video>\nQ?", "A.", image=None), "the mark <video> cannot be shown"),
    (record("Q? <audio>", "A.", image=None), "the mark <audio> cannot be shown"),
    (record("<image> Q?", "<image>"), "the mark <image> cannot be shown"),
    (record("<image> Q?", "A.", video=["a.mp4"]), "`video` cannot be read"),
    (record("Q?", "A.", image=None, audios=["a.wav"]), "`audios` cannot be read"),
    (record("Q?", "A.", image=None, Speech="a.wav"), "`Speech` cannot be read"),
    (record("Q?", "A.", image=None, image_path="a.jpg"), "`image_path` cannot be read"),
    (record("Q?", "A.", image=None, point_cloud="a.npy"), "`point_cloud` cannot be read"),
    (with_field(GOOD, "conversations", [{"from": "human", "value": "<image> Q?", "video": "a.mp4"},
                                        {"from": "gpt", "value": "A."}]), "`video` cannot be read: .* texts only"),
    (record("<image> Q?", "A.", image="z.jpg"), "no image 'z.jpg'"),
    (record("<image> Q?", "A.", image="../../x.jpg"), "'../../x.jpg' lies outside"),
    (record("<image> Q?", "A.", image="../train2017/a.jpg"), "'../train2017/a.jpg' lies outside"),
    (record("<image> Q?", "A.", image="link/../a.jpg"), "lies outside .*must not begin with / or hold .."),
    (record("<image> Q?", "A.", image=["/x.jpg"]), "'/x.jpg' lies outside"),
    (record("<image> Q?", "A.", image=""), "no image ''"),
    (record("<image> Q?", "A.", image="x" * 300 + ".jpg"), "no image 'xxx"),
    (record("<image> Q?", "A.", image="a\0.jpg"), "no image 'a.x00.jpg'"),
    (record("<image> Q?", "A.", image="loop.jpg"), "no image 'loop.jpg' .*only a link that leads to nothing"),
    (record("<image> Q\ud800?", "A."), "holds half a character: 'Q.ud800")]


@pytest.mark.parametrize("bad, message", BAD_LLAVA, ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_llava_record_is_named_or_skipped_and_counted(folder, bad, message):
    data = folder(**LLAVA | {"x.jpg": IMAGE_BYTES.getvalue(),
                             "llava/detail_23k.json": [record("<image> Q?", "A.", id="001"), bad]})
    (data / "coco/train2017/loop.jpg").symlink_to("loop.jpg")
    with pytest.raises(ValueError, match=message) as error:
        read_datasets(data, ["llava"])
    assert str(data / "llava/detail_23k.json") in str(error.value) and "record 007 (index 1)" in str(error.value)
    assert "--skip-bad" in str(error.value) and "Error" not in str(error.value)
    notes = []
    assert len(read_datasets(data, ["llava"], skip_bad=True, tell=notes.append)) == 1
    assert len(notes) == 1 and notes[0].startswith("llava: 1 bad records skipped") and "record 007" in notes[0]
    assert notes[0].isprintable()


def test_what_describes_the_image_of_a_llava_record_is_no_other_medium(folder):
    good = record("<image> Q?", "A.", image_id=7, image_url="x", video=None, width=640, source="coco",
                  photographer="b", clip_score=0.5)
    assert len(rounds_of(folder(**LLAVA | {"llava/detail_23k.json": [good]}), "llava")) == 1


@pytest.mark.parametrize("bad, message", [
    (sparkle(("Q?", [], "A.")) | {"dialogue": [{"role": "user", "content": "Q?"}]}, "found user"),
    ({"dialogue": []}, "found none"), ({}, "`dialogue` is null or absent, expected a list"),
    ("x", "found a text, expected an object with the field `dialogue`"),
    (sparkle(("Q?", [14], None)), "`content` is null or absent, expected a text"),
    (sparkle(("Q?", [None], "A.")), "`image_id` is null or absent, expected a number or a text"),
    (with_field(sparkle(("Q?", [14], "A.")), "video", "a.mp4"), "`video` cannot be read: expected texts only"),
    ({"dialogue": [{"role": "user", "content": "Q?", "audio": "a.wav"}, {"role": "assistant", "content": "A."}]},
     "`audio` cannot be read: expected texts, and images in the field `images`"),
    ({"dialogue": [{"role": "user", "content": "Q?", "images": 7}, {"role": "assistant", "content": "A."}]},
     "`images` is a number, expected a list or null"),
    ({"dialogue": [{"role": "user", "content": "Q?", "images": [7]}, {"role": "assistant", "content": "A."}]},
     "found a number, expected an object with the field `image_id`"),
    (sparkle(("Q?", [14], " ")), "empty question or answer"),
    ({"dialogue": [{"role": "user", "content": "Q?", "images": [{}]}, {"role": "assistant", "content": "A."}]},
     "image_id")])
def test_a_bad_sparkles_record_is_named(folder, bad, message):
    data = write_sparkles(folder, [sparkle(("Q?", [14], "A.")), bad])
    with pytest.raises(ValueError, match=f"SparklesDialogueCC.json, record 1: .*{message}"):
        read_datasets(data, ["sparkles_dialogue"])


def test_a_sparkles_id_cannot_lead_out_of_the_folder(folder):
    data = write_sparkles(folder, [sparkle(("Q?", ["../../../x"], "A."))])
    (data / "x.jpg").write_bytes(IMAGE_BYTES.getvalue())
    assert read_datasets(data, ["sparkles_dialogue"], tell=lambda line: None) == []


@pytest.mark.parametrize("bad, message", [
    ({"instruction": "Q?", "image_ids": ["CGD_IMG_a"], "rel_ins_ids": []}, "`answer` is null or absent"),
    ("x", "found a text, expected an object with the field `instruction`"),
    (instruction(" ", ["CGD_IMG_a"]), "empty question"),
    (instruction("Q?", None), "`image_ids` is null or absent, expected a list"),
    (instruction("Q?", [3]), "`image_ids.0.` is a number, expected a text"),
    (with_field(instruction("Q?", ["CGD_IMG_a"]), "rel_ins_ids", "x"), "`rel_ins_ids` is a text, expected a list"),
    (with_field(instruction("Q?", ["CGD_IMG_a"]), "video_ids", ["x"]), "`video_ids` cannot be read")])
def test_a_bad_instruction_is_named(folder, bad, message):
    data = folder(**LLAVA, **{"MIMIC-IT/CGD_instructions.json": {"data": {"good": instruction("Q?", ["CGD_IMG_a"]),
                                                                          "bad": bad}}})
    with pytest.raises(ValueError, match=f"CGD_instructions.json, record bad: .*{message}"):
        read_datasets(data, ["otter_mimicit_cgd"])


def test_a_record_without_an_id_is_named_by_its_number(folder):
    with pytest.raises(ValueError, match="record 1: "):
        read_datasets(folder(**LLAVA | {"llava/detail_23k.json": [record("<image> Q?", "A."), "no record"]}),
                      ["llava"])


@pytest.mark.parametrize("content", ["[{", "{}", "3", "\0", "[" * 200_000, f"[{'9' * 5000}]"])
def test_a_file_that_is_no_list_is_named(folder, content):
    with pytest.raises(ValueError, match="detail_23k.json (is not valid JSON|holds a .*expected a list)"):
        read_datasets(folder(**LLAVA | {"llava/detail_23k.json": content}), ["llava"])


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_are_named_with_where_to_get_them(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="Get .*(huggingface|Hugging Face|github|cocodataset)") as error:
        read_datasets(tmp_path, [name])
    assert all(file in str(error.value) for file in SOURCES[name].files)


def test_an_unknown_dataset_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no dataset 'sparkles'; there are llava, llava_dial.*set2"):
        read_datasets(tmp_path, ["llava", "sparkles"])


def test_mixtures_stand_for_their_datasets_and_each_dataset_counts_once():
    assert dataset_names(["set2"]) == NAMES
    assert dataset_names(["sparkles_dialogue", "single", "llava"]) == ["sparkles_dialogue", "llava", "llava_dial"]
    assert dataset_names([]) == []


def test_mixtures_are_the_paper_s():
    eight = ("llava", "llava_dial", "otter_mimicit_cgd", "otter_mimicit_sd", "otter_mimicit_sn",
             "otter_mimicit_tvc", "otter_mimicit_vst", "llava_otter_blend")
    assert MIXTURES == {"attention": eight[:2], "single": eight[:2], "set1": eight,
                       "set2": (*eight, "sparkles_dialogue")}


def test_the_check_of_a_folder_prints_examples_problems_and_nine_rows(folder, config, capsys, monkeypatch):
    data = folder(**LLAVA | {"coco/train2017/b.jpg": b"no image", "llava/detail_23k.json": [
        record("<image> What is it?", "A cat.", id=str(i), image=name)
        for i, name in enumerate(["a.jpg", "b.jpg", "z.jpg"])]})
    monkeypatch.setattr(sys, "argv", ["sources.py", str(data), "--llama", config.llama, "--images"])
    monkeypatch.chdir(Path(__file__).parent.parent)             # weights/tiny
    with pytest.raises(SystemExit, match="bad records"):
        sources.main()
    printed = capsys.readouterr().out
    assert f":<{data}/coco/train2017/a.jpg>\n### Question: What is it?\n### Answer:[[A cat.</s>]]" in printed
    assert "b.jpg is no readable image" in printed and "record 2 (index 2): no image 'z.jpg'" in printed
    assert "no MIMIC-IT/SD_instructions.json, MIMIC-IT/SD.json in" in printed
    header, *lines = printed[printed.index("dataset  paper"):].splitlines()[:10]
    table = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert header.split()[:3] == ["dataset", "paper", "samples"] and [line[0] for line in table] == NAMES
    assert table[3][1:] == ["8006", *["missing"] * 6]
    legend = printed[printed.index("paper: samples"):]
    assert "other keys than the image files do" in legend and "MIMIC-IT" in legend and "is gated" in legend
    assert table[0][1:5] == ["49924", "1", "0", "2"] and table[0][-1] == "0"


def test_conversations_that_share_an_image_with_others_are_counted():
    a, b, ab, none = ([Conversation("", [Round(tuple(images), "?", "."), Round((), "?", ".")])]
                      for images in ("a", "b", "ab", ""))
    assert n_sharing(a + ab + b + none, a) == 2 and n_sharing(a, ab) == 1
    assert n_sharing(a + none, b + none) == n_sharing(a, []) == n_sharing([], a) == 0
