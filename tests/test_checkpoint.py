"""Claims about checkpoint.py: nothing is lost by a kill or a stop, and a run goes on as if it had not happened."""
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from safetensors import SafetensorError

from checkpoint import (LOG, PROGRESS, SAME, Stop, check_harmless, digests, has_ended, identity, latest, only_run,
                        read_log, sealed, steps_in, writing)
from data import Conversation, Round
from recipe import Options
from training import ROOT, SCRIPT, at, at_once, begin, finish, processes, wait_for
from visualchat import TEMPLATE


def test_a_run_killed_five_times_ends_with_the_same_bits_as_one_that_was_not(world):
    longer = ["--epochs", "3", "--save-steps", "1"]             # 27 steps, more than the kills need
    whole = begin(world, "out/whole", *longer)
    chance, folder, kills, while_saving = random.Random(0), world / "out/killed/checkpoints", 0, 0
    while kills < 5 or while_saving < 2:
        before = at(folder)[0]
        run = begin(world, "out/killed", *longer, *["--resume"] * bool(before))
        wait_for(run, lambda: at(folder)[0] > before)           # it got further than the one before
        wait_for(run, lambda: at(folder)[1])                    # and is now about to write the next checkpoint
        time.sleep(0 if kills % 2 == 0 else chance.uniform(0, 0.3))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        kills, while_saving = kills + 1, while_saving + bool(at(folder)[1])
    finish(begin(world, "out/killed", *longer, "--resume"))
    finish(whole)
    for name in ("trained.safetensors", "best/trained.safetensors"):
        assert (world / "out/killed" / name).read_bytes() == (world / "out/whole" / name).read_bytes()
    assert not folder.exists()                                  # a finished run keeps no checkpoints
    logs = [[row for row in csv.reader(open(world / out / "log.csv"))] for out in ("out/killed", "out/whole")]
    seconds = logs[0][0].index("seconds")
    assert [[*row[:seconds], *row[seconds + 1:]] for row in logs[0]] == [[*row[:seconds], *row[seconds + 1:]]
                                                                       for row in logs[1]]


def stop_and_go_on(world, before: int, after: int, number: int, zero: int):
    """Stop a run of `before` ranks with a signal, resume it with `after`, compare with one that was not."""
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


