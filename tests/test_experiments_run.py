"""experiments/run.py: runs that are there are read, missing ones made, and the table is their mean."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import recipe
from experiments import run
from tiny.exam import Marked, write_marked, write_row
from training import ROOT, at, processes, wait_for


def write(folder, right, of=20):
    """A run that answered so many of its color questions right, and all of them with gray images wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trained.safetensors").touch()
    write_marked([Marked("seen", i, 1, 1, "color", "What color?", "red", "red" if i < right else "blue", "pink")
                  for i in range(of)], folder / "eval.csv")


def nothing_runs(command, folder):
    raise AssertionError(command)


def called(monkeypatch, *given):
    """Call the command line, from which nothing may be trained."""
    monkeypatch.setattr(run, "finish", nothing_runs)
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    run.main()


# ---- whole runs ----

def test_the_table_has_mean_and_range_of_the_seeds(tmp_path, monkeypatch, capsys):
    for name, first, second in (("mmca", 18, 20), ("causal", 10, 12)):
        write(tmp_path / f"{name}-0", first)
        write(tmp_path / f"{name}-1", second)
    monkeypatch.setattr(run, "OUT", tmp_path)
    called(monkeypatch, "--compare", "mmca", "causal", "--seeds", "0", "1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("| | questions | mmca | mmca, weakest topic | mmca, gray images | causal "
                        "| causal, weakest topic | causal, gray images |")
    mmca, causal = "95.0 (90.0 to 100.0)", "55.0 (50.0 to 60.0)"
    shares = " | ".join((mmca, mmca, "0.0 (0.0 to 0.0)", causal, causal, "0.0 (0.0 to 0.0)"))
    assert lines[2] == f"| seen pairs, one image | 20 | {shares} |"


def test_what_is_missing_is_trained_and_examined_with_settings_that_both_know(tmp_path, monkeypatch):
    commands, folder, lr = [], tmp_path / "causal-lr-1e-3-7", ["--lr", "1e-3"]

    def done(command, folder):
        commands.append(command)
        folder.mkdir(exist_ok=True)
        (folder / "trained.safetensors").touch()
        if "exam" in command:
            write(folder, 10)

    monkeypatch.setattr(run, "finish", done)
    monkeypatch.setattr(run, "OUT", tmp_path)
    found = run.exam_of("causal", 7, lr)
    assert found["seen pairs, one image"]["right"] == 50 and len(commands) == 2
    assert commands[1][1:] == ["-m", "experiments.run", "causal", "exam", "--model", str(folder)]
    assert commands[0][1:5] == ["-m", "experiments.run", "causal", "train"]
    monkeypatch.setattr(sys, "argv", ["train.py", *run.EXPERIMENTS["causal"].options, *commands[0][5:]])
    options = recipe.command_line("")
    assert (options.size, options.attention, options.seed, options.lr) == ("tiny", "causal", 7, 1e-3)
    assert options.out == str(folder) and options.resume
    run.exam_of("causal", 7, lr)
    assert len(commands) == 2                                   # nothing is missing
    (folder / "checkpoints").mkdir()
    run.exam_of("causal", 7, lr)
    assert len(commands) == 3                                   # what was interrupted goes on
    run.exam_of("causal", 7, [])
    assert len(commands) == 5 and (tmp_path / "causal-7").exists()      # other options make another run


def test_each_run_has_one_row_under_one_head(tmp_path):
    for seed, right in ((0, 40.0), (1, None), (0, 50.0)):
        write_row(tmp_path / "x.csv", dict(name="lora", seed=seed, options="--lr 1e-4"),
                  {"seen pairs, one image": dict(right=right)})
    assert (tmp_path / "x.csv").read_text().split("\n") == [
        'name,seed,options,"seen pairs, one image"', "lora,0,--lr 1e-4,50.0", "lora,1,--lr 1e-4,", ""]


def test_no_two_runs_lie_in_one_folder_and_usual_names_are_plain():
    names = [run.folder_of("mmca", 0, options).name for options in (
        [], ["--datasets", "set1"], ["--data", "A"], ["--data", "a"], ["--data", "/x/A"], ["--data", "/x/a"],
        ["--data", "x/a"], ["--data", "~/a"])]
    assert names[:4] == ["mmca-0", "mmca-datasets-set1-0", "mmca-data-A-0", "mmca-data-a-0"]
    assert len({*names}) == len(names) and all(re.fullmatch(r"[\w.,-]+", name) for name in names)
    assert run.folder_of("lora:16:q_proj,k_proj", 1, []).name == "lora-16-q_proj,k_proj-1"


@pytest.mark.parametrize("given, runs", [
    (["--compare", "mmca", "--datasets", "set1", "llava", "--seeds", "0"],
     [("mmca", 0, ["--datasets", "set1", "llava"])]),
    (["--compare", "mmca", "causal", "--epochs", "1", "--seed", "3"],
     [("mmca", 3, ["--epochs", "1"]), ("causal", 3, ["--epochs", "1"])]),
    (["lora", "--seeds", "1", "2"], [("lora", 1, []), ("lora", 2, [])]),
    (["lora", "--lr", "1e-3"], [("lora", 0, ["--lr", "1e-3"])])])
