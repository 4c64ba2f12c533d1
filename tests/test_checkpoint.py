"""Claims about checkpoint.py: nothing is lost by a kill or a stop, and a run goes on as if it had not happened."""
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from checkpoint import Stop, latest
from recipe import Options
from training import ROOT, SCRIPT, at, begin, finish, wait_for


def test_a_run_killed_five_times_ends_with_the_same_bits_as_one_that_was_not(world):
    longer = ["--epochs", "3"]                                  # 27 steps, more than five kills need
    whole = begin(world, "out/whole", *longer)
    chance, folder, while_saving = random.Random(0), world / "out/killed/checkpoints", 0
    for delay in (0, chance.uniform(0, 0.1), 0, chance.uniform(0, 0.5), chance.uniform(0, 0.1)):
        before = at(folder)[0]
        run = begin(world, "out/killed", *longer, *["--resume"] * bool(before))
        wait_for(run, lambda: at(folder)[0] > before)           # it got further than the one before
        wait_for(run, lambda: at(folder)[1])                    # and is now about to write the next checkpoint
        time.sleep(delay)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        while_saving += bool(at(folder)[1])
    assert while_saving >= 2
    finish(begin(world, "out/killed", *longer, "--resume"))
    finish(whole)
    for name in ("trained.safetensors", "best/trained.safetensors"):
        assert (world / "out/killed" / name).read_bytes() == (world / "out/whole" / name).read_bytes()
    assert not folder.exists()                                  # a finished run keeps no checkpoints
    logs = [[row for row in csv.reader(open(world / out / "log.csv"))] for out in ("out/killed", "out/whole")]
    seconds = logs[0][0].index("seconds")
    assert [[*row[:seconds], *row[seconds + 1:]] for row in logs[0]] == [[*row[:seconds], *row[seconds + 1:]]
                                                                       for row in logs[1]]


@pytest.mark.parametrize("before, after, number, zero", [(2, 1, signal.SIGTERM, 3), (1, 2, signal.SIGINT, 2)])
def test_a_stopped_run_goes_on_with_another_number_of_ranks(world, before, after, number, zero):
    slower = ["--embedding-lr", "5e-5", "--zero", str(zero)]    # so that the two groups of parameters differ
    whole = begin(world, f"out/unstopped-{before}", *slower)
    out = f"out/{before}-to-{after}"
    run = begin(world, out, *slower, ranks=before)
    wait_for(run, lambda: at(world / out / "checkpoints")[0] or at(world / out / "checkpoints")[1])
    os.kill(run.pid, number)
    run.communicate(timeout=120)
    stopped = int(at(world / out / "checkpoints")[0][5:])
    assert stopped <= 3
    again = subprocess.run([sys.executable, SCRIPT, "--out", out, *slower], cwd=world, capture_output=True,
                           text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert again.returncode != 0 and f"stopped at step {stopped}: go on with --resume" in again.stderr
    finish(begin(world, out, *slower, "--resume", ranks=after))
    finish(whole)
    found, reference = ([float(row["loss"]) for row in csv.DictReader(open(world / folder / "log.csv"))]
                        for folder in (out, f"out/unstopped-{before}"))
    assert len(found) == len(reference) >= stopped + 6
    assert found == pytest.approx(reference, abs=1e-3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_noted_while_steps_are_made_and_end_the_process_before_and_after(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) == before


def test_a_run_that_has_ended_is_not_begun_again_by_resuming(world, reference):
    kept = {file: file.stat().st_mtime_ns for file in (world / "out/reference").rglob("*")}
    printed = finish(begin(world, "out/reference", "--resume"))
    assert "out/reference holds a run that has ended" in printed
    assert {file: file.stat().st_mtime_ns for file in (world / "out/reference").rglob("*")} == kept


def test_a_stopped_run_is_no_success_and_one_without_a_checkpoint_begins_anew(world, reference):
    run = begin(world, "out/new", "--resume")
    wait_for(run, lambda: at(world / "out/new/checkpoints")[0])
    run.send_signal(signal.SIGTERM)
    printed = run.communicate(timeout=120)[0]
    assert run.returncode == 130, printed
    assert "out/new holds no checkpoint: the run starts at its beginning" in printed
    assert "stopped; the same command with --resume goes on" in printed
    stopped = int(at(world / "out/new/checkpoints")[0][5:])
    (world / "out/new/log.csv").unlink()                        # the log is for people: a run goes on without it
    finish(begin(world, "out/new", "--resume"))
    rows = list(csv.DictReader(open(world / "out/new/log.csv")))
    assert [int(row["step"]) for row in rows] == list(range(stopped + 1, 10))
    assert [float(row["loss"]) for row in rows] == pytest.approx(reference[stopped:], abs=1e-6)


def test_a_run_with_other_options_is_not_resumed(world):
    run = begin(world, "out/other-options")
    wait_for(run, lambda: at(world / "out/other-options/checkpoints")[0])
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    run = begin(world, "out/other-options", "--resume", "--seed", "5", "--batch", "8")
    assert "was started with seed 0, now it is 5; " in run.communicate(timeout=120)[0] and run.returncode != 0


def test_a_run_of_another_prompt_template_is_not_resumed(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "step-00000002").mkdir(parents=True)
    (folder / "latest").write_text("step-00000002")
    for progress in ({"step": 2}, {"step": 2, "template": 3}):
        (folder / "step-00000002/progress.json").write_text(json.dumps(progress))
        with pytest.raises(ValueError, match="was started with version [13] of the prompt template, and data.py "
                                             "has version 2: delete"):
            latest(Options(out=str(tmp_path), resume=True))
