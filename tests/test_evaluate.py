"""Claims about evaluate.py: answers are those of chat, files are read and written as the release has them."""
import csv
import html
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from chat import Chat
from data import Round
from evaluate import all_answers, hold_conversations, read_questions, write_answers, write_html
from training import ROOT
from visualchat import save

# The structure of the release's file: relative names, several images in one round, rounds without an image.
QUESTIONS = {"cats 1": [["Describe the image.", "./a.png"], ["And this?", "sub/b.png"], ["Which is red?"]],
             "cats 2": [["What differs?", "./a.png sub/b.png"], ["Say it again, <please>."]],
             "no image": [["Hello!"]]}


@pytest.fixture
def folder(image_files, tmp_path):
    (tmp_path / "sub").mkdir()
    shutil.copy(image_files[0], tmp_path / "a.png")
    shutil.copy(image_files[1], tmp_path / "sub/b.png")
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS))
    return tmp_path


@pytest.mark.parametrize("attention", ["mmca", "causal"])
def test_answers_are_those_of_chat_with_its_own_answers_in_the_history(model, tokenizer, image_files, attention):
    model.llama.attention, rng = attention, random.Random(0)
    conversations = [[Round(tuple(rng.choices(image_files, k=rng.randint(0, 2))), rng.choice(["?", "What is it?"]))
                      for _ in range(rng.randint(1, 4))] for _ in range(30)]
    found = dict(all_answers(model, tokenizer, conversations, at_once=7, max_new_tokens=9))
    for number, rounds in enumerate(conversations):
        chat = Chat(model, tokenizer)
        chat.max_new_tokens = 9
        assert found[number] == [chat.ask(each.question, *each.images) for each in rounds]
    assert len({answer for answers in found.values() for answer in answers}) > 5


def test_a_conversation_that_fills_the_context_is_held_alone_and_does_not_disturb_others(model, tokenizer,
                                                                                        image_files, capsys):
    model.llama.config = replace(model.llama.config, max_position_embeddings=90)
    short, (a, b) = [Round((image_files[0],), "?")], image_files[1:3]
    long = [Round((a,), "?"), *[Round((), "Is it?")] * 5, Round((b,) * 20, "Which?"), Round((), "What is it?")]
    alone = hold_conversations(model, tokenizer, [short], 9)[0]
    found = dict(all_answers(model, tokenizer, [long, short], at_once=2, max_new_tokens=9))
    assert found[1] == alone and [bool(answer) for answer in found[0]] == [True] * 6 + [False, True]
    assert re.fullmatch("no answer to 'Which\\?': \\d+ positions exceed the 90 .*\n", capsys.readouterr().err)


def test_a_file_as_the_release_has_it_becomes_conversations(folder):
    found = read_questions(folder / "questions.json", folder)
    assert found["cats 1"] == [Round((folder / "a.png",), "Describe the image."),
                               Round((folder / "sub/b.png",), "And this?"), Round((), "Which is red?")]
    assert found["cats 2"][0].images == (folder / "a.png", folder / "sub/b.png")
    assert found["no image"][0].images == ()


@pytest.mark.parametrize("questions, said", [
    ({}, "holds no conversation"), ({"x": []}, "x: expected a list of"), ({"x": "a"}, "x: expected a list of"),
    ({"x": [["Q?", "a.png", "b.png"]]}, "x: expected"), ({"x": [["Q?", 3]]}, "x: expected"),
    ({"x": [[" "]]}, "x: expected"), ({"x": [["Q?", "none.png"]]}, "x: no image .*none.png"),
    ({"x": [["Q?", "../a.png"]]}, "lies outside"), ({"x": [["Q?", "/etc/passwd"]]}, "lies outside"),
    ([], "holds a list")])
def test_what_is_not_as_expected_is_refused_with_the_file_and_the_conversation(folder, questions, said):
    (folder / "bad.json").write_text(json.dumps(questions))
    with pytest.raises((ValueError, FileNotFoundError), match=f"bad.json.*{said}"):
        read_questions(folder / "bad.json", folder)


def test_the_table_has_a_line_per_round_and_a_column_per_model(folder):
    questions = read_questions(folder / "questions.json", folder)
    answers = {model: [[f"{model}, {n}\n{i}" for i in range(len(rounds))]
                       for n, rounds in enumerate(questions.values())]
               for model in ("out/a", "out/b")}
    write_answers(folder / "answers.csv", questions, folder, answers)
    rows = list(csv.reader(open(folder / "answers.csv", newline="")))
    assert rows[0] == ["test_name", "image_path", "question", "answer out/a", "answer out/b"] and len(rows) == 7
    assert rows[4] == ["cats 2", "a.png sub/b.png", "What differs?", "out/a, 1\n0", "out/b, 1\n0"]
    write_answers(folder / "one.csv", questions, folder, {"out/a": answers["out/a"]})
    assert open(folder / "one.csv").readline() == "test_name,image_path,question,answer\n"
    write_html(folder / "answers.html", questions, answers)
    page = (folder / "answers.html").read_text()
    assert html.escape("Say it again, <please>.") in page and "<please>" not in page
    assert len(re.findall("<img src=\"data:image/webp", page)) == 4
    assert not re.search("(src|href)=\"(?!data:)", page)


def test_after_a_kill_the_same_command_goes_on_and_the_table_is_complete(overfitted, config, folder):
    for run in ("out/a", "out/b"):
        save(folder / run, {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    questions = {f"{name} {n}": rounds for n in range(40) for name, rounds in QUESTIONS.items()}
    (folder / "questions.json").write_text(json.dumps(questions))
    command = [sys.executable, str(ROOT / "evaluate.py"), "questions.json", "--model", "out/a", "out/b",
               "--max-new-tokens", "40", "--at-once", "2", "--html", "answers.html"]

    def begin():
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})

    run, partial = begin(), folder / "answers.csv.partial"
    deadline = time.time() + 60
    while not partial.exists() or partial.read_text().count("\n") < 20:
        assert run.poll() is None and time.time() < deadline
        time.sleep(0.02)
    run.kill()
    run.communicate()
    kept = [json.loads(line) for line in partial.read_text().splitlines()[1:20]]
    for one in kept:                                            # to see that it is not asked again
        one["answers"] = ["kept"] * len(one["answers"])
    partial.write_text("".join("\n" + json.dumps(one) for one in kept) + '\n{"asked": "ab')       # and half a line
    printed = begin().communicate(timeout=120)[0]
    assert "240 questions in 120 conversations, 2 models" in printed and not partial.exists(), printed
    rows = list(csv.DictReader(open(folder / "answers.csv", newline="")))
    assert len(rows) == 240 and all(row["answer out/a"] and row["answer out/b"] for row in rows)
    # Conversations that are alike, and models, share an answer.
    alike = {len(one["answers"]) for one in kept}
    assert sum(row["answer out/a"] == row["answer out/b"] == "kept" for row in rows) == 40 * sum(alike) < 240
    assert (folder / "answers.html").exists()
    assert "answers.csv exists: delete it" in begin().communicate(timeout=120)[0]
