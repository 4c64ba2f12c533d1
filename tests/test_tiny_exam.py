"""tiny/exam.py: each way asks what it says, right answers count, and the answers are greedy decoding's."""
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data import encode, to_tensors
from llama import Cache, Tokenizer
from tiny import exam, world
from visualchat import ModelConfig, build
from vit import load_pixels

WEIGHTS = Path(__file__).parent.parent / "weights/tiny"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder with small test sets."""
    folder = tmp_path_factory.mktemp("data")
    for test, seed, allowed in zip(world.TESTS, (1, 2), (world.SEEN, world.UNSEEN)):
        images = world.ImageFolder(folder / test / world.COCO, random.Random(seed))
        world.write_llava_dial(folder / test, 9, images, allowed, least_images=1)
    return folder


@pytest.fixture(scope="module")
def tiny_model():
    torch.manual_seed(0)
    return build(ModelConfig(llama=str(WEIGHTS / "llama"), vit=str(WEIGHTS / "vit")))


@pytest.fixture(scope="module")
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(WEIGHTS / "llama")


def test_a_test_set_asks_every_question_of_the_chosen_conversations(data):
    asked = exam.exam_questions(data / "test_seen", 4)
    assert len(asked) == 4 * 6 and asked == exam.exam_questions(data / "test_seen", 4)
    assert sorted(len(rounds) for rounds in asked) == sorted([*range(1, 7)] * 4)
    lengths = [len(rounds[-1].answer) for rounds in asked]
    assert lengths == sorted(lengths)
    whole = [rounds for rounds in asked if len(rounds) == 6]
    assert all(any(rounds == one[:len(rounds)] for one in whole) for rounds in asked)
    assert len(exam.exam_questions(data / "test_seen", 100)) == 9 * 6


def test_exact_and_blind_ask_after_the_rounds_before_with_their_answers(data):
    for rounds in exam.exam_questions(data / "test_seen", 9):
        for way in ("exact", "blind"):
            prompt = exam.prompt(rounds, way)
            assert prompt[:-1] == rounds[:-1] and all(each.answer for each in prompt[:-1])
            assert prompt[-1] == replace(rounds[-1], answer=None)


def test_alone_asks_in_a_first_round_that_shows_all_images(data):
    for rounds in exam.exam_questions(data / "test_unseen", 9):
        (only,) = exam.prompt(rounds, "alone")
        assert only.images == tuple(image for each in rounds for image in each.images)
        assert (only.question, only.answer) == (rounds[-1].question, None)


def test_blind_shows_zeros_and_the_other_ways_the_drawings(data, tiny_model, tiny_tokenizer, monkeypatch):
    shown = []
    monkeypatch.setattr(tiny_model, "image_tokens", lambda images, image_tokens=tiny_model.image_tokens:
                        shown.append(images) or image_tokens(images))
    prompts = [exam.prompt(rounds, "exact") for rounds in exam.exam_questions(data / "test_seen", 1)]
    exam.greedy_answers(tiny_model, tiny_tokenizer, prompts, blind=False)
    exam.greedy_answers(tiny_model, tiny_tokenizer, prompts, blind=True)
    files = [image for rounds in prompts for each in rounds for image in each.images]
    assert torch.equal(shown[0], torch.stack([load_pixels(file, 64) for file in files]))
    assert shown[1].shape == shown[0].shape and not shown[1].any()


def test_answers_are_those_of_greedy_decoding_without_cache_and_batch(data, tiny_model, tiny_tokenizer):
    prompts = [exam.prompt(rounds, "alone") for rounds in exam.exam_questions(data / "test_seen", 2)[::3]]
    found = exam.greedy_answers(tiny_model, tiny_tokenizer, prompts, blind=False)
    assert len(found) == len(prompts) and len(set(found)) > 1
    for rounds, answer in zip(prompts, found):
        example, ids = to_tensors(encode(rounds, tiny_tokenizer, 4), 64), []
        with torch.no_grad():
            x = tiny_model.embed(example["ids"][None], example["kind"][None],
                                 tiny_model.image_tokens(example["images"]))
            while len(ids) < exam.MAX_ANSWER and ids[-1:] != [tiny_tokenizer.eos]:
                said = tiny_model.llama.embed_tokens(torch.tensor([ids], dtype=torch.long))
                kind = torch.cat((example["kind"], torch.ones(len(ids), dtype=torch.long)))[None]
                cache = Cache(tiny_model.llama, 1, kind.shape[1])
                ids.append(int(tiny_model.prefill(torch.cat((x, said), dim=1), kind, cache).argmax()))
        assert answer == tiny_tokenizer.decode([id for id in ids if id != tiny_tokenizer.eos])


def asked_about(rounds) -> tuple:
    """The images shown and the question."""
    return tuple(image for each in rounds for image in each.images), rounds[-1].question


@pytest.fixture
def right(data) -> dict:
    """The right answer to everything that both test sets ask."""
    return {asked_about(rounds): rounds[-1].answer
            for test in world.TESTS for rounds in exam.exam_questions(data / test, 9)}


def test_a_model_that_answers_right_gets_all_marks_and_none_if_it_is_blind(data, tiny_model, right, monkeypatch):
    monkeypatch.setattr(exam, "greedy_answers", lambda model, tokenizer, prompts, blind:
                        ["gray" if blind else right[asked_about(rounds)] for rounds in prompts])
    rows = exam.run_exam(tiny_model, None, data, 9, quiet=True)
    assert {(row["exact"], row["alone"], row["blind"]) for row in rows} == {(1.0, 1.0, 0.0)}
    whole = [row for row in rows if row["topic"] == "all"]
    assert [(row["test"], row["images"]) for row in whole] == [
        (test, images) for test in world.TESTS for images in ("one", "several")]
    for test in world.TESTS:
        assert sum(row["questions"] for row in whole if row["test"] == test) == 9 * 6
        assert sum(row["questions"] for row in rows if row["test"] == test) == 2 * 9 * 6
    assert all(row["images"] == "several" for row in rows if row["topic"] in world.COMPARING)


def test_marks_are_counted_by_topic_and_a_blank_too_many_is_wrong(data, tiny_model, right, monkeypatch):
    def answers(model, tokenizer, prompts, blind):
        return [right[asked_about(rounds)] + " " * (world.topic_of(rounds[-1].question) != "color")
                for rounds in prompts]

    monkeypatch.setattr(exam, "greedy_answers", answers)
    rows = exam.run_exam(tiny_model, None, data, 9, quiet=True)
    for row in rows:
        if row["topic"] != "all":
            assert row["exact"] == row["alone"] == row["blind"] == (row["topic"] == "color"), row
            continue
        colors = sum(other["questions"] for other in rows if other["topic"] == "color"
                     and (other["test"], other["images"]) == (row["test"], row["images"]))
        assert row["exact"] == round(colors / row["questions"], 4)


def test_bars_are_shown_unless_the_exam_is_quiet(data, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(exam, "greedy_answers", lambda model, tokenizer, prompts, blind: ["no"] * len(prompts))
    exam.run_exam(tiny_model, None, data, 1, quiet=True)
    assert capsys.readouterr().err == ""
    exam.run_exam(tiny_model, None, data, 1)
    assert "exam, blind" in capsys.readouterr().err


def test_the_table_has_a_line_for_each_row():
    rows = [dict(test="test_seen", images="one", topic="all", questions=40, exact=0.975, alone=1.0, blind=0.25)]
    lines = exam.table_text(rows).splitlines()
    assert len(lines) == 4 and "gray images (blind)" in lines[1]
    assert lines[2].split() == ["test", "images", "topic", "questions", "exact", "alone", "blind"]
    assert lines[3].split() == ["test_seen", "one", "all", "40", "0.975", "1.0", "0.25"]
