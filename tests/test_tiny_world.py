"""tiny/world.py: questions have one right answer, held-out pairs stay out, files are what the readers expect."""
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from pixels import load_pixels, read_image
from sources import SOURCES, TAGS, read_datasets
from tiny import world
from tiny.wording import ABOUT_ONE, COMPARING, TOPICS, Wording

ROOT = Path(__file__).parent.parent


def in_words(parts: list[str], none: str) -> str:
    return re.sub(r", (?=[^,]*$)", " and ", ", ".join(parts)) or none


def right_answer(question: str, scenes: list) -> str:
    """An answer worked out from the words of a plain question alone."""
    question = re.sub(r"the image\b", f"image {len(scenes)}", question)
    numbers = [int(digit) - 1 for digit in re.findall(r"\d", question)]
    if question.startswith("Describe"):
        chosen = scenes if "the images" in question else [scenes[numbers[0]]]
        return " ".join("A {} {} {} at the {}.".format(*scene) for scene in chosen)
    if question.startswith("What changed"):
        a, b = (scenes[i] for i in numbers)
        return in_words([f"the {name}" for name, x, y in zip(("size", "color", "shape", "place"), a, b) if x != y],
                        none="nothing")
    if question.startswith("Do image"):
        place = ("size", "color", "shape", "place").index(question.rstrip("?").split()[-1])
        return "yes" if scenes[numbers[0]][place] == scenes[numbers[1]][place] else "no"
    if question.startswith("Is the"):
        return "yes" if question.rstrip("?").split()[-1] in scenes[numbers[0]] else "no"
    if question.startswith(("Does any", "Which")):
        (value,) = set(question.rstrip("?").split()) & set(world.VALUES)
        having = [f"image {i}" for i, scene in enumerate(scenes, 1) if value in scene]
        if question.startswith("Which"):
            return in_words(having, none="none of them")
        return "yes" if having else "no"
    place = 3 if question.startswith("Where") else ("size", "color", "shape").index(question.split()[1])
    return scenes[numbers[0]][place]


def numbered(text: str) -> str:
    """The text with images called by their numbers: Sparkles calls them in four ways."""
    for names in TAGS:
        for i, name in enumerate(names, 1):
            text = re.sub(rf"\b{name}\b", f"image {i}", text)
    return text


def plain(patch):
    """Let all questions be in plain words, so that `right_answer` understands them."""
    words = Wording.words
    patch.setattr(Wording, "question", lambda self, ask, names, short, rng:
                  words(Wording(plain=True), replace(ask, again=False), names, False, rng))
    patch.setattr(world, "name_of", lambda image, latest, rng: f"image {image + 1}")
    patch.setattr(world, "LATEST", ["the image"])


BESIDE = {"hello": "Hello!", "thanks": "You are welcome.", "bye": "Goodbye!", "outside": "I cannot tell."}
BESIDES = {*BESIDE.values(), "There is no image yet.", "There is no such image."}


def test_every_question_has_its_one_right_answer(monkeypatch):
    plain(monkeypatch)
    rng, topics = random.Random(0), Counter()
    for _ in range(400):
        scenes, rounds = world.dialogue(rng.randint(1, 8), rng.choice([6, 16]), rng, world.ALL_SCENES)
        shown = []
        for new, topic, question, answer in rounds:
            shown = shown + new
            topics[topic] += 1
            if topic == "absent":
                numbers = [int(digits) for digits in re.findall(r"\d+", question)]
                assert answer == ("There is no such image." if shown else "There is no image yet.")
                assert not shown or max(numbers) > len(shown) or 0 in numbers
            elif topic in BESIDE:
                assert answer == BESIDE[topic]
            else:
                assert answer == right_answer(question, shown)
                assert {int(digits) for digits in re.findall(r"\d+", question)} <= set(range(1, len(shown) + 1))
        assert shown == scenes
    assert set(topics) == set(TOPICS) and min(topics.values()) > 20


def test_the_share_of_rounds_beside_the_images_and_the_late_start():
    rng, beside, first = random.Random(0), 0, Counter()
    for _ in range(400):
        rounds = world.dialogue(2, 6, rng, world.SEEN)[1]
        beside += sum(topic not in (*ABOUT_ONE, *COMPARING) for _, topic, *_ in rounds)
        first[[bool(new) for new, *_ in rounds].index(True)] += 1
        assert sum(len(new) for new, *_ in rounds[:4]) == 2            # all images come by the middle
    assert 0.12 < beside / 2400 < 0.24 and 0.08 < 1 - first[0] / 400 < 0.25
    assert set(first) == {0, 1, 2, 3}                   # people may ask several times before they show an image
    assert all(topic in (*ABOUT_ONE, *COMPARING) for _ in range(50)
               for _, topic, *_ in world.dialogue(2, 6, rng, world.SEEN, beside_share=0)[1])


def test_no_topic_of_question_can_be_guessed():
    rng, answers = random.Random(0), {}
    for _ in range(9000):
        for _, topic, _, answer in world.dialogue(rng.choice([2, 3]), 6, rng, world.SEEN)[1]:
            answers.setdefault(topic, []).append(answer)
    bounds = {"any": .55, "same": .6, "is": .55, "which": .4, "size": .55}
    for topic in (*ABOUT_ONE, *COMPARING):
        given = answers[topic]
        commonest = max(given.count(answer) for answer in set(given)) / len(given)
        assert commonest < bounds.get(topic, .3), topic


