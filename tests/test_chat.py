"""Claims about chat.py: the cache, new images, streaming, taking back, saving, no need of deepspeed."""
import contextlib
import copy
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

import chat as program
from album import digest_of
from chat import Chat, ContextFull
from data import Round, encode_round
from llama import Cache
from mmca import IMAGE, TEXT
from pixels import load_pixels
from saved import load_conversation, save_conversation
from terminal import newest
from visualchat import TRAINED, Sampling, save

ROOT = Path(__file__).parent.parent


@pytest.fixture
def chat(model, tokenizer):
    return Chat(model, tokenizer)


def ask(chat, files, limit=8, pieces=None):
    """The answer's ids; pieces: how many to take before the answer is closed."""
    chat.max_new_tokens = limit
    answer = chat.stream("?", *files)
    list(islice(answer, pieces))
    answer.close()
    return chat.rounds[-1].ids


def embedded(chat, ids, kind, files):
    """Embeddings of a whole conversation with these images."""
    images = torch.stack([load_pixels(file, 16) for file in files] or [torch.zeros(3, 16, 16)])
    return chat.model.embed(ids, kind, chat.model.image_tokens(images)[:len(files)])


def from_scratch(chat):
    """The last answer's tokens again and the one after, from the whole history at once, encoded by data.py."""
    history, shown = [], 0
    for one in chat.rounds:
        images = one.images if history else (*chat.left.images, *one.images)
        new = encode_round(Round(images, one.question), shown, not history, chat.tokenizer, 4)
        history += list(zip(new.ids, new.kind)) + [(id, TEXT) for id in (*one.ids, chat.tokenizer.eos)]
        shown += len(images)
    answer = chat.rounds[-1].ids
    cache = Cache(chat.model.llama, 1, 512)
    ids, kind = (torch.tensor([values[:-len(answer) - 1]]) for values in zip(*history))
    with torch.no_grad():
        logits = chat.model.prefill(embedded(chat, ids, kind, chat.images), kind, cache)
    return [token.item() for token in islice(chat.model.generate(logits, cache), len(answer) + 1)]


# ---- the cache ----

def test_answers_equal_those_from_the_whole_history(chat, image_files):
    said, ended = set(), []
    for new, limit, pieces in (([0, 1], 60, None), ([], 40, 3), ([2], 7, None), ([], 40, 1), ([3, 0], 60, None)):
        answer = ask(chat, [image_files[i] for i in new], limit, pieces)
        *again, after = from_scratch(chat)
        assert answer == again
        assert pieces or len(answer) == limit or after == chat.tokenizer.eos
        assert pieces or chat.rounds[-1].has_ended == (len(answer) < limit)
        said, ended = said | set(answer), ended + [after == chat.tokenizer.eos]
    assert len(said) > 8 and len(set(ended)) == 2               # many tokens; some answers end, some are cut


def test_the_cache_holds_what_a_full_forward_pass_gives(chat, image_files):
    ask(chat, image_files[:2])
    ask(chat, image_files[2:3], 40, pieces=4)
    encoded, whole = chat.encoded(), Cache(chat.model.llama, 1, 512)
    ids, kind = torch.tensor([encoded.ids]), torch.tensor([encoded.kind])
    with torch.no_grad():
        chat.model.llama(embedded(chat, ids, kind, image_files[:3]), kind, cache=whole)
    texts, shown = (chat.cache.past[0].count(its_kind) for its_kind in (TEXT, IMAGE))
    assert (texts + shown, shown) == (len(encoded.ids) - 2, 12)         # the last word and </s> are yet to come
    for found, expected, count in ((chat.cache.text, whole.text, texts), (chat.cache.image, whole.image, shown)):
        for (ours,), (full,) in zip(found, expected):
            torch.testing.assert_close(ours[:, :, :count], full[:, :, :count], atol=1e-4, rtol=0)