def test_no_word_of_a_command_is_lost(given, runs, tmp_path, monkeypatch):
    found = []

    def exam_of(*one):
        found.append(one)
        return {}

    monkeypatch.setattr(run, "exam_of", exam_of)
    monkeypatch.setattr(run, "comparison_text", str)
    monkeypatch.setattr(run, "OUT", tmp_path)
    called(monkeypatch, *given)
    assert found == runs


@pytest.mark.parametrize("seed, stop", [
    (5, lambda command: command.terminate()), (6, lambda command: os.killpg(command.pid, signal.SIGINT))],
    ids=["SIGTERM for the command alone", "Ctrl-C for all"])
def test_a_run_that_is_stopped_writes_its_checkpoint_first(world, seed, stop):
    out = f"out/experiments/mmca-epochs-1-workers-0-lr-1e-4-{seed}"
    command = subprocess.Popen(
        [sys.executable, "-m", "experiments.run", "mmca", "--seed", str(seed), "--epochs", "1", "--workers", "0",
         "--lr", "1e-4"], cwd=world, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    wait_for(command, (world / out / "checkpoints").exists)
    time.sleep(0.3)                                             # One of 9 steps runs; none would be saved yet.
    stop(command)
    printed = command.communicate(timeout=120)[0]
    assert command.returncode == 130 and "Traceback" not in printed, printed
    assert f"{out} was stopped; the same command goes on with it" in printed
    assert at(world / out / "checkpoints")[0] and not processes(world, out)


# ---- what can be typed ----

@pytest.mark.parametrize("given, message", [
    (["lora_vit", "train", "--cache_features", "x"], "lora_vit sets --cache-features itself"),
    (["causal", "train", "--attention=mmca"], "causal sets --attention itself"),
    (["causal", "--attention", "mmca"], "causal sets --attention itself"),
    (["lora", "train", "--variant", ""], "lora sets --variant itself"),
    (["released_rows", "chat", "--attention", "mmca"], "released_rows sets --attention itself"),
    (["clip", "train", "--size=7b"], "clip knows the tiny encoder alone"), (["loar"], "no experiment 'loar'"),
    (["--compare", "mmca", "loar"], "no experiment 'loar'"),
    (["lora", "--out", "x"], "`train` alone takes --out"),
    (["lora", "--size", "7b"], "`train` alone takes --size"),
    (["mmca", "--plan"], "`train` alone takes --plan"),
    (["cross", "train", "--plan", "--size", "7b"], "--plan knows the paper's model, not that of cross"),
    (["lora", "train", "--check-weights"], "--check-weights knows the paper's model, not that of lora"),
    (["lora", "--compare", "mmca"], "expected one name first, or --compare"),
    (["--seed", "3"], "expected one name first, or --compare"),
    (["lora:4:nope", "--seed", "1"], "no linear layer of llama is called 'nope'"),
    (["lora:4:nope", "train"], "no linear layer of llama is called 'nope'"),
    (["lora", "chat"], "--model has to name a result of lora, such as out/experiments/lora-0"),
    (["cross", "exam", "--mod", "x"], "--model has to name a result of cross")])
def test_what_cannot_be_meant_is_refused_before_anything_runs(given, message, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        called(monkeypatch, *given)


@pytest.mark.parametrize("given, message", [
    (["lora", "--bogus", "3"], "unrecognized arguments: --bogus 3"), (["lora", "trian"], "arguments: trian"),
    (["lora", "--seed", "-1"], "--seed -1: expected 0 or more"),
    (["mmca", "--epoch", "1"], "unrecognized arguments: --epoch 1")])
def test_what_train_lacks_is_refused_as_there(given, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        called(monkeypatch, *given)
    assert message in capsys.readouterr().err


def test_without_a_word_there_is_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        called(monkeypatch)
    assert not end.value.code and "python -m experiments.run lora --seed 0" in capsys.readouterr().out


def test_only_results_of_an_experiment_are_opened_with_its_model_and_template(tmp_path):
    for name in ("chat_template", "lora", ""):
        (tmp_path / f"x{name}").mkdir()
        (tmp_path / f"x{name}/config.json").write_text(json.dumps({"variant": name}))
    own, other, plain = (str(tmp_path / f"x{name}") for name in ("chat_template", "lora", ""))
    run.check_results("chat_template", "evaluate", ["q.json", "--model", own, own])
    run.check_results("chat_template", "chat", ["--model", own, other])         # an image of that name
    for folder, command in ((other, "lora evaluate"), (plain, "mmca evaluate")):
        with pytest.raises(ValueError, match=f"no result of chat_template.*python -m experiments.run {command}`"):
            run.check_results("chat_template", "evaluate", ["q.json", "--model", own, folder])


def test_train_names_the_command_that_opens_its_result(monkeypatch, capsys):
    class Train:
        def main():
            Train.print("Talk to it with\n    python chat.py --model out/experiments/lora-0 a.png")

    monkeypatch.setattr(run.importlib, "import_module", lambda name: Train)
    monkeypatch.setattr(run, "apply", lambda name, experiment: None)
    called(monkeypatch, "lora", "train")
    assert "    python -m experiments.run lora chat --model out/experiments/lora-0 a" in capsys.readouterr().out
