"""Claims about train.py: what a run gives, what it says of bad input, ranks that differ, files to look at."""
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from data import Conversations
from loader import loader
from mmca import IMAGE
from recipe import Options, for_size
from tiny.world import write_world
from training import ROOT, SCRIPT, at, at_once, begin, launch, losses, wait_for
from train import alike_on_all_ranks, blank_batch
from visualchat import IGNORE, build, load
from vit import VisionConfig
from zero import share_of_peak


def test_a_taken_port_is_answered_with_a_line(world):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        launched = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        done = subprocess.run([sys.executable, SCRIPT, "--out", "out/taken"], cwd=world, capture_output=True,
                              text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT), **launched})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"train.py: the ranks cannot meet at 127.0.0.1:{port}: " in done.stderr


def test_ranks_with_unequal_images_and_text_only_batches_end(world, tmp_path):
    """One conversation per rank and step, half of them without any image, every parameter shared out."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    (tmp_path / "data/other/coco").mkdir(parents=True)
    (tmp_path / "data/other/coco/train2017").symlink_to(world / "data/tiny/coco/train2017")
    (tmp_path / "data/other/llava").mkdir()
    records = json.loads((world / "data/tiny/llava/conversation_58k.json").read_text())[:24]
    for record in records[::2]:
        del record["image"]
        for message in record["conversations"]:
            message["value"] = message["value"].replace("\n<image>", "")
    (tmp_path / "data/other/llava/conversation_58k.json").write_text(json.dumps(records))
    (tmp_path / "all.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    settings = ["--datasets", "llava_dial", "--batch", "2", "--data", "data/other"]
    shared_out = ["--deepspeed-config", str(tmp_path / "all.json")]
    found, alone = at_once(lambda: losses(tmp_path, "out/uneven", *settings, *shared_out, ranks=2),
                           lambda: losses(tmp_path, "out/alone", *settings))
    assert len(found) >= 7 and found == pytest.approx(alone, abs=1e-3)


def test_bf16_trains_to_nearly_the_losses_of_fp32_on_weights_of_as_few_bits(world, tmp_path):
    few = ["--data", str(tmp_path / "data")]                    # BF16 is slow on a CPU without its instructions
    write_world(tmp_path / "data", 30, seed=1)
    shutil.copytree(ROOT / "weights/tiny", tmp_path / "rounded", ignore=shutil.ignore_patterns("chat"))
    for file in (tmp_path / "rounded").rglob("*.safetensors"):
        save_file({name: t.bfloat16().half() for name, t in load_file(file).items()}, file)
    towers = [option for name in ("llama", "vit") for option in (f"--{name}", str(tmp_path / "rounded" / name))]
    expected, found = at_once(lambda: losses(world, "out/fp32", *few, *towers),
                              lambda: losses(world, "out/bf16", *few, "--precision", "bf16"))
    assert found[0] == pytest.approx(expected[0], rel=0.01)
    assert len(found) > 1 and sum(found) == pytest.approx(sum(expected), rel=0.05)


def test_the_loss_falls_and_can_be_looked_at(world):
    found = losses(world, "out/full", "--epochs", "3", lr="5e-3")
    assert sum(found[-9:]) < 0.7 * sum(found[:9])
    with open(world / "out/full/log.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert 0 < float(last["val_loss"]) < found[0] and 0 <= float(last["exact_match"]) <= 1
    assert Image.open(world / "out/full/loss.png").size == (900, 500)


def test_only_what_is_trained_changes_and_is_saved(world, reference, monkeypatch):
    monkeypatch.chdir(world)
    model, config = load(Path("out/reference"))
    fresh = build(config)
    changed = {name for (name, a), b in zip(model.named_parameters(), fresh.parameters()) if not torch.equal(a, b)}
    assert changed == {"projection.weight", "projection.bias", "llama.embed_tokens.weight"}


def test_all_nine_datasets_train_and_kept_features_change_nothing(world):
    nine = ["--datasets", "set2"]                               # features are kept in FP16: see `losses` for why
    keeping = [*nine, "--cache-features", "features"]
    found, kept = at_once(lambda: losses(world, "out/nine", *nine, lr="1e-5"),
                          lambda: losses(world, "out/kept", *keeping, ranks=2, lr="1e-5"))
    assert kept == pytest.approx(found, abs=5e-3) and list((world / "features").rglob("*.safetensors"))
    assert len(found) > 9                                       # more than the two datasets of the other tests


FP16_HERE = """
import runpy, sys
from deepspeed.accelerator import get_accelerator
if get_accelerator().device_name() == "cpu":            # computes in FP16, if slowly; DeepSpeed would refuse to
    get_accelerator().is_fp16_supported = lambda: True
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_fp16_that_overflows_at_the_least_loss_scale_stops_and_keeps_the_last_checkpoint(world):
    floor = {"fp16": {"initial_scale_power": 16, "min_loss_scale": 2 ** 15, "hysteresis": 1}}
    (world / "floor.json").write_text(json.dumps(floor))
    code = FP16_HERE.replace("import runpy, sys", f"import runpy, sys; sys.argv[0] = {SCRIPT!r}")
    done = subprocess.run([sys.executable, "-c", code, "--precision", "fp16", "--deepspeed-config", "floor.json",
                           "--batch", "4", "--save-steps", "1", "--workers", "0", "--out", "out/floor"], cwd=world,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode != 0, done.stdout
    assert "overflow even at the least loss scale: try a lower --lr, or --precision bf16" in done.stderr
    assert "Traceback" not in done.stderr
    with open(world / "out/floor/log.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["skipped"] == "1" and float(rows[0]["loss_scale"]) == 2 ** 15 and 0 < float(rows[0]["loss"]) < 9
    assert at(world / "out/floor/checkpoints") == (f"step-{len(rows):08d}", [])


def test_a_broken_image_stops_training_by_name_or_is_skipped_and_counted(world, tmp_path):
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    shutil.copytree(world / "data/tiny", tmp_path / "data/tiny")
    broken = tmp_path / "data/tiny/coco/train2017/000000000000.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    command = [sys.executable, SCRIPT, "--epochs", "1", "--data", "data/tiny"]
    done, printed = at_once(
        lambda: subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                               capture_output=True, timeout=120),
        lambda: launch(tmp_path, *command, "--skip-bad", "--positions", "160", "--out", "out/skipping"))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and last.startswith(
        "train.py: data/tiny/coco/train2017/000000000000.jpg is no readable image")
    assert last.endswith("Correct it, or leave out what shows it with --skip-bad")
    assert "Traceback" not in done.stderr
    assert "; 1 conversations skipped since this start" in printed
    assert re.search(r"at 160 positions [1-9]\d* conversations lose their last rounds, [1-9]\d* rounds", printed)
    assert re.search(r"validation: 0 of 16 conversations show .* training would lose 0 of 149\n", printed)


def test_the_best_result_is_that_of_the_lowest_validation_loss(monkeypatch, tmp_path):
    """A run of four epochs of one step, whose validation losses are made up."""
    kept, checks = [], iter([3.0, 1.0, 2.0, 1.0])
    monkeypatch.setattr(train, "dist", SimpleNamespace(
        get_rank=lambda: 0, get_world_size=lambda: 1, all_reduce=lambda *_: None, ReduceOp=SimpleNamespace(MAX=0)))
    for name, stand_in in (
            ("blank_batch", lambda _: {}), ("loader", lambda *_: iter([[]])), ("update_bar", lambda *_: None),
            ("evaluate", lambda *_: (next(checks), 0.5)), ("save_checkpoint", lambda *_: None),
            ("checked_step", lambda *rest: rest[-1] | {"seconds": 0}),
            ("save_result", lambda *_, is_best: kept.append(is_best))):
        monkeypatch.setattr(train, name, stand_in)
    monkeypatch.setattr(train.Stop, "agreed", lambda *_: False)
    engine = SimpleNamespace(device="cpu", global_samples=0, monitor=SimpleNamespace(write_events=lambda _: None))
    held_out = SimpleNamespace(skipped=[0])
    progress = dict(step=0, best=float("inf"), saved=[])

    class Sixteen(list):
        skipped = [0] * 16

    options = for_size(Options(epochs=4, batch=16, out=str(tmp_path)))
    assert train.fit(engine, Sixteen(range(16)), held_out, options, None, progress)
    assert kept == [True, True, False, False] and progress["best"] == 1.0


def test_the_share_of_what_cards_can_do():
    values = 6_738_415_616 - 2 * 32000 * 4096 - 4096                            # the layers' alone
    found = share_of_peak(10_000, "7b", "NVIDIA A100-SXM4-80GB", ranks=2)
    assert found == pytest.approx(4 * values * 10_000 / (2 * 312e12))
    assert share_of_peak(10_000, "7b", "", ranks=2) is None


def test_absent_weights_are_asked_for_by_name(world):
    done = subprocess.run([sys.executable, SCRIPT, "--size", "7b", "--llama", "", "--out", "out/none"], cwd=world,
                          env={**os.environ, "HF_HOME": str(world / "none")}, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for part in ("weights/Llama-2-7b-hf", str(world / "none"), "hf download meta-llama/Llama-2-7b-hf"):
        assert part in done.stderr


@pytest.mark.parametrize("features", [None, SimpleNamespace(shape=(4, 128))])
def test_every_rank_gets_as_many_batches_and_each_has_an_image(monkeypatch, features):
    monkeypatch.setattr(train.dist, "all_reduce", lambda x, *_: x.clamp_(min=3))       # another rank has three
    name, shape = ("features", (4, 128)) if features else ("images", (3, 16, 16))
    blank = blank_batch(Conversations([], None, VisionConfig(image_size=16, n_queries=4), features=features))
    text = {"ids": torch.tensor([[1, 5, 2]]), "kind": torch.ones(1, 3, dtype=torch.long),
            "labels": torch.tensor([[IGNORE, 5, 2]]), "lengths": [3], name: torch.empty(0, *shape)}
    shown = {**text, "kind": torch.tensor([[1, IMAGE, 1]]), name: torch.ones(1, *shape)}
    found = alike_on_all_ranks([text, shown], blank, SimpleNamespace(device="cpu"))
    assert len(found) == 3 and found[1] is not blank and found[1]["lengths"] == [3]
    assert found[0]["lengths"] == [3, 4] and found[0]["kind"].tolist() == [[1, 1, 1] + [IMAGE] * 4]
    assert found[0]["labels"].tolist() == [[IGNORE, 5, 2] + [IGNORE] * 4]
    assert [len(batch[name]) for batch in found] == [1, 1, 1] and not found[0][name].any()
    assert found[2]["lengths"] == [4] and (found[2]["labels"] == IGNORE).all()


def workers(process: int) -> list[int]:
    """The processes that a process of training has begun to open images."""
    return [int(child.parent.name) for child in Path("/proc").glob("[0-9]*/stat")
            if child.exists() and child.read_text().rpartition(")")[2].split()[1] == str(process)]


def test_a_worker_that_is_killed_ends_training_with_a_line_that_says_what_to_do(world):
    run = begin(world, "out/killed-worker", "--workers", "2", "--epochs", "50", "--save-steps", "1")
    wait_for(run, lambda: at(world / "out/killed-worker/checkpoints")[0] and workers(run.pid))
    os.kill(workers(run.pid)[0], signal.SIGKILL)
    printed = run.communicate(timeout=120)[0]
    assert run.returncode == 1 and "Traceback" not in printed, printed
    assert "train.py: the processes that open images failed: DataLoader worker" in printed
    assert "--workers 0" in printed


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_is_killed_while_it_passes_a_batch_on_is_named_too(monkeypatch, error):
    class Broken:
        def __init__(self, *_, **__):
            pass

        def __iter__(self):
            raise error

    monkeypatch.setattr("loader.DataLoader", Broken)
    monkeypatch.setattr("loader.dist.get_world_size", lambda: 1)
    with pytest.raises(ValueError, match=f"that open images failed: .*{type(error).__name__}.*--workers 0"):
        next(loader([], [], for_size(Options("tiny", workers=2))))
    with pytest.raises(type(error)):                                # nobody else opens images
        next(loader([], [], for_size(Options("tiny", workers=0))))


def test_where_workers_cannot_pass_images_on_training_ends_at_once_and_says_why(world):
    command = [sys.executable, SCRIPT, "--out", "out/no-memory", "--workers", "1", "--cache-features", ""]
    # A bound on the size of files stands for a small /dev/shm, which only an administrator can make.
    done = subprocess.run(["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *command], cwd=world,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          timeout=60)
    assert done.returncode == 1 and re.search("train.py: the processes that open images failed: .*--shm-size",
                                              done.stderr), done.stderr
