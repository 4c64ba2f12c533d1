"""train.py: one result on any number of ranks and any ZeRO stage, the paper's schedule, files that others read."""
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import shapes
import train
from llama import Layer, LlamaConfig, Scene, rope_table
from mmca import IMAGE, TEXT, layout
from visualchat import load

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "train.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder to train in: the shipped towers and a small world."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "weights").symlink_to(ROOT / "weights")
    shapes.write_world(folder / "data/tiny", 155, seed=1)
    return folder


def launch(world: Path, *command: str, path: str = "") -> str:
    """Run a command in the folder, with `path` alone to find programs on, if given; returns what it printed."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path or os.environ["PATH"]}
    done = subprocess.run(command, cwd=world, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(world: Path, out: str, *options: str, ranks: int = 1, lr: str = "1e-4") -> list[float]:
    """The losses of an epoch of 13 steps, at the rate of a default run's first ten (its warm-up takes 54).

    At the full rate from the first step on they were seen to drift apart by up to 0.018, probably because AdamW
    with beta1 = 0 makes a whole step out of a gradient that is nothing but rounding.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launch(world, *(launcher if ranks > 1 else [sys.executable]), SCRIPT, "--epochs", "1", "--workers", "0",
           "--exam", "0", "--lr", lr, "--out", out, *options)
    with open(world / out / "log.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def reference(world) -> list[float]:
    return losses(world, "out/reference")


def test_two_ranks_under_zero_3_lose_what_one_rank_loses(world, reference):
    two = losses(world, "out/two", ranks=2)
    assert len(two) == len(reference) == 13
    assert two == pytest.approx(reference, abs=1e-3)
    logs = [list(csv.DictReader(open(world / out / "log.csv")))[-1] for out in ("out/two", "out/reference")]
    assert float(logs[0]["val_loss"]) == pytest.approx(float(logs[1]["val_loss"]), abs=1e-3)    # on all 15 of them


def test_two_ranks_that_share_out_every_parameter_agree_too(world, reference, tmp_path):
    """By default ZeRO-3 leaves tensors of fewer than 100,000 values whole: nearly all of the tiny size."""
    (tmp_path / "all.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    settings = ["--deepspeed-config", str(tmp_path / "all.json"), "--exam", "4"]
    # Room for two or three conversations at a time: the ranks have different numbers of packed batches in a step.
    found = losses(world, "out/shared", *settings, "--positions", "400", ranks=2)
    assert found == pytest.approx(reference, abs=1e-3)


def test_ranks_with_unequal_images_and_text_only_batches_end(world, tmp_path):
    """One conversation per rank and step, half of them without any image, every parameter shared out."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    (tmp_path / "data/other/coco").mkdir(parents=True)
    (tmp_path / "data/other/coco/train2017").symlink_to(world / "data/tiny/coco/train2017")
    (tmp_path / "data/other/llava").mkdir()
    records = json.loads((world / "data/tiny/llava/conversation_58k.json").read_text())[:24]
    for record in records[::2]:
        del record["image"]
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("\n<image>", "")
    (tmp_path / "data/other/llava/conversation_58k.json").write_text(json.dumps(records))
    (tmp_path / "all.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    settings = ["--datasets", "llava_dial", "--batch", "2", "--data", "data/other"]
    found = losses(tmp_path, "out/uneven", *settings, "--deepspeed-config", str(tmp_path / "all.json"), ranks=2)
    alone = losses(tmp_path, "out/alone", *settings)
    assert len(found) >= 7 and found == pytest.approx(alone, abs=1e-3)


@pytest.mark.parametrize("options", [["--zero", "0"], ["--zero", "2"], ["--zero", "1", "--positions", "400"]])
def test_stage_and_accumulation_do_not_change_the_losses(world, reference, options):
    assert losses(world, "out/other", *options) == pytest.approx(reference, abs=1e-3)


def test_bf16_trains_to_nearly_the_same_losses(world, reference):
    found = losses(world, "out/bf16", "--precision", "bf16")
    assert found[0] == pytest.approx(reference[0], rel=0.01)
    assert sum(found) == pytest.approx(sum(reference), rel=0.05)


def test_the_loss_falls_and_can_be_looked_at(world):
    found = losses(world, "out/full", lr="1e-3")
    assert sum(found[-3:]) < 0.7 * sum(found[:3])
    with open(world / "out/full/log.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert 0 < float(last["val_loss"]) < found[0] and 0 <= float(last["exact_match"]) <= 1
    assert Image.open(world / "out/full/loss.png").size == (900, 500)


# ---- nothing is lost ----

def begin(world: Path, out: str, *options: str, ranks: int = 1) -> subprocess.Popen:
    """Start a run, of 13 steps if nothing else is said, that keeps a checkpoint of every second one."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*(launcher if ranks > 1 else [sys.executable]), SCRIPT, "--epochs", "1", "--workers", "0",
               "--exam", "0", "--lr", "1e-4", "--save-steps", "2", "--out", out, *options]
    return subprocess.Popen(command, cwd=world, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def at(folder: Path) -> tuple[str, list[str]]:
    """The latest complete checkpoint, and the ones that somebody has begun to write since."""
    latest = (folder / "latest").read_text() if (folder / "latest").exists() else ""
    return latest, [step.name for step in folder.glob("step-*") if step.name > latest]


def wait_for(run: subprocess.Popen, condition, seconds: float = 120):
    deadline = time.time() + seconds
    while not condition():
        assert run.poll() is None and time.time() < deadline, run.communicate()[0]
        time.sleep(0.001)


def finish(run: subprocess.Popen) -> str:
    printed = run.communicate(timeout=300)[0]
    assert run.returncode == 0, printed
    return printed


def test_a_run_killed_five_times_ends_with_the_same_bits_as_one_that_was_not(world):
    longer = ["--epochs", "2"]                                  # 26 steps: five times some, with room to spare
    finish(begin(world, "out/whole", *longer))
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
    reference = losses(world, f"out/unstopped-{before}", *slower)
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
    with open(world / out / "log.csv") as file:
        found = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(found) == len(reference) >= stopped + 10
    assert found == pytest.approx(reference, abs=1e-3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_noted_while_steps_are_made_and_end_the_process_before_and_after(number):
    before = signal.getsignal(number)
    with train.Stop() as stop:
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
    (world / "out/new/log.csv").unlink()                        # the log is for people: going on needs it not
    finish(begin(world, "out/new", "--resume"))
    rows = list(csv.DictReader(open(world / "out/new/log.csv")))
    assert [int(row["step"]) for row in rows] == list(range(stopped + 1, 14))
    assert [float(row["loss"]) for row in rows] == pytest.approx(reference[stopped:], abs=1e-6)


@pytest.mark.parametrize("given, least", [
    ("--batch -16", 1), ("--epochs -1", 1), ("--save-steps 0", 1), ("--keep 0", 1), ("--plan --gpus 0", 1),
    ("--plan --gpu-memory nan", 1), ("--exam -5", 0), ("--lr -1", 0)])
def test_a_number_that_is_too_small_is_refused_at_once(monkeypatch, capsys, given, least):
    monkeypatch.setattr(sys, "argv", ["train.py", *given.split()])
    with pytest.raises(SystemExit):
        train.command_line()
    name, number = given.split()[-2:]
    assert f"{name} {number}" in (said := capsys.readouterr().err) and f"expected {least} or more" in said


def test_a_run_with_other_options_is_not_resumed(world):
    run = begin(world, "out/other-options")
    wait_for(run, lambda: at(world / "out/other-options/checkpoints")[0])
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    run = begin(world, "out/other-options", "--resume", "--seed", "5", "--batch", "8")
    assert "was started with seed 0, now it is 5; " in run.communicate(timeout=120)[0] and run.returncode != 0


def test_only_what_is_trained_changes_and_is_saved(world, reference, monkeypatch):
    monkeypatch.chdir(world)
    model, config = load(Path("out/reference"))
    fresh = train.build(config)
    changed = {name for (name, a), b in zip(model.named_parameters(), fresh.parameters()) if not torch.equal(a, b)}
    assert changed == {"projection.weight", "projection.bias", "llama.embed_tokens.weight"}


def test_the_launcher_starts_without_compiler_ninja_or_mpi(world, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    launcher = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, script in (("python3", ""), ("deepspeed", f'"{launcher}"')):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {script} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "sh").symlink_to("/bin/sh")
    printed = launch(world, str(programs / "deepspeed"), SCRIPT, "--epochs", "1", "--exam", "12",
                     "--out", "out/bare", path=str(programs))
    assert "exact match" in printed and "test_unseen" in printed and "trainable 58,880 of 1.8 M" in printed
    with open(world / "out/bare/eval.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["topic"] == "all"]
    assert [(row["test"], row["images"]) for row in rows] == [(test, images) for test in shapes.TESTS
                                                               for images in ("one", "several")]
    assert sum(int(row["questions"]) for row in rows) == 2 * 12 * 6


def test_all_nine_datasets_train_and_kept_features_change_nothing(world):
    nine = dict(lr="1e-5")                                      # features are kept in FP16: see `losses` for why
    found = losses(world, "out/nine", "--datasets", "set2", **nine)
    assert len(found) > 13                                      # more than the two datasets of the other tests
    keeping = ["--datasets", "set2", "--cache-features", "features"]
    assert losses(world, "out/kept", *keeping, ranks=2, **nine) == pytest.approx(found, abs=5e-3)
    files = {file: file.stat().st_mtime_ns for file in (world / "features").rglob("*.safetensors")}
    losses(world, "out/again", *keeping, **nine)
    assert files and {file: file.stat().st_mtime_ns for file in (world / "features").rglob("*.*")} == files


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
    assert "overflow even at the least loss scale: try --precision bf16 or a lower --lr" in done.stderr
    assert "Traceback" not in done.stderr
    with open(world / "out/floor/log.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["skipped"] == "1" and float(rows[0]["loss_scale"]) == 2 ** 15 and 0 < float(rows[0]["loss"]) < 9
    assert at(world / "out/floor/checkpoints") == (f"step-{len(rows):08d}", [])


def test_a_broken_picture_stops_training_by_name_or_is_skipped_and_counted(world, tmp_path):
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    shutil.copytree(world / "data/tiny", tmp_path / "data/tiny")
    broken = tmp_path / "data/tiny/coco/train2017/000000000000.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    command = [sys.executable, SCRIPT, "--epochs", "1", "--exam", "0", "--data", "data/tiny"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and last.startswith("train.py: data/tiny/llava/conversation_58k.json, record 0000")
    assert "000000000000.jpg is no readable picture" in last and "--skip-bad" in last
    assert "Traceback" not in done.stderr
    assert "; 1 conversations skipped since the start" in launch(tmp_path, *command, "--skip-bad")


def test_the_settings_are_printed_and_fit_the_model(world):
    printed = launch(world, sys.executable, SCRIPT, "--show-config", "--size", "7b", "--offload", "cpu",
                     "--monitor", "csv_monitor")
    settings = json.loads(printed)
    zero = settings["zero_optimization"]
    waiting = {"device": "cpu", "pin_memory": True}
    assert zero["stage"] == 3 and zero["offload_param"] == zero["offload_optimizer"] == waiting
    assert zero["stage3_prefetch_bucket_size"] == 4 * 4096 ** 2 + 3 * 4096 * 11008 + 2 * 4096   # one layer
    assert zero["reduce_bucket_size"] == 32000 * 4096 + 4096 * 4096 + 4096           # all that trains
    assert settings["csv_monitor"] == {"enabled": True, "output_path": "out/7b/monitor/", "job_name": "7b"}
    assert not (world / "out/7b").exists()


def test_settings_of_ones_own_are_laid_over_but_not_over_what_flags_decide(monkeypatch, tmp_path):
    own = {"zero_optimization": {"stage3_prefetch_bucket_size": 7}, "wall_clock_breakdown": True}
    for given, refused in ((own, ""), ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps 4"),
                           ({"zero_optimization": {"stage": 1}}, "stage 1"), ({"bf16": {"enabled": True}}, "bf16")):
        (tmp_path / "own.json").write_text(json.dumps(given))
        options = train.for_size(train.Options(deepspeed_config=str(tmp_path / "own.json"), precision="fp32"))
        if refused:
            with pytest.raises(ValueError, match=refused):
                train.settings_for(options, 2)
        else:
            found = train.settings_for(options, 2)
            assert found["zero_optimization"]["stage3_prefetch_bucket_size"] == 7 and found["wall_clock_breakdown"]
            assert found["zero_optimization"]["stage"] == 3


def test_the_plan_says_what_fits(world):
    printed = launch(world, sys.executable, SCRIPT, "--size", "70b", "--plan", "--gpus", "16", "--gpu-memory", "80")
    rows = {line[:34].strip(): line[34:].split() for line in printed.splitlines() if line.startswith("ZeRO")}
    frozen = (68_976_648_192 - 32000 * 8192 + 1_918_833_408) * 2 / 1e9          # 141.3 GB in FP16
    assert float(rows["ZeRO-2"][0]) == round(frozen, 1) and rows["ZeRO-2"][-1] == "much"
    assert float(rows["ZeRO-3"][0]) == round(frozen / 16, 1) and rows["ZeRO-3 --recompute"][-1] == "fits"
    assert "200,412 conversations" in printed and "9,390 steps" in printed


def test_the_share_of_what_cards_can_do():
    options = train.Options(size="7b")
    values = 6_738_415_616 - 2 * 32000 * 4096 - 4096                            # the layers' alone
    found = train.of_peak(10_000, options, "NVIDIA A100-SXM4-80GB", ranks=2)
    assert found == pytest.approx(4 * values * 10_000 / (2 * 312e12))
    assert train.of_peak(10_000, options, "", ranks=2) is None


@pytest.mark.parametrize("key_value_heads", [8, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_counts_what_a_layer_keeps_for_the_backward_pass(precision, key_value_heads):
    length, dtype = 1024, train.DTYPES[precision]
    sizes = LlamaConfig(256, 704, 1, 8, key_value_heads, vocab_size=100)
    layer = Layer(sizes).to(dtype).requires_grad_(False)
    x = torch.randn(length, 256, dtype=dtype, requires_grad=True)
    where = layout(torch.tensor([[TEXT] * 8 + [IMAGE] * 16 + [TEXT] * (length - 24)]))
    scene = Scene(where, *rope_table(where.position, 32, 1e4))
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), scene.cos, scene.sin)}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor          # held: no address serves twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x, scene, 0)
    found = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    options = train.Options(precision=precision, positions=length, zero=0)
    assert y.requires_grad
    assert train.memory(options, sizes, shapes.VIT, 1)["activations"] == pytest.approx(found, rel=0.05)


def test_offload_and_monitor_change_no_loss(world, reference):
    options = ["--offload", "cpu", "--monitor", "csv_monitor", "--recompute"]
    assert losses(world, "out/offload", *options) == pytest.approx(reference, abs=1e-3)
    told, = (world / "out/offload/monitor").rglob("Train_loss.csv")
    assert [float(row[1]) for row in csv.reader(open(told)) if row[0].isdigit()] == pytest.approx(reference, abs=1e-3)


NVME_HERE = """
import runpy, sys
import types
from pathlib import Path
import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor import partitioned_param_swapper

class Files:                                # in place of DeepSpeed's asynchronous reads, which want a compiler
    def __init__(self, **settings): self.running = 0
    def sync_pwrite(self, x, path, *at): Path(path).write_bytes(x.numpy().tobytes()); return 0
    def sync_pread(self, x, path, *at):
        x.copy_(torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=x.dtype)[:x.numel()]); return 0
    def async_pwrite(self, x, path, *at): self.running += 1; return self.sync_pwrite(x, path)
    def async_pread(self, x, path, *at): self.running += 1; return self.sync_pread(x, path)
    def wait(self): done, self.running = self.running, 0; return done
    def get_alignment(self): return 512
    def is_pinned(self, x): return True
    def new_cpu_locked_tensor(self, n, like): return torch.empty(n, dtype=like.dtype)
    def free_cpu_locked_tensor(self, x): return True

get_accelerator().get_op_builder("AsyncIOBuilder").load = lambda *_, **__: types.SimpleNamespace(aio_handle=Files)
deepspeed.ops.op_builder.AsyncIOBuilder.load = get_accelerator().get_op_builder("AsyncIOBuilder").load
partitioned_param_swapper.MIN_AIO_BYTES = 4096
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_weights_that_wait_on_a_drive_are_those_of_the_files(world, reference, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps({
        "aio": {"block_size": 4096}, "zero_optimization": {"stage3_param_persistence_threshold": 10}}))
    code = NVME_HERE.replace("import runpy, sys", f"import runpy, sys; sys.argv[0] = {SCRIPT!r}")
    launch(world, sys.executable, "-c", code, "--offload", "nvme", "--nvme", str(tmp_path), "--epochs", "1",
           "--exam", "0", "--workers", "0", "--lr", "1e-4", "--out", "out/nvme",
           "--deepspeed-config", str(tmp_path / "small.json"))
    assert len(list(tmp_path.rglob("*param.tensor.swp"))) > 60
    rows = list(csv.DictReader(open(world / "out/nvme/log.csv")))
    assert [float(row["loss"]) for row in rows] == pytest.approx(reference, abs=1e-3)


def test_absent_weights_are_asked_for_by_name(world):
    done = subprocess.run([sys.executable, SCRIPT, "--size", "7b", "--llama", "", "--out", "out/7b"], cwd=world,
                          env={**os.environ, "HF_HOME": str(world / "none")}, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for part in ("weights/Llama-2-7b-hf", str(world / "none"), "hf download meta-llama/Llama-2-7b-hf"):
        assert part in done.stderr


def test_the_schedule_rises_for_a_tenth_and_falls_to_zero():
    shares = [train.learning_rate(step, 200) for step in range(201)]
    assert shares[0] == 1 / 20 and shares[19] == shares[20] == 1 and shares[200] == pytest.approx(0)
    assert shares[:20] == sorted(shares[:20]) and shares[20:] == sorted(shares[20:], reverse=True)
    assert shares[110] == pytest.approx(0.5)


def test_ranks_share_the_batch_or_say_what_they_could():
    options = train.for_size(train.Options(batch=16))
    assert train.share(options, 2) == train.settings_for(options, 2)["train_micro_batch_size_per_gpu"] == 8
    with pytest.raises(ValueError, match="--batch 16 cannot be shared by 3 ranks: take a multiple of 3"):
        train.share(options, 3)


def test_fp16_is_refused_where_the_machine_lacks_it(monkeypatch):
    monkeypatch.setattr(train.get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ValueError, match="AVX512-FP16.*--precision fp32, or bf16"):
        train.check_machine(train.Options(precision="fp16"))


@pytest.mark.parametrize("asked, least", [
    (dict(offload="cpu", zero=0), "needs --zero 1"), (dict(offload="nvme", zero=2), "needs --zero 3"),
    (dict(precision="fp16", zero=0), "take --zero 1, 2 or 3")])
def test_what_deepspeed_cannot_do_is_refused(asked, least):
    with pytest.raises(ValueError, match=least):
        train.check_machine(train.Options(**asked))
