"""Claims about two_processes.py: every test runs once, in one of two processes, and nothing that fails is lost."""
import os
import subprocess
import sys

from training import ROOT

FILE = """
import os, time
import pytest
first = os.getpid()                                             # tests are found before there is a second process
def test_that_passes(): time.sleep(0.3); print(first == os.getpid(), file=open("who", "a"))
@pytest.mark.skipif(True, reason="none")
def test_that_is_left_out(): pass
def test_in_the_second_process(): {second}
"""


def run(folder, second: str, *options: str) -> subprocess.CompletedProcess:
    for name in "abcd":
        (folder / f"test_{name}.py").write_text(FILE.format(second=second))
    return subprocess.run([sys.executable, "-m", "pytest", "-p", "two_processes", *options], cwd=folder, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}, capture_output=True, timeout=60)


def test_each_file_runs_in_one_of_two_processes_and_all_reports_are_one(tmp_path):
    done = run(tmp_path, "print('said'); assert first == os.getpid(), 'elsewhere'")
    who = (tmp_path / "who").read_text().split()
    assert sorted(who).count("True") == 4 - who.count("False") and 0 < who.count("False") < 4
    failed = who.count("False")
    assert done.returncode == 1 and f"{failed} failed, {8 - failed} passed, 4 skipped" in done.stdout, done.stdout
    assert done.stdout.count("AssertionError: elsewhere") >= failed and done.stdout.count("said") >= failed
    assert "[100%]" in done.stdout


def test_a_second_process_that_is_killed_is_no_success(tmp_path):
    done = run(tmp_path, "first == os.getpid() or os.kill(os.getpid(), 9)")
    assert done.returncode == 1 and "the second process of the tests ended before its tests did" in done.stdout


def test_one_file_alone_needs_no_second_process(tmp_path):
    done = run(tmp_path, "assert first == os.getpid()", "test_a.py")
    assert done.returncode == 0 and "2 passed, 1 skipped" in done.stdout