def test_a_stopped_run_goes_on_with_another_number_of_ranks(world):
    at_once(lambda: stop_and_go_on(world, 2, 1, signal.SIGTERM, zero=3),
            lambda: stop_and_go_on(world, 1, 2, signal.SIGINT, zero=2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_noted_while_steps_are_made_and_end_the_process_before_and_after(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) == before


def test_a_killed_rank_ends_the_others_with_a_line_that_says_so(world):
    run = begin(world, "out/lost", ranks=2)
    wait_for(run, lambda: at(world / "out/lost/checkpoints")[0])
    rank, = (process for process, environment in processes(world, "out/lost").items()
             if "\0RANK=1\0" in environment)
    os.kill(rank, signal.SIGKILL)
    printed = run.communicate(timeout=120)[0]
    assert run.returncode and "train.py: rank 0 lost another rank, which was killed or does not answer" in printed


def test_a_run_that_has_ended_is_not_begun_again_and_its_result_stays(world, reference):
    kept = {file: file.stat().st_mtime_ns for file in (world / "out/reference").rglob("*")}
    assert "out/reference holds a run that has ended" in finish(begin(world, "out/reference", "--resume"))
    again = begin(world, "out/reference")                       # one after the other: each holds the folder's lock
    assert "take another --out, or replace it with --overwrite" in again.communicate(timeout=120)[0]
    assert again.returncode == 1
    assert {file: file.stat().st_mtime_ns for file in (world / "out/reference").rglob("*")} == kept


def test_another_model_s_result_is_not_taken_for_the_end_of_this_run(tmp_path):
    (tmp_path / "trained.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"size": "tiny", "attention": "mmca", "variant": ""}))
    options = Options(size="tiny", attention="mmca", out=str(tmp_path), resume=True)
    assert has_ended(options) and has_ended(replace(options, attention="causal", resume=False))
    for other in (dict(attention="causal"), dict(size="7b"), dict(variant="wide")):
        with pytest.raises(ValueError, match=f"a run with {[*other][0]} .*: take another --out"):
            has_ended(replace(options, **other))


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
    other = world / "data/other"                                # as many conversations, in another order
    shutil.copytree(world / "data/tiny", other)
    records = json.loads((other / "llava/conversation_58k.json").read_text())
    (other / "llava/conversation_58k.json").write_text(json.dumps(records[::-1]))
    run = begin(world, "out/other-options", "--resume", "--skip-bad", "--data", str(other))
    assert "was started on other conversations than" in run.communicate(timeout=120)[0] and run.returncode != 0
    # An image that is lost meanwhile: the run says what helps, and it helps.
    shutil.copytree(world / "data/tiny", lost := world / "data/lost")
    (image := sorted((lost / "coco/train2017").iterdir())[5]).unlink()
    run = begin(world, "out/other-options", "--resume", "--data", str(lost))
    assert re.search(f"no image '{image.name}' .*leave it out with --skip-bad", run.communicate(timeout=120)[0])
    assert "conversations skipped since this start" in finish(
        begin(world, "out/other-options", "--resume", "--skip-bad", "--data", str(lost)))


def test_a_run_of_another_prompt_template_is_not_resumed(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "step-00000002").mkdir(parents=True)
    for progress in ({"step": 2}, {"step": 2, "template": 3}):
        (folder / "step-00000002/progress.json").write_text(json.dumps(progress))
        with pytest.raises(ValueError, match="was started with version [13] of the prompt template, and this code "
                                             "has version 2: delete"):
            latest(Options(out=str(tmp_path), resume=True))


def write_checkpoint(out: Path, step: int) -> Path:
    """A checkpoint as `save_checkpoint` leaves it, with two files in place of DeepSpeed's."""
    folder, options = out / f"checkpoints/step-{step:08d}", Options(out=str(out))
    folder.mkdir(parents=True)
    for name in ("moments.pt", "masters.pt"):
        (folder / name).write_bytes(f"{name} {step}".encode() * 100)
    state = {"step": step, "saved": [step], "ranks": 1, "template": TEMPLATE, "files": digests(folder),
             "options": {name: getattr(options, name) for name in SAME}}
    (folder / PROGRESS).write_text(json.dumps(state | {"digest": sealed(state)}, indent=1))
    return folder


def spoilt(file: Path, how: str):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    {"removed": file.unlink, "truncated": lambda: file.write_bytes(content[:-1]),
     "flipped": lambda: file.write_bytes(content)}[how]()


@pytest.mark.parametrize("how", ["removed", "truncated", "flipped"])
@pytest.mark.parametrize("name", ["moments.pt", "masters.pt", PROGRESS])
def test_of_a_damaged_checkpoint_and_a_whole_one_the_whole_one_is_taken_and_that_is_said(tmp_path, name, how):
    write_checkpoint(tmp_path, 2)
    spoilt(write_checkpoint(tmp_path, 4) / name, how)
    options, said = Options(out=str(tmp_path), resume=True), []
    assert latest(options, said.append)["step"] == 2
    if (name, how) == (PROGRESS, "removed"):
        assert not said                                         # a kill leaves such folders
    else:
        assert len(said) == 1 and said[0].startswith(f"{tmp_path}/checkpoints/step-00000004 is left out: ")
        assert name in said[0]
    spoilt(tmp_path / "checkpoints/step-00000002/masters.pt", "flipped")
    with pytest.raises(ValueError, match="no checkpoint in .* is whole: delete it to start again"):
        latest(options, said.append)


def test_one_run_at_a_time_writes_into_a_folder_and_a_crash_lets_the_next_one_in(tmp_path):
    code = (f"import sys; from pathlib import Path; from checkpoint import only_run\n"
            f"with only_run(Path({str(tmp_path)!r})): print('in', flush=True); sys.stdin.read()")
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", code], env=settings, text=True, stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE)
    while run.stdout.readline() != "in\n":                      # DeepSpeed says which accelerator it takes
        assert run.poll() is None
    with pytest.raises(ValueError, match=f"another run writes into {tmp_path}"), only_run(tmp_path):
        pass
    run.kill()
    run.wait()
    with only_run(tmp_path):
        pass


def test_a_folder_that_cannot_be_one_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/x"):
        with (pytest.raises(OSError, match=f"{out} cannot be a folder for the result: .*. Take another --out"),
              only_run(out)):
            pass


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_checkpoint_that_could_run_code_is_refused_before_it_is_opened(tmp_path):
    torch.save({"a": torch.ones(2), "scaler": LossScaler(1.0)}, tmp_path / "0.pt")
    check_harmless(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "1.pt")
    with pytest.raises(ValueError, match="1.pt names posix.system, which no checkpoint of a training does"):
        check_harmless(tmp_path)


@pytest.mark.parametrize("content", ["Step,loss\n1,2\n", "step;loss\n1;2\n", "step,loss\n1,x\n",
                                     "step,loss\n1,2\n", f"{','.join(LOG)}\n1,2,3\n",
                                     f"{','.join(LOG)}\n{'1,' * 12}\n", f"{','.join(LOG[:-1])}\n{'1,' * 9}\n",
                                     f"{','.join(LOG)}\n" + "9" * 200_000])
def test_a_log_that_somebody_changed_is_named(tmp_path, content):
    (tmp_path / "log.csv").write_text(content)
    with pytest.raises(ValueError, match="log.csv is no log of a run: delete it, and the run goes on without"):
        read_log(tmp_path / "log.csv", 5)


def test_folders_beside_the_checkpoints_are_left_alone(tmp_path):
    for name in ("step-00000002", "step-00000001", "step-backup01", "step-000000001"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000003").write_text("a file")
    assert [path.name for path in steps_in(tmp_path)] == ["step-00000001", "step-00000002"]


def test_what_cannot_be_written_names_its_folder(tmp_path):
    for error in (OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0\nmore"),
                  SafetensorError("I/O error")):
        with pytest.raises(OSError, match=f"could not write into {tmp_path}: .*{str(error).splitlines()[0][-9:]}. "
                                          "Make room there, or make it writable, and go on with --resume"):
            with writing(tmp_path):
                raise error


def test_a_full_disk_is_called_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    with (pytest.raises(OSError, match=f"could not write into {tmp_path}: no space is left. Make room"),
          writing(tmp_path)):
        raise RuntimeError("unexpected pos 64 vs 0")


def test_the_identity_of_data_is_its_words_images_and_order():
    def of(*rounds):
        return identity([Conversation("any", [one]) for one in rounds])

    a, b = Round((Path("x/1.jpg"),), "What?", "This."), Round((), "What?", "This.")
    assert of(a, b) == of(replace(a, images=(Path("elsewhere/1.jpg"),)), b)
    others = [of(b, a), of(a), of(a, replace(b, answer="That.")), of(a, replace(b, question="Who?")),
              of(replace(a, images=(Path("x/2.jpg"),)), b)]
    assert len({of(a, b), *others}) == 6


def test_a_second_signal_three_seconds_later_ends_the_process():
    code = ("import os, signal, time; from checkpoint import Stop\n"
            "with Stop() as stop:\n"
            "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
            "    print('asked', stop.asked, flush=True)\n"
            "    stop.since -= 3.1\n"
            "    os.kill(os.getpid(), signal.SIGTERM); print('deaf')")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True)
    assert done.returncode == -signal.SIGTERM and done.stdout.endswith("asked True\n")
