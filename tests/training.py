"""What the tests of training share: starting runs in a folder, and waiting for their checkpoints."""
import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "train.py")


def launch(world: Path, *command: str, path: str = "") -> str:
    """Run a command in the folder, with `path` alone to find programs on, if given; returns what it printed."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path or os.environ["PATH"]}
    done = subprocess.run(command, cwd=world, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(world: Path, out: str, *options: str, ranks: int = 1, lr: str = "1e-4") -> list[float]:
    """The losses of an epoch of 9 steps, at the low rates of a default run's first ten steps of warm-up.

    At the full rate from the first step on they were seen to drift apart by up to 0.018, probably because AdamW
    with beta1 = 0 makes a whole step out of a gradient that is nothing but rounding.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launch(world, *(launcher if ranks > 1 else [sys.executable]), SCRIPT, "--epochs", "1", "--workers", "0",
           "--lr", lr, "--out", out, *options)
    with open(world / out / "log.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def at_once(*calls):
    """What these functions return; they run side by side, since one run alone leaves half of the machine idle."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [running.result() for running in [pool.submit(call) for call in calls]]


def begin(world: Path, out: str, *options: str, ranks: int = 1) -> subprocess.Popen:
    """Start a run, of 9 steps if nothing else is said, that keeps a checkpoint of every second one."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*(launcher if ranks > 1 else [sys.executable]), SCRIPT, "--epochs", "1", "--workers", "0",
               "--lr", "1e-4", "--save-steps", "2", "--out", out, *options]
    return subprocess.Popen(command, cwd=world, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def processes(world: Path, out: str) -> dict[int, str]:
    """The processes of a run into this folder, its launcher and its ranks, with the environment of each."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):                      # somebody else's, or one that just ended
            if (f"\0--out\0{out}\0" in (process / "cmdline").read_text()
                    and (process / "cwd").readlink() == world.resolve()):
                found[int(process.name)] = f"\0{(process / 'environ').read_text()}"
    return found


def kill(run: subprocess.Popen, world: Path, out: str):
    """SIGKILL for a run's launcher and its ranks, which have sessions of their own."""
    while left := processes(world, out):
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    run.communicate()


def at(folder: Path) -> tuple[str, list[str]]:
    """The latest complete checkpoint, and the ones that somebody has begun to write since."""
    latest = max((path.parent.name for path in folder.glob("step-*/progress.json")), default="")
    return latest, [step.name for step in folder.glob("step-*") if step.name > latest]


def wait_for(run: subprocess.Popen, condition, seconds: float = 120):
    deadline = time.time() + seconds
    while not condition():
        if run.poll() is not None or time.time() > deadline:
            run.kill()
            raise AssertionError(run.communicate()[0])
        time.sleep(0.001)


def finish(run: subprocess.Popen) -> str:
    printed = run.communicate(timeout=300)[0]
    assert run.returncode == 0, printed
    return printed
