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
from data import Round
from sources import MIXTURES, SOURCES, TAGS, dataset_names, encoded_images, read_datasets, scan
from vit import load_pixels, read_image

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
    folder(**{"llava/detail_23k.json": [record("No image?", "None.", image=[])]})
    assert rounds_of(data, "llava") == [[Round((), "No image?", "None.")]]


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
            "CGD_INS_2": instruction("C", [two, one], ["CGD_INS_0"]),
            "CGD_INS_3": instruction("D", [one, "CGD_IMG_000000000003"]),       # one image is absent
            "CGD_INS_4": instruction("E", ["CGD_IMG_000000000003"]),
            "CGD_INS_5": instruction("F", [one] * 9)}}})
    first, second = (data / f"coco/train2017/00000000000{n}.jpg" for n in (1, 2))
    notes = []
    assert rounds_of(data, "otter_mimicit_cgd", tell=notes.append) == [
        [Round((second, first), "A", "A yes"), Round((), "C", "C yes")],
        [Round((first, second), "B", "B yes")], [Round((first,), "D", "D yes")]]
    assert notes == ["otter_mimicit_cgd: 1 records kept without an image that is not there",
                    "otter_mimicit_cgd: 1 records left out: none of its images is there",
                    "otter_mimicit_cgd: 1 records left out: more than 8 images"]


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


@pytest.mark.parametrize("index", ["", "{", "[]", '{"state": STATE}', '{"state": STATE, "texts": {"a": [7]}}',
                                   '{"state": STATE, "texts": {"a": [7, -1]}}',
                                   '{"state": STATE, "texts": {"a": [7, 4000]}}',
                                   '{"state": STATE, "texts": {"a": ["7", 4]}}'])
def test_a_damaged_index_is_made_again(tmp_path, index):
    file = tmp_path / "SD.json"
    file.write_text('{"a": "QQ=="}')
    state = f"[{file.stat().st_size}, {file.stat().st_mtime_ns}]"
    (tmp_path / "SD.json.index").write_text(index.replace("STATE", state))
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


def test_sparkles_leaves_out_what_does_not_qualify_and_counts_it(folder):
    good = sparkle(("IMAGE#14?", [14], "Yes."))
    data = write_sparkles(folder, [good, sparkle(("IMAGE#15?", [15], "Yes.")), sparkle(("Q?", [14] * 9, "Yes.")),
                             sparkle(("IMAGE#14?", [14], "IMAGE#1 is."))])
    notes = []
    assert len(rounds_of(data, "sparkles_dialogue", tell=notes.append)) == 1
    assert sorted(notes) == [f"sparkles_dialogue: 1 records left out: {reason}" for reason in (
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
    data = folder(**LLAVA | {"x.jpg": IMAGE_BYTES.getvalue(),
                             "llava/detail_23k.json": [record("<image> Q?", "A.", id="001"), bad]})
    (data / "coco/train2017/link.jpg").symlink_to(data / "x.jpg")
    (data / "coco/train2017/loop.jpg").symlink_to("loop.jpg")
    with pytest.raises(ValueError, match=message) as error:
        read_datasets(data, ["llava"])
    assert str(data / "llava/detail_23k.json") in str(error.value) and "record 007" in str(error.value)
    assert "--skip-bad" in str(error.value)
    notes = []
    assert len(read_datasets(data, ["llava"], skip_bad=True, tell=notes.append)) == 1
    assert len(notes) == 1 and notes[0].startswith("llava: 1 bad records skipped") and "record 007" in notes[0]


@pytest.mark.parametrize("bad, message", [
    (sparkle(("Q?", [], "A.")) | {"dialogue": [{"role": "user", "content": "Q?"}]}, "found user"),
    ({"dialogue": []}, "found none"), ({}, "dialogue"), ("x", "TypeError"),
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
    ({"instruction": "Q?", "image_ids": ["CGD_IMG_a"], "rel_ins_ids": []}, "answer"), ("x", "TypeError"),
    (instruction(" ", ["CGD_IMG_a"]), "empty question"), (instruction("Q?", None), "NoneType"),
    (instruction("Q?", [3]), "none of its images")])
def test_a_bad_instruction_is_named(folder, bad, message):
    data = folder(**LLAVA, **{"MIMIC-IT/CGD_instructions.json": {"data": {"good": instruction("Q?", ["CGD_IMG_a"]),
                                                                          "bad": bad}}})
    notes = []
    try:
        read_datasets(data, ["otter_mimicit_cgd"], tell=notes.append)
    except ValueError as error:
        notes.append(str(error))
        assert "CGD_instructions.json, record bad" in notes[0]
    assert len(notes) == 1 and message in notes[0]


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


def test_the_parquet_flavour_is_notes_from_the_json_one(folder):
    data = folder(**{"MIMIC-IT/SD_instructions.json": {"data": {}}, "MIMIC-IT/SD.parquet": b"PAR1"})
    with pytest.raises(FileNotFoundError, match="no MIMIC-IT/SD.json .*JSON files, not the parquet ones"):
        read_datasets(data, ["otter_mimicit_sd"])


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
    assert f":<{data}/coco/train2017/a.jpg>### Question: What is it?\n### Answer:[[A cat.</s>]]" in printed
    assert "b.jpg is no readable image" in printed and "record 2: ValueError: no image 'z.jpg'" in printed
    assert "no MIMIC-IT/SD_instructions.json, MIMIC-IT/SD.json in" in printed
    header, *lines = printed.splitlines()[-12:-2]
    table = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert header.split()[:3] == ["dataset", "paper", "samples"] and [line[0] for line in table] == NAMES
    assert table[3][1:] == ["8006", *["missing"] * 6]
    assert table[0][1:5] == ["49924", "1", "0", "2"] and table[0][-1] == "0"