@pytest.mark.parametrize("forward", [0, 4], ids=["reading the question", "answering"])
def test_ctrl_c_in_the_middle_of_a_forward_pass_leaves_a_sound_conversation(chat, image_files, forward):
    ask(chat, image_files[:1])
    seen = []

    def interrupt(*_):
        seen.append(1)
        if len(seen) == forward + 1:
            raise KeyboardInterrupt

    halfway = chat.model.llama.layers[1].post_attention_layernorm       # the cache holds a part already
    hook = halfway.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ask(chat, image_files[1:2])
    hook.remove()
    assert len(chat.rounds) == (2 if forward else 1)
    answer = ask(chat, image_files[3:])
    assert answer == from_scratch(chat)[:-1] != []


@pytest.mark.parametrize("attention", ["causal", "written"])
def test_answers_under_other_attention_equal_those_from_the_whole_history(chat, image_files, attention):
    chat.model.llama.attention = attention
    for files in (image_files[:2], [], image_files[2:3]):
        assert ask(chat, files) == from_scratch(chat)[:-1]
        chat.undo()
        assert ask(chat, files) == from_scratch(chat)[:-1]


def test_answers_of_100_random_conversations_equal_those_from_the_whole_history(chat, image_files, tmp_path):
    """Also after undo, again, saving and loading, answers that somebody stopped, and oldest rounds left out."""
    chat.model.llama.config = replace(chat.model.llama.config, max_position_embeddings=110)
    done = Counter()
    for number in range(100):
        rng = random.Random(number)
        chat.clear()
        chat.forgets = rng.random() < .5
        for _ in range(rng.randint(2, 7)):
            action = rng.choice(["ask", "ask", "ask", "stop", "undo", "again", "load"])
            if action in ("undo", "again") and not chat.rounds:
                continue
            if action == "load":
                save_conversation(chat, tmp_path / "talk.json")
                chat.clear()
                load_conversation(chat, tmp_path / "talk.json")
            if action == "undo":
                chat.undo()
            last = chat.undo() if action == "again" else None
            if action in ("ask", "stop", "again"):
                before = len(chat.rounds)
                files = last.images if last else rng.choices(image_files, k=rng.choice([0, 0, 1, 2]))
                try:
                    answer = ask(chat, files, rng.randint(1, 20), 1 if action == "stop" else None)
                except ValueError as error:
                    assert "positions exceed the 110" in str(error)
                    action = "full"
                else:
                    assert answer == from_scratch(chat)[:len(answer)]
                    action = "forget" if len(chat.rounds) <= before else action
            done[action] += 1
    assert min(done[action] for action in ("ask", "stop", "undo", "again", "load", "full", "forget")) > 4, done


# ---- taking back, saving, loading, the end of the context ----

def test_a_round_that_is_taken_back_leaves_no_trace(chat, image_files):
    ask(chat, image_files[:1])
    before, second = state(chat), ask(chat, image_files[1:3])
    assert chat.undo().images == tuple(image_files[1:3]) and chat.rounds == before[0]
    assert ask(chat, image_files[1:3]) == second
    chat.undo()
    chat.undo()
    assert chat.images == [] and not chat.cache.past[0]
    with pytest.raises(ValueError, match="no round yet"):
        chat.undo()


def test_a_saved_conversation_goes_on_with_the_same_answers(chat, image_files, tmp_path):
    ask(chat, image_files[:2])
    ask(chat, [])
    save_conversation(chat, tmp_path / "talk.json")
    expected, loaded = ask(chat, image_files[2:3]), Chat(chat.model, chat.tokenizer)
    load_conversation(loaded, tmp_path / "talk.json")
    assert [one.question for one in loaded.rounds] == ["?", "?"] and loaded.images == image_files[:2]
    assert ask(loaded, image_files[2:3]) == expected


def test_an_image_without_a_file_is_shown_saved_and_loaded(chat, image_files, tmp_path):
    image = Image.open(image_files[0])
    said = chat.ask("?", image, str(image_files[1]), image_files[2])
    assert chat.rounds[0].digests[1] == digest_of(image_files[1]) and isinstance(said, str)
    save_conversation(chat, tmp_path / "talk.json")
    other = Chat(chat.model, chat.tokenizer)
    load_conversation(other, tmp_path / "talk.json")
    assert torch.equal(load_pixels(other.images[0], 16), load_pixels(image_files[0], 16))
    assert other.ask("And now?") == chat.ask("And now?")


