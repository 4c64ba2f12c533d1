"""The whole suite in two processes, since most slow tests wait for programs that they start. conftest.py loads it.

Both take one test file after another from a pipe. What the second process found, the first reports at its end.
"""
import json
import os
import tempfile

import pytest

SLOW = ("test_checkpoint.py", "test_zero.py", "test_experiments_cross.py", "test_train.py")     # begun first


def run(session, files, queue):
    """Run the tests of one file after another, as long as the queue holds numbers of files."""
    def tests():
        while number := os.read(queue, 1):
            yield from files[number[0]]

    waiting = tests()
    test = next(waiting, None)
    while test and not session.shouldfail and not session.shouldstop:
        following = next(waiting, None)             # what pytest must know to keep the fixtures that it uses, too
        session.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
        test = following


class Sender:
    """A plugin that writes the reports of tests into a file."""
    def __init__(self, config, file):
        self.config, self.file = config, file

    def pytest_runtest_logreport(self, report):
        found = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(f"{json.dumps(found)}\n")
        self.file.flush()


def pytest_runtestloop(session):
    config, by_file = session.config, {}
    for test in session.items:
        by_file.setdefault(test.path.name, []).append(test)
    files = [by_file[name] for name in sorted(by_file, key=lambda name: name not in SLOW)]
    if len(files) < 2 or session.testsfailed or config.option.collectonly or config.option.usepdb:
        return None                                 # then pytest runs them
    queue, end = os.pipe()
    os.write(end, bytes(range(len(files))))
    os.close(end)
    with tempfile.TemporaryFile("w+") as reports:
        if not (second := os.fork()):
            try:
                config.pluginmanager.unregister(name="terminalreporter")
                capture = config.pluginmanager.getplugin("capturemanager")
                capture.stop_global_capturing()     # the file into which the first process captures
                capture.start_global_capturing()
                config.pluginmanager.register(Sender(config, reports))
                run(session, files, queue)
                os._exit(0)
            finally:
                os._exit(1)
        run(session, files, queue)
        status = os.waitpid(second, 0)[1]
        reports.seek(0)
        for line in reports:
            report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
            if report.when == "setup":
                config.hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
            config.hook.pytest_runtest_logreport(report=report)
    if status:
        pytest.exit("the second process of the tests ended before its tests did", returncode=1)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)    # with --exitfirst
    return True
