"""tiny/looking.py: boxes lie around the objects, shares are shares, the command prints and draws them."""
import random
import sys

import pytest
import torch
from PIL import Image, ImageDraw

from tiny import looking
from tiny.looking import box_shares
from tiny.world import draw_scene
from training import ROOT


def test_the_box_covers_the_object_and_nothing_else():
    image = Image.new("RGB", (224, 224), (200, 200, 200))
    # Two by two of 8 × 8 patches, from (1, 2) on.
    ImageDraw.Draw(image).rectangle((28, 56, 83, 111), (40, 92, 200))
    expected = torch.zeros(8, 8)
    expected[2:4, 1:3] = 1
    assert torch.equal(box_shares(image, 8).view(8, 8), expected)
    shares = box_shares(draw_scene(("small", "yellow", "star", "top"), random.Random(0)), 8).view(8, 8)
    assert 0.01 < shares.mean() < 0.06 and not shares[5:].any() and shares[1:4, 2:6].sum() == shares.sum()


def test_the_command_prints_a_line_per_topic_and_draws_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["looking", "--model", str(ROOT / "weights/tiny/chat"), "--answers", "50",
                                      "--draw", str(tmp_path / "looking.png")])
    looking.main()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["percent", "of", "attention", "answers"] and len(lines) == 6
    assert sum(int(line.split()[4]) for line in lines[::2]) == 50
    for line in lines:
        values = [float(value) for value in line.split()[5:]]
        assert len(values) == 7 and all(0 <= value <= 100 for value in values)
    assert all(float(line.split()[-1]) == pytest.approx(100 / 3, abs=.05) for line in lines[::2])
    assert Image.open(tmp_path / "looking.png").format == "PNG"