@pytest.mark.parametrize("damage", [
    lambda talk: talk.pop("rounds"), lambda talk: talk.update(rounds=7), lambda talk: talk["rounds"].append(None),
    lambda talk: talk["rounds"][0].pop("images"), lambda talk: talk["rounds"][0].update(images=[3]),
    lambda talk: talk["rounds"][0].update(question=None), lambda talk: talk["rounds"][0].update(answer=["a"]),
    lambda talk: talk["rounds"][0].update(images=["none.png"]),
    lambda talk: talk["rounds"][0].update(images=["data:image/png;base64,!"])])
def test_a_damaged_conversation_is_refused_and_the_present_one_stays(chat, image_files, tmp_path, damage):
    ask(chat, image_files[:1])
    save_conversation(chat, file := tmp_path / "talk.json")
    damage(talk := json.loads(file.read_text()))
    file.write_text(json.dumps(talk))
    before = state(chat)
    with pytest.raises((ValueError, OSError), match="talk.json|none.png"):
        load_conversation(chat, file)
    assert state(chat) == before


def test_a_full_conversation_can_be_loaded_and_the_next_question_says_so(chat, image_files, tmp_path):
    ask(chat, image_files[:1])
    chat.rounds[0].question = "a " * 600
    save_conversation(chat, tmp_path / "talk.json")
    load_conversation(chat, tmp_path / "talk.json")
    with pytest.raises(ContextFull, match="positions exceed the 512 of the context"):
        chat.ask("?")
    chat.forgets = True
    chat.ask("?")
    assert len(chat.rounds) == 1 and chat.images == image_files[:1]


def test_ids_of_another_tokenizer_are_made_anew_from_the_text(chat, image_files, tmp_path):
    ask(chat, image_files[:1])
    save_conversation(chat, file := tmp_path / "talk.json")
    talk = json.loads(file.read_text())
    for ids in ([10 ** 6], [-1], "a", [1.5], None):
        talk["rounds"][0] |= {"ids": ids, "answer": "A cat."}
        file.write_text(json.dumps(talk))
        load_conversation(chat, file)
        assert chat.rounds[0].ids == chat.tokenizer.encode("A cat.")


def test_the_oldest_rounds_are_left_out_but_no_image_where_the_context_is_full(chat, image_files):
    for files in (image_files[:1], [], image_files[1:2], []):
        ask(chat, files)
    chat.model.llama.config = replace(chat.model.llama.config,
                                      max_position_embeddings=len(chat.encoded().ids) + 10)
    with pytest.raises(ValueError, match="positions exceed .* --forget"):
        ask(chat, image_files[2:3])
    chat.forgets, given = True, []
    chat.model.vit.register_forward_pre_hook(lambda _, args: given.append(len(args[0])))
    ask(chat, [])
    assert len(chat.rounds) < 5 and chat.images == image_files[:2] and not given     # the images are known
    assert chat.rounds[-1].ids == from_scratch(chat)[:-1]


def test_images_of_rounds_that_were_left_out_stay_when_the_last_round_is_taken_back(chat, image_files, tmp_path):
    for files in (image_files[:1], image_files[1:2]):
        ask(chat, files)
    limit = len(chat.encoded().ids) + 10
    chat.model.llama.config = replace(chat.model.llama.config, max_position_embeddings=limit)
    chat.forgets = True
    ask(chat, image_files[2:3])
    assert len(chat.rounds) == 1 and chat.left.images == tuple(image_files[:2])
    save_conversation(chat, tmp_path / "talk.json")
    chat.undo()
    assert chat.rounds == [] and chat.images == image_files[:2]
    assert ask(chat, []) == from_scratch(chat)[:-1]
    load_conversation(chat, tmp_path / "talk.json")
    assert chat.images == image_files[:3] and chat.digests == [digest_of(file) for file in image_files[:3]]
    chat.clear()
    assert chat.images == [] and chat.left.images == ()