def test_held_out_pairs_are_in_one_world_alone():
    assert len(world.ALL_SCENES) == 240 and len(world.UNSEEN) == 60
    assert not world.SEEN & world.UNSEEN and world.SEEN | world.UNSEEN == world.ALL_SCENES
    assert all(((color, shape) in world.HELD_OUT) == ((size, color, shape, place) in world.UNSEEN)
               for size, color, shape, place in world.ALL_SCENES)
    values = [{value for scene in scenes for value in scene} for scenes in (world.SEEN, world.UNSEEN)]
    assert values[0] == values[1]
    rng = random.Random(0)
    for _ in range(200):
        assert set(world.dialogue(3, 6, rng, world.SEEN)[0]) <= world.SEEN
        assert set(world.dialogue(3, 6, rng, world.UNSEEN)[0]) <= world.UNSEEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small world."""
    folder = tmp_path_factory.mktemp("world")
    world.write_world(folder, 60, seed=3)
    return folder


def test_the_world_holds_all_nine_datasets(folder):
    for name in SOURCES:
        conversations = read_datasets(folder, [name], tell=pytest.fail)     # nothing is left out
        assert conversations, name
        files = [[file for each in conversation.rounds for file in each.images] for conversation in conversations]
        assert {len(shown) for shown in files} <= set(range(1, 9))
        assert all(len(set(shown)) == len(shown) for shown in files)
        for file in files[0]:
            assert load_pixels(file, 16).shape == (3, 16, 16)


def test_every_answer_in_every_dataset_is_right(folder):
    """Images are known by their bytes: drawn again from the same seed, each reveals its scene."""
    known = {}

    def noted(scene, rng, *side, draw_scene=world.draw_scene):
        image = draw_scene(scene, rng, *side)
        known[image.tobytes()] = scene
        return image

    with pytest.MonkeyPatch.context() as patch:
        plain(patch)
        patch.setattr(world, "draw_scene", noted)
        patch.setattr(Image.Image, "save", lambda image, file, *args, save=Image.Image.save, **settings:
                      save(image, file, "PNG"))                 # so that the bytes can be recognized
        lossless = folder.parent / "lossless"
        world.write_world(lossless, 60, seed=3)
    for conversation in read_datasets(lossless, SOURCES, tell=pytest.fail):
        shown = []
        for each in conversation.rounds:
            shown += [known[read_image(file).tobytes()] for file in each.images]
            question = numbered(each.question)
            if each.answer not in BESIDES:
                assert numbered(each.answer) == right_answer(question, shown), (conversation.name, each)


def test_the_same_seed_draws_the_same_files_and_another_seed_others(folder, tmp_path):
    world.write_world(tmp_path / "again", 60, seed=3)
    world.write_world(tmp_path / "other", 60, seed=4)
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*.j*")) if file.suffix != ".index"]
    assert len(files) > 200
    assert all((tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes() for file in files)
    assert (tmp_path / "other/llava/detail_23k.json").read_text() != (folder / "llava/detail_23k.json").read_text()


def test_what_is_there_is_not_drawn_again_and_what_is_missing_is(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "N_CONVERSATIONS", 50)
    monkeypatch.setattr(world, "TESTS", {name: replace(test, n=8) for name, test in world.TESTS.items()})
    world.ensure(tmp_path)
    assert not (tmp_path / "tests").exists()                    # training does not wait for the exam's drawings
    folders = world.ensure_tests(tmp_path)
    assert [folder.name for folder in folders] == ["seen", "unseen", "wordings", "lower", "long"]
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.j*")}
    for folder in folders:
        records = json.loads((folder / "llava/conversation_58k.json").read_text())
        assert len(records) == 8
        assert all(len(record["topics"]) * 2 == len(record["conversations"]) for record in records)
    (tmp_path / "tests/unseen/llava/conversation_58k.json").unlink()
    world.ensure(tmp_path)
    world.ensure_tests(tmp_path)
    drawn_again = {file.relative_to(tmp_path).parts[:2] for file, time in files.items()
                   if not file.exists() or file.stat().st_mtime_ns != time}
    assert drawn_again == {("tests", "unseen")}


def test_dialogues_about_several_images_are_one_conversation_each(folder):
    several = read_datasets(folder, ["llava_dial"])
    assert len(several) == 60
    assert {sum(len(each.images) for each in conversation.rounds) for conversation in several} == set(range(2, 9))
    for conversation in several:
        files = [file for each in conversation.rounds for file in each.images]
        assert files == sorted(files) and len(conversation.rounds) == 6
        assert all(Image.open(file).size == (224, 224) and file.suffix == ".jpg" for file in files)


def test_llava_records_are_in_the_official_format(folder):
    for record in json.loads((folder / "llava/detail_23k.json").read_text()):
        assert set(record) == {"id", "image", "conversations"} and isinstance(record["image"], str)
        assert record["conversations"][0]["value"].endswith("\n<image>")
        assert [message["from"] for message in record["conversations"]] == ["human", "gpt"] * 3


def test_images_of_one_scene_differ():
    rng = random.Random(0)
    a, b = (world.draw_scene(("big", "red", "star", "left"), rng) for _ in range(2))
    assert ImageChops.difference(a, b).getbbox()


def test_the_committed_examples_are_what_the_command_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "ensure", lambda data: None)
    monkeypatch.setattr(world, "ensure_tests", lambda data: None)
    monkeypatch.setattr("sys.argv", ["world.py"])
    monkeypatch.chdir(tmp_path)
    world.main()
    for name in world.EXAMPLES:
        drawn, committed = (Image.open(folder / "examples" / name) for folder in (tmp_path, ROOT))
        assert ImageChops.difference(drawn, committed).getbbox() is None
