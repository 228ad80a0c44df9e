"""Commands as processes: their words in logs, some at a time, signals passed on."""

import os
import re
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from openelm.errors import Stopped
from openelm.study.processes import Task, start_process, start_processes


def python(tmp_path: Path, code: str) -> list[str]:
    file = tmp_path / "program.py"
    file.write_text(code)
    return [sys.executable, str(file)]


def test_a_command_is_run_to_its_end_with_its_words_in_the_log(tmp_path):
    log = tmp_path / "log"
    assert start_process(["--version"], log) == 0
    assert start_process(["pretrain", "no such recipe"], log) == 2
    first, second, *rest = log.read_text().splitlines()
    assert first == "$ openelm --version" and re.fullmatch(r"openelm \d+\..*", second)
    assert rest[0] == "$ openelm pretrain 'no such recipe'" and rest[1].startswith("openelm pretrain: error: recipe")
    killed = python(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert start_process([], log, killed) == 128 + 9


WAITING = """
import signal, sys, time
came = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: came.append(number))
print("ready", flush=True)
while not came:
    time.sleep(0.01)
time.sleep(0.2)
print(*(signal.Signals(number).name for number in came), flush=True)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs the signals of a POSIX system")
@pytest.mark.parametrize(("name", "left", "code"), [("SIGTERM", 75, 75), ("SIGINT", 130, 130), ("SIGUSR1", 0, 75)])
def test_a_signal_is_passed_on_once_and_the_sweep_stops_with_the_commands_code(tmp_path, request, name, left, code):
    log, number = tmp_path / "log", getattr(signal, name)
    # Tests that were started in the background ignore SIGINT, and a sweep then does, too.
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, signal.SIG_DFL)))
    before = signal.getsignal(number)

    def send() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and "ready" not in (log.read_text() if log.is_file() else ""):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(Stopped, match=f"{name}: stopped, see {log}: give the same") as stopped:
        start_process([str(left)], log, python(tmp_path, WAITING))
    sender.join()
    assert stopped.value.code == code
    assert log.read_text().splitlines()[-1] == name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("code", [75, 130])
def test_a_command_that_was_itself_stopped_stops_the_sweep(tmp_path, code):
    with pytest.raises(Stopped) as stopped:
        start_process([], tmp_path / "log", python(tmp_path, f"raise SystemExit({code})"))
    assert stopped.value.code == code


def test_so_many_run_at_once_and_no_more(tmp_path):
    """Each writes when it began and when it ended."""
    program = python(
        tmp_path, "import os, sys, time\nprint(time.time()); time.sleep(0.3); print(os.environ['SAID'], time.time())"
    )
    tasks = [Task([str(number)], tmp_path / f"{number}.log") for number in range(5)]
    ended = list(start_processes(tasks, 2, environment={"SAID": "yes"}, program=program))
    assert sorted(task.words[0] for task, _ in ended) == list("01234") and {code for _, code in ended} == {0}
    spans = []
    for task in tasks:
        _, begun, told = task.log.read_text().splitlines()
        assert told.startswith("yes ")
        spans.append((float(begun), float(told.split()[1])))
    running = [sum(begun <= moment < end for begun, end in spans) for moment, _ in spans]
    assert max(running) == 2


def test_one_that_fails_is_told_of_and_the_others_go_on(tmp_path):
    program = python(tmp_path, "import sys; sys.exit(int(sys.argv[1]))")
    tasks = [Task([code], tmp_path / f"{code}.log") for code in ("0", "3", "1")]
    assert sorted(code for _, code in start_processes(tasks, 2, program=program)) == [0, 1, 3]


def test_one_that_was_stopped_ends_all_but_what_has_begun(tmp_path):
    program = python(tmp_path, "import sys, time; time.sleep(0.1 * int(sys.argv[2])); sys.exit(int(sys.argv[1]))")
    tasks = [Task(words, tmp_path / words[2]) for words in (["75", "0", "a"], ["0", "5", "b"], ["0", "0", "c"])]
    with pytest.raises(Stopped) as stopped:
        list(start_processes(tasks, 2, program=program))
    assert stopped.value.code == 75 and (tmp_path / "b").is_file() and not (tmp_path / "c").exists()


def test_who_asks_no_further_leaves_nothing_running(tmp_path):
    program = python(tmp_path, "import sys, time; time.sleep(float(sys.argv[1])); open(sys.argv[2], 'w')")
    file = tmp_path / "written"
    tasks = [Task(["0", str(tmp_path / "first")], tmp_path / "a"), Task(["2", str(file)], tmp_path / "b")]
    processes = start_processes(tasks, 2, program=program)
    next(processes)
    begun = time.monotonic()
    processes.close()
    assert time.monotonic() - begun < 1.5 and not file.exists()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs the signals of a POSIX system")
def test_a_signal_reaches_all_that_run(tmp_path, request):
    request.addfinalizer(partial(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.SIG_DFL)))
    program = python(tmp_path, WAITING)
    logs = [tmp_path / "a", tmp_path / "b"]

    def send() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not all(log.is_file() and "ready" in log.read_text() for log in logs):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(Stopped):
        list(start_processes([Task(["75"], log) for log in logs], 2, program=program))
    sender.join()
    assert [log.read_text().splitlines()[-1] for log in logs] == ["SIGTERM", "SIGTERM"]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs the signals of a POSIX system")
def test_a_signal_that_comes_while_none_runs_is_not_lost(tmp_path, request):
    """The caller may be busy with what a command has left."""
    request.addfinalizer(partial(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.SIG_DFL)))
    program = python(tmp_path, "")
    processes = start_processes([Task([name], tmp_path / name) for name in "ab"], program=program)
    next(processes)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM: stopped: give the same command again"):
        next(processes)
    assert not (tmp_path / "b").exists()
