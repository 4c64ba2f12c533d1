"""experiments/attention.py: runs that are there are read, missing ones made, and the table is their mean."""
import subprocess
import sys

import pytest

import recipe
from experiments import attention, run
from tiny.exam import Marked, write_marked


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
    monkeypatch.setattr(sys, "argv", ["attention.py", "--seeds", "0", "1", "--out", str(tmp_path)])
    attention.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("| | questions | mmca | mmca, weakest topic | mmca, gray images | causal "
                        "| causal, weakest topic | causal, gray images |")
    mmca, causal = "95.0 (90.0 to 100.0)", "55.0 (50.0 to 60.0)"
    shares = " | ".join((mmca, mmca, "0.0 (0.0 to 0.0)", causal, causal, "0.0 (0.0 to 0.0)"))
    assert lines[2] == f"| seen pairs, one image | 20 | {shares} |"


def test_what_is_missing_is_trained_and_examined_with_settings_that_both_know(tmp_path, monkeypatch):
    commands = []

    def done(command):
        commands.append(command)
        (tmp_path / "causal-7").mkdir(exist_ok=True)
        (tmp_path / "causal-7/trained.safetensors").touch()
        if "exam" in command:
            write(tmp_path / "causal-7", 10)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", done)
    found = run.exam_of("causal", 7, tmp_path, ["--lr", "1e-3"])
    assert found["seen pairs, one image"]["right"] == 50 and len(commands) == 2
    assert commands[1][1:] == ["-m", "experiments.run", "causal", "exam", "--model", str(tmp_path / "causal-7")]
    assert commands[0][1:5] == ["-m", "experiments.run", "causal", "train"]
    monkeypatch.setattr(sys, "argv", ["train.py", *run.EXPERIMENTS["causal"].options, *commands[0][5:]])
    options = recipe.command_line("")
    assert (options.size, options.attention, options.seed, options.lr) == ("tiny", "causal", 7, 1e-3)
    assert options.out == str(tmp_path / "causal-7") and options.resume
    run.exam_of("causal", 7, tmp_path, [])
    assert len(commands) == 2                                   # nothing is missing
    (tmp_path / "causal-7/checkpoints").mkdir()
    run.exam_of("causal", 7, tmp_path, [])
    assert len(commands) == 3                                   # what was interrupted goes on
    monkeypatch.setattr(run.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 130))
    with pytest.raises(SystemExit, match="causal-8 did not end; the same command goes on with it"):
        run.exam_of("causal", 8, tmp_path, [])
