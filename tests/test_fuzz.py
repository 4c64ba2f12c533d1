"""A few hostile inputs of each kind in tests/fuzz.py; hypothesis draws annotations and makes them small."""
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz
from sources import file_names

BY_HYPOTHESIS = ["LLaVA", "MIMIC-IT", "Sparkles", "image indices"]


@pytest.mark.parametrize("kind", [kind for kind in fuzz.KINDS if kind not in BY_HYPOTHESIS])
def test_hostile_inputs_are_read_right_or_refused_with_the_name_of_their_file(kind):
    found = [fuzz.outcome(kind, random.Random(f"suite {kind} {i}")) for i in range(60)]
    assert set(found) == {"read", "refused"}


@pytest.mark.parametrize("kind", BY_HYPOTHESIS)
def test_hostile_annotations_are_read_right_or_refused_with_the_name_of_their_file(kind):
    @settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(rng=st.randoms(use_true_random=False))
    def draw(rng):
        file_names.cache_clear()
        with tempfile.TemporaryDirectory() as folder:
            try:
                fuzz.KINDS[kind](rng, Path(folder))
                found.add("read")
            except fuzz.Refused:
                found.add("refused")

    found = set()
    draw()
    assert found == {"read", "refused"}


def test_what_is_no_clear_error_is_a_fault(monkeypatch):
    def broken(rng, folder):
        fuzz.attempt(folder / "config.json", lambda: int("x"))

    monkeypatch.setitem(fuzz.KINDS, "images", broken)
    assert fuzz.outcome("images", random.Random(0)).startswith("AssertionError: no clear error: ValueError")
    monkeypatch.setitem(fuzz.KINDS, "images", lambda rng, folder: {}["x"])
    assert fuzz.outcome("images", random.Random(0)).startswith("KeyError")


def test_the_command_prints_a_line_for_each_kind():
    done = subprocess.run([sys.executable, fuzz.__file__, "--minutes", "0.01", "--kinds", "images", "tokenizer",
                           "--processes", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == "input tried read refused faults slowest, s".split()
    assert {line.split()[0] for line in lines[1:-1]} <= {"images", "tokenizer"} and lines[-1].startswith("peak")
    assert all(int(line.split()[1]) % 25 == 0 for line in lines[1:-1]) and len(lines) > 2
