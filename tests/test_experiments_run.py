"""experiments/run.py: runs that are there are read, missing ones made, and the table is their mean."""
import subprocess
import sys

import pytest

import recipe
from experiments import run
from tiny.exam import Marked, write_marked
from visualchat import ModelConfig


def write(folder, right, of=20):
    """A run that answered so many of its color questions right, and all of them with gray images wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trained.safetensors").touch()
    write_marked([Marked("seen", i, 1, 1, "color", "What color?", "red", "red" if i < right else "blue", "pink")
                  for i in range(of)], folder / "eval.csv")


def test_the_table_has_mean_and_range_of_the_seeds(tmp_path, monkeypatch, capsys):
    for name, first, second in (("mmca", 18, 20), ("causal", 10, 12)):
        write(tmp_path / f"{name}-0", first)
        write(tmp_path / f"{name}-1", second)
    monkeypatch.setattr(run.subprocess, "run", lambda *args, **settings: 1 / 0)   # nothing is trained
    monkeypatch.setattr(run, "OUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--compare", "mmca", "causal", "--seeds", "0", "1"])
    run.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("| | questions | mmca | mmca, weakest topic | mmca, gray images | causal "
                        "| causal, weakest topic | causal, gray images |")
    mmca, causal = "95.0 (90.0 to 100.0)", "55.0 (50.0 to 60.0)"
    shares = " | ".join((mmca, mmca, "0.0 (0.0 to 0.0)", causal, causal, "0.0 (0.0 to 0.0)"))
    assert lines[2] == f"| seen pairs, one image | 20 | {shares} |"


def test_what_is_missing_is_trained_and_examined_with_settings_that_both_know(tmp_path, monkeypatch):
    commands, folder, lr = [], tmp_path / "causal-lr-1e-3-7", ["--lr", "1e-3"]

    def done(command):
        commands.append(command)
        folder.mkdir(exist_ok=True)
        (folder / "trained.safetensors").touch()
        if "exam" in command:
            write(folder, 10)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", done)
    found = run.exam_of("causal", 7, tmp_path, lr)
    assert found["seen pairs, one image"]["right"] == 50 and len(commands) == 2
    assert commands[1][1:] == ["-m", "experiments.run", "causal", "exam", "--model", str(folder)]
    assert commands[0][1:5] == ["-m", "experiments.run", "causal", "train"]
    monkeypatch.setattr(sys, "argv", ["train.py", *run.EXPERIMENTS["causal"].options, *commands[0][5:]])
    options = recipe.command_line("")
    assert (options.size, options.attention, options.seed, options.lr) == ("tiny", "causal", 7, 1e-3)
    assert options.out == str(folder) and options.resume
    run.exam_of("causal", 7, tmp_path, lr)
    assert len(commands) == 2                                   # nothing is missing
    (folder / "checkpoints").mkdir()
    run.exam_of("causal", 7, tmp_path, lr)
    assert len(commands) == 3                                   # what was interrupted goes on
    folder = tmp_path / "causal-7"
    run.exam_of("causal", 7, tmp_path, [])
    assert len(commands) == 5                                   # other options make another run
    monkeypatch.setattr(run.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 130))
    with pytest.raises(SystemExit, match="causal-8 did not end; the same command goes on with it"):
        run.exam_of("causal", 8, tmp_path, [])


@pytest.mark.parametrize("given, message", [
    (["lora_vit", "train", "--cache_features", "x"], "lora_vit sets --cache-features itself"),
    (["causal", "train", "--attention=mmca"], "causal sets --attention itself"),
    (["released_rows", "chat", "--attention", "mmca"], "released_rows sets --attention itself"),
    (["clip", "train", "--size=7b"], "clip knows the tiny encoder alone"), (["loar"], "no experiment 'loar'"),
    (["--compare", "mmca", "loar"], "no experiment 'loar'"),
    (["lora", "--out", "x"], "`train` alone takes --out")])
def test_options_that_contradict_an_experiment_are_refused_before_anything_runs(given, message, monkeypatch):
    monkeypatch.setattr(run.subprocess, "run", lambda *args, **settings: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    with pytest.raises(SystemExit, match=message):
        run.main()


def test_a_result_of_another_model_is_not_opened_with_an_experiment_s_template(tmp_path):
    load = run.only("chat_template", lambda folder: (None, ModelConfig(variant=folder)))
    assert load("chat_template")[1].variant == "chat_template"
    with pytest.raises(ValueError, match="is no result of chat_template, but of the main road"):
        load("")