def test_a_question_that_fails_brings_back_what_was_left_out_for_it(chat, image_files, tmp_path):
    for _ in range(3):
        ask(chat, [])
    limit = len(chat.encoded().ids) + 10
    chat.model.llama.config = replace(chat.model.llama.config, max_position_embeddings=limit)
    chat.forgets, before = True, copy.deepcopy(chat.rounds)
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ValueError, match="bad.png"):
        chat.ask("?", tmp_path / "bad.png")
    assert chat.rounds == before and chat.left.images == ()
    chat.model.llama.config = replace(chat.model.llama.config, max_position_embeddings=512)
    assert ask(chat, image_files[:1]) == from_scratch(chat)[:-1]


def test_an_image_that_changed_since_it_was_saved_is_refused(chat, image_files, tmp_path):
    shutil.copy(image_files[0], file := tmp_path / "a.png")
    ask(chat, [file])
    save_conversation(chat, tmp_path / "talk.json")
    shutil.copy(image_files[1], file)
    with pytest.raises(ValueError, match="a.png has changed since"):
        load_conversation(chat, tmp_path / "talk.json")
    file.write_text("no image")
    with pytest.raises(ValueError, match="a.png is no readable image"):
        load_conversation(chat, tmp_path / "talk.json")


# ---- images and limits ----

def test_a_later_image_gets_the_next_number(chat, image_files):
    for files in (image_files[:2], [], image_files[2:3]):
        ask(chat, files)
    encoded = chat.encoded()
    text = chat.tokenizer.decode([i for i, kind in zip(encoded.ids, encoded.kind) if kind != IMAGE])
    assert re.findall(r"### Image (\d+):", text) == ["1", "2", "3"] and chat.images == image_files[:3]


def state(chat):
    return copy.deepcopy(chat.rounds), list(chat.cache.past)


@pytest.mark.parametrize("content", [None, b"", b"no image at all"], ids=["absent", "empty", "text"])
def test_an_unreadable_image_leaves_the_conversation_as_it_was(chat, image_files, tmp_path, content):
    bad = tmp_path / "bad.png"
    if content is not None:
        bad.write_bytes(content)
    ask(chat, image_files[:1])
    before = state(chat)
    with pytest.raises((OSError, ValueError), match="bad.png"):
        chat.ask("?", image_files[1], bad)
    assert state(chat) == before
    assert ask(chat, image_files[1:2])


def test_a_full_context_is_refused_and_leaves_the_conversation_as_it_was(chat, image_files):
    ask(chat, image_files[:1])
    said = len(chat.encoded().ids)
    new = len(encode_round(Round((), "?"), 1, False, chat.tokenizer, 4).ids)
    chat.model.llama.config = replace(chat.model.llama.config, max_position_embeddings=said + new)
    before = state(chat)
    with pytest.raises(ValueError, match=f"{said + new} positions .* {said + new} .*: /clear starts over"):
        chat.ask("?")
    assert state(chat) == before
    chat.model.llama.config = replace(chat.model.llama.config, max_position_embeddings=said + new + 1)
    assert len(ask(chat, [])) == 1


# ---- streaming ----

@pytest.mark.parametrize("text", ["A cat.", "é 猫 🐈 x", "🐈🐈", "  two\n", ""])
def test_pieces_join_to_the_answer_and_hold_whole_characters(chat, text):
    ids = [*chat.tokenizer.encode(text), chat.tokenizer.eos]
    chat.model.generate = lambda *_: (torch.tensor([i]) for i in ids)      # a character takes up to four
    pieces = list(chat.stream("?"))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert chat.encoded().ids[-len(ids):] == ids


def test_an_answer_cut_within_a_character_shows_all_that_was_decoded(chat):
    ids = chat.tokenizer.encode("A 🐈")[:-1]
    chat.model.generate = lambda *_: (torch.tensor([i]) for i in ids)
    assert chat.ask("?") == chat.tokenizer.decode(ids)


def test_a_question_has_no_line_breaks_as_in_training_and_images_are_no_list(chat, image_files):
    chat.ask(" What\nis  it?\n", image_files[0])
    assert chat.rounds[0].question == "What is it?"
    with pytest.raises(TypeError, match="found a list; several images are given one after the other"):
        chat.ask("?", image_files[:2])


