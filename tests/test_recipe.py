"""Claims about recipe.py: the paper's settings for each size and mixture, and what the command line refuses."""
import sys

import pytest

from recipe import Options, command_line, for_size, share_of_rate


def given(monkeypatch, line: str) -> Options:
    """The options that a command line gives."""
    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    return command_line("")


@pytest.mark.parametrize("given, least", [
    ("--batch -16", 1), ("--epochs -1", 1), ("--save-steps 0", 1), ("--keep 0", 1), ("--plan --gpus 0", 1),
    ("--plan --gpu-memory nan", 1), ("--seed -1", 0), ("--seed 99999999999999999999", 0),
    ("--lr -1", 0), ("--epochs 0", 1), ("--batch 0", 1), ("--lr nan", 0), ("--embedding-lr inf", 0)])
def test_a_number_that_is_too_small_is_refused_at_once(monkeypatch, capsys, given, least):
    monkeypatch.setattr(sys, "argv", ["train.py", *given.split()])
    with pytest.raises(SystemExit):
        command_line("")
    name, number = given.split()[-2:]
    assert f"{name} {number}" in (said := capsys.readouterr().err) and f"expected {least} or more" in said


def test_options_have_no_short_forms(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        given(monkeypatch, "--att causal")
    assert "unrecognized arguments: --att causal" in capsys.readouterr().err


def test_the_schedule_rises_for_a_tenth_and_falls_to_zero():
    shares = [share_of_rate(step, 200) for step in range(201)]
    assert shares[0] == 1 / 20 and shares[19] == shares[20] == 1 and shares[200] == pytest.approx(0)
    assert shares[:20] == sorted(shares[:20]) and shares[20:] == sorted(shares[20:], reverse=True)
    assert shares[110] == pytest.approx(0.5)


def test_a_rate_of_zero_is_honored_and_not_replaced(monkeypatch):
    options = given(monkeypatch, "--lr 0 --embedding-lr 1e-3")
    assert (options.lr, options.embedding_lr) == (0, 1e-3)
    options = given(monkeypatch, "--embedding-lr 0")
    assert (options.lr, options.embedding_lr) == (2e-3, 0)
    assert given(monkeypatch, "--lr 4e-4").embedding_lr == 1e-4
    assert given(monkeypatch, "--size 7b --lr 5e-4").embedding_lr == 5e-4


@pytest.mark.parametrize("size, datasets, epochs", [
    ("7b", "attention", 5), ("7b", "llava llava_dial", 5), ("7b", "llava_dial llava llava", 5),
    ("7b", "single", 5),
    ("13b", "single", 10), ("13b", "attention", 10), ("13b", "llava llava_dial", 10), ("13b", "set1", 6),
    ("13b", "set2", 6), ("70b", "set2", 6), ("7b", "llava", 6), ("tiny", "set2", 2)])
def test_the_same_data_means_the_same_epochs_however_it_is_named(monkeypatch, size, datasets, epochs):
    assert given(monkeypatch, f"--size {size} --datasets {datasets}").epochs == epochs
    assert given(monkeypatch, f"--size {size} --datasets {datasets} --epochs 3").epochs == 3


@pytest.mark.parametrize("size, datasets, epochs", [("7b", ("attention",), 5), ("13b", ("set2",), 6),
                                                    ("70b", ("set2",), 6)])
def test_without_options_a_size_is_trained_as_in_the_paper(size, datasets, epochs):
    options = for_size(Options(size=size))
    assert (options.datasets, options.epochs, options.batch, options.lr) == (datasets, epochs, 128, 1e-3)
    assert options.embedding_lr == 1e-3 and options.data == "data" and options.out == f"out/{size}"
