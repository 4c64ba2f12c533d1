"""experiments/attention.py: runs that are there are read, missing ones trained, the table is their mean."""
import csv
import subprocess
import sys

import pytest

import recipe
from experiments import attention


def write(folder, exact):
    folder.mkdir(parents=True)
    with open(folder / "eval.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["test", "images", "topic", "questions", "exact", "alone", "blind"])
        writer.writerow(["test_seen", "one", "all", 100, exact, 0.75, 0.25])
        writer.writerow(["test_seen", "one", "color", 50, 0.125, 0, 0])


def test_the_table_has_mean_and_range_of_the_seeds(tmp_path, monkeypatch, capsys):
    for name, first, second in (("mmca", 0.9, 1.0), ("causal", 0.5, 0.6)):
        write(tmp_path / f"{name}-0", first)
        write(tmp_path / f"{name}-1", second)
    monkeypatch.setattr(attention.subprocess, "run", lambda *args, **settings: 1 / 0)   # nothing is trained
    monkeypatch.setattr(sys, "argv", ["attention.py", "--seeds", "0", "1", "--out", str(tmp_path)])
    attention.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | test_seen, one |"
    assert "| mmca | 95.0 (90.0 to 100.0) |" in lines and "| causal | 55.0 (50.0 to 60.0) |" in lines
    assert "| causal, every image gray | 25.0 (25.0 to 25.0) |" in lines
    assert "| mmca, weakest topic | 12.5 (12.5 to 12.5) |" in lines


def test_a_missing_run_is_trained_with_settings_that_train_knows(tmp_path, monkeypatch):
    commands = []

    def trained(command):
        commands.append(command)
        write(tmp_path / "causal-7", 0.5)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(attention.subprocess, "run", trained)
    assert attention.exam_of("causal", 7, tmp_path) == {
        ("test_seen", "one"): {"exact": 0.5, "alone": 0.75, "blind": 0.25, "weakest": 0.125}}
    monkeypatch.setattr(sys, "argv", commands[0][1:])
    options = recipe.command_line("")
    assert (options.size, options.attention, options.seed) == ("tiny", "causal", 7)
    assert options.out == str(tmp_path / "causal-7") and options.resume
    monkeypatch.setattr(attention.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 130))
    with pytest.raises(SystemExit, match="causal-8 did not end; the same command goes on with it"):
        attention.exam_of("causal", 8, tmp_path)