def test_an_answer_that_is_half_read_and_still_held_does_not_disturb_the_next_question(chat, image_files):
    chat.max_new_tokens = 30
    held = chat.stream("?", image_files[0])
    first = next(held)
    chat.ask("?")
    assert chat.rounds[1].ids == from_scratch(chat)[:-1] and list(held) == []
    assert chat.answer_of(chat.rounds[0]) == first


def test_the_same_seed_draws_the_same_answers(chat):
    chat.sampling, chat.max_new_tokens, said = Sampling(temperature=1.5, top_k=20), 12, []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        chat.clear()
        said.append([chat.ask("?"), chat.ask("Is it?")])
    assert said[0] == said[1] != said[2]


# ---- the program ----

def test_the_newest_result_is_taken_or_the_one_that_comes_with_the_code(tmp_path, capsys):
    assert newest(tmp_path).absolute() == ROOT / "weights/tiny/chat"
    assert f"{tmp_path}/ holds no training result, so this is the tiny one" in capsys.readouterr().out
    for name, moment in (("a", 1e9), ("b", 3e9), ("c", 2e9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / TRAINED).touch()
        os.utime(tmp_path / name / TRAINED, (moment, moment))
    assert newest(tmp_path) == tmp_path / "b" and not capsys.readouterr().out


# Huge weights end in zeros: x / rms(x) with rms infinite.
@pytest.mark.parametrize("value", [torch.nan, 0.0])
def test_numbers_that_are_none_end_a_round_with_a_sentence_and_not_with_noise(chat, monkeypatch, value):
    monkeypatch.setattr(type(chat.model), "prefill", lambda *_, **__: torch.full((1, 9), value))
    with pytest.raises(ValueError, match="values that are no finite numbers, or all the same: are its"):
        chat.ask("What is it?")
    assert chat.rounds == [] and not any(chat.cache.past)


@pytest.mark.parametrize("lines, status", [
    (b"What is it?\n", 0), (b"none.png ?\nWhat is it?\n", 1), (b"Is it \xff?\nWhat is it?\n", 0)])
def test_a_bad_line_from_another_program_shows_in_the_exit_status(overfitted, config, tmp_path, monkeypatch, lines,
                                                                  status):
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path / "run")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    with pytest.raises(SystemExit, match="1") if status else contextlib.nullcontext():
        program.main()
    assert not sys.stdin.read()                                 # all lines were read


@pytest.mark.parametrize("given, said", [
    (["--temperature", "-1"], "0 or more"), (["--temperature", "inf"], "0 or more"),
    (["--top-p", "0"], "at most 1"), (["--top-p", "0.5"], "do nothing without a temperature"),
    (["--keep", str(ROOT / "README.md")], "--keep"), (["--question", " "], "--question: an empty one"),
    ([str(ROOT / "none.png"), "--question", "?"], "no image")])
def test_a_bad_setting_ends_the_program_with_a_line(overfitted, config, tmp_path, monkeypatch, capsys, given,
                                                           said):
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path / "run"), *given])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert said in f"{end.value} {capsys.readouterr().err}"


def test_the_program_answers_where_deepspeed_cannot_be_imported(overfitted, config, image_files, tmp_path):
    c, model = image_files[2], overfitted[2]                       # trained to give the two answers below
    save(tmp_path / "out/run", {name: p for name, p in model.named_parameters() if p.requires_grad}, config)
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/deepspeed.py").write_text("raise ImportError('no deepspeed here')")

    def python(*args):
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "stub")}
        return subprocess.run([sys.executable, *args], cwd=tmp_path, env=environment, capture_output=True,
                              text=True)

    assert "no deepspeed here" in python("-c", "import deepspeed").stderr
    done = python(ROOT / "chat.py", "--question", "What is it?", "--question", f'What is image 1? "{c}"')
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["out/run: LLaMA-2 tiny, mmca, on cpu", "> What is it?", "Question 1.",
                                        "note: no image is shown yet: name a file to show one",
                                        f'> What is image 1? "{c}"', f"image 1: {c}", "You look at it."]


