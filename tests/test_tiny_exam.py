"""tiny/exam.py: conversations are held as in chat, right answers count, groups hold the questions they name."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluate import hold_conversations
from llama import Tokenizer
from tiny import exam, world
from tiny.exam import Marked, read_marked, run_exam, table, table_text, write_marked
from visualchat import ModelConfig, build

WEIGHTS = Path(__file__).parent.parent / "weights/tiny"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder with small test sets."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "TESTS", {name: replace(test, n=3) for name, test in world.TESTS.items()})
        world.ensure_tests(folder)
    return folder


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    monkeypatch.setattr(world, "TESTS", {name: replace(test, n=3) for name, test in world.TESTS.items()})


@pytest.fixture(scope="module")
def tiny_model():
    torch.manual_seed(0)
    return build(ModelConfig(llama=str(WEIGHTS / "llama"), vit=str(WEIGHTS / "vit")))


@pytest.fixture(scope="module")
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(WEIGHTS / "llama")


def test_blind_shows_gray_images_and_otherwise_the_drawings(data, tiny_model, tiny_tokenizer, monkeypatch):
    shown = []
    monkeypatch.setattr(tiny_model, "image_tokens", lambda images, image_tokens=tiny_model.image_tokens:
                        shown.append(images) or image_tokens(images))
    conversations = [rounds for rounds, _ in exam.read_test(data / "tests/unseen")]
    for seen in ((), (exam.gray,)):
        hold_conversations(tiny_model, tiny_tokenizer, conversations, exam.MAX_ANSWER, *seen)
    seeing, blind = torch.cat(shown[:6]), torch.cat(shown[6:])
    assert len(seeing) == len(blind) == sum(len(each.images) for rounds in conversations for each in rounds)
    assert all(image.unique().numel() > 9 for image in seeing) and blind.unique().tolist() == [128]


def test_every_question_is_asked_and_has_its_topic_and_the_number_of_images(data, tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(exam, "hold_conversations", lambda model, tokenizer, conversations, most, *blind:
                        asked.append(bool(blind)) or [["gray" if blind else each.answer for each in rounds]
                                                      for rounds in conversations])
    marked = run_exam(tiny_model, None, data)
    assert [one.test for one in marked] == ["seen"] * 18 + ["unseen"] * 18 + ["wordings"] * 18 + ["lower"] * 18 + [
        "long"] * 48 + ["people"] * 377
    assert asked == [False, True] * 2 + [False] * 3 + [False] * 4           # people's have four lengths
    assert all(one.answer == one.expected for one in marked)
    assert all(one.blind == ("gray" if one.test in exam.BLIND else "") for one in marked)
    for one in marked:
        assert one.topic not in ("all", "same", "changed") or one.images > 1
        assert one.topic != "absent" or one.expected.startswith("There is no ")
    assert max(one.images for one in marked if one.test == "long") == 3     # of the first three conversations
    lines = table(marked)
    assert {line["right"] for name, line in lines.items() if line["questions"]} == {100.0, 0.0}
    assert lines["good questions refused"]["right"] == 0 and lines["seen pairs, one image"]["blind"] == 0
    assert lines["wordings never seen"]["blind"] is None and "-\n" in table_text(lines)


def one(**given) -> Marked:
    return replace(Marked("seen", 0, 1, 1, "color", "What color is it?", "red", "red", "red"), **given)


@pytest.mark.parametrize("name, inside, outside", [
    ("seen pairs, one image", one(), one(images=2)),
    ("seen pairs, several", one(images=3), one(test="unseen", images=3)),
    ('unseen pairs, "which"', one(test="unseen", topic="which"), one(test="unseen", topic="any")),
    ("wordings never seen", one(test="wordings"), one(test="wordings", topic="outside")),
    ("lower case, no marks", one(test="lower"), one(test="long")),
    ("rounds 13 to 16", one(test="long", round=13, images=8), one(test="long", round=12)),
    ("rounds 13 to 16, up to 3 images", one(round=16, images=3), one(round=16, images=4)),
    ("5 images", one(test="long", images=5), one(test="long", images=4)),
    ("absent image", one(topic="absent"), one()), ("outside of its world", one(topic="outside"), one()),
    ("small talk", one(topic="hello"), one()), ("people's own words", one(test="people", topic="people"), one()),
    ("before the first image", one(images=0), one(test="people", topic="people", images=0))])
def test_a_group_counts_what_its_name_says(name, inside, outside):
    assert exam.GROUPS[name](inside) and not exam.GROUPS[name](outside)


def test_shares_errors_and_the_weakest_topic_are_worked_out():
    marked = ([one(answer="blue")] * 10 + [one()] * 30
              + [one(topic="size", expected="big", answer="big", blind="big")] * 60
              + [one(topic="place", answer="no")] * 4                       # too few for the weakest topic
              + [one(topic="shape", answer="There is no such image.")] * 2)
    line = table(marked)["seen pairs, one image"]
    assert (line["questions"], line["topic"]) == (106, "color")
    assert line["right"] == pytest.approx(100 * 90 / 106) and line["weakest"] == pytest.approx(75)
    assert line["error"] == pytest.approx(100 * (90 * 16 / 106 ** 3) ** 0.5)
    assert line["blind"] == pytest.approx(100.0)
    assert table(marked)["good questions refused"]["right"] == pytest.approx(100 * 2 / 106)
    assert "seen pairs, one image" in table_text(table(marked)) and "84.9" in table_text(table(marked))


def test_a_folder_that_is_no_result_ends_the_exam_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["exam.py", "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="^tiny/exam.py: no .*trained.safetensors"):
        exam.main()


def test_eval_csv_is_read_as_it_was_written(tmp_path):
    marked = [one(question='Is it "red", or not?\n', answer=""), one(round=7, images=8)]
    write_marked(marked, tmp_path / "eval.csv")
    assert read_marked(tmp_path / "eval.csv") == marked