def run_program(monkeypatch, folder, *options):
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(folder), "--question", "What is it?", *options])
    program.main()


def test_compiling_is_asked_for_on_the_command_line(overfitted, config, tmp_path, monkeypatch, capsys):
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    calls = []
    monkeypatch.setattr(program, "compile_step", lambda llama: calls.append(llama) or llama.next_logits)
    for extra in ([], ["--compile"]):                           # tests/test_decode.py compiles
        assert not calls
        run_program(monkeypatch, tmp_path / "run", *extra)
    assert len(calls) == 1 and capsys.readouterr().out.count("Question 1.") == 2

    def failing(llama):
        raise RuntimeError("the compiler fails")

    monkeypatch.setattr(program, "compile_step", failing)
    with pytest.raises(SystemExit, match="compiler fails\n.*try without"):
        run_program(monkeypatch, tmp_path / "run", "--compile")
    monkeypatch.setenv("PATH", str(tmp_path))                   # where no compiler is
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit):
        run_program(monkeypatch, tmp_path / "run", "--compile")
    assert "needs a C++ compiler" in capsys.readouterr().err


def test_a_result_of_mmca_can_be_run_through_the_written_formula_and_no_other(
        overfitted, config, tmp_path, monkeypatch, capsys):
    parts = {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}
    save(tmp_path / "mmca", parts, config)
    save(tmp_path / "causal", parts, replace(config, attention="causal"))
    run_program(monkeypatch, tmp_path / "mmca", "--attention", "written")
    assert "LLaMA-2 tiny, written, on cpu" in (out := capsys.readouterr().out) and "Question 1." in out
    for folder, attention in (("mmca", "causal"), ("causal", "written"), ("causal", "mmca")):
        said = f"trained with {folder} attention.*--attention {attention} does not fit"
        with pytest.raises(SystemExit, match=said):
            run_program(monkeypatch, tmp_path / folder, "--attention", attention)
    for options in (["--compile"], ["--keep", str(tmp_path / "kept")]):
        with pytest.raises(SystemExit) as end:
            run_program(monkeypatch, tmp_path / "mmca", "--attention", "written", *options)
        assert options[0] in f"{end.value} {capsys.readouterr().err}"


def test_the_program_starts_without_the_compiler(overfitted, config, tmp_path):
    """torch._dynamo and sympy would take a third of the start."""
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    arguments = ["chat.py", "--model", str(tmp_path / "run"), "--question", "What is it?"]
    code = (f"import sys; sys.argv = {arguments}\n"
            "import chat; chat.main()\n"
            "assert not {'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_a_torch_that_knows_gpus_runs_where_there_is_none(overfitted, config, tmp_path, monkeypatch, capsys):
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available=False: None if check_available else torch.device("cuda"))
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path / "run"), "--question", "What is it?"])
    program.main()
    assert "on cpu" in capsys.readouterr().out


def test_the_lines_of_python_in_readme_answer():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("A big red circle at the left.\n", "")


def test_interrupting_the_program_while_it_loads_prints_no_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "chat.py"), "--model", str(ROOT / "weights/tiny/chat")]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True)
    time.sleep(1)                                               # It still imports.
    run.send_signal(signal.SIGINT)
    assert "Traceback" not in run.communicate(timeout=60)[0] and run.returncode in (-signal.SIGINT, 130)


def test_a_full_disk_with_keep_ends_no_conversation(overfitted, config, tmp_path, monkeypatch, capsys):
    save(tmp_path / "run", {name: p for name, p in overfitted[2].named_parameters() if p.requires_grad}, config)

    def full(*_):
        raise OSError("could not write kept: no space left")

    monkeypatch.setattr(program.Album, "save", full)
    run_program(monkeypatch, tmp_path / "run", "--question", "What is it?", "--keep", str(tmp_path / "kept"))
    out, err = capsys.readouterr()
    assert out.count("Question 1.") == 1 and err.count("note: could not write kept: no space left") == 1
