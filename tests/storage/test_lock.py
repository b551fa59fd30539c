"""The lock of a run folder: of many that want it one has it, and what a killed run leaves behind is no trap."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from faultproxy import FaultProxy, one_in
from s3server import S3Server
from waiting import wait_for

import reducer.storage.lock_kinds
from reducer import InputError
from reducer.errors import LostLockError
from reducer.storage.location import Location
from reducer.storage.lock import check_unlocked, holder, is_of_lock, locked
from reducer.storage.lock_kinds import LOCK, Holder

#: A process that takes locks and gives them back, as it is told on its standard input.
RUNNER = """
import errno, json, logging, sys, time
import reducer.storage.lock
from reducer import InputError
from reducer.storage.location import Location

def no_locks(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("reducer").addHandler(handler)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if order["without_flock"]:
        import fcntl
        fcntl.flock = no_locks
    place = Location(order["path"], order["options"])
    said.clear()
    time.sleep(max(0, order["at"] - time.time()))
    try:
        with reducer.storage.lock.locked(place, break_lock=order["break_lock"]):
            print(json.dumps({"won": True, "said": said}), flush=True)
            sys.stdin.readline()
    except InputError as error:
        print(json.dumps({"won": False, "said": str(error)}), flush=True)
        sys.stdin.readline()
    print(json.dumps({"said": said}), flush=True)
"""


class Runner:
    """Another process that takes locks."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", RUNNER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def order(
        self, place: Location | Path, *, at: float = 0, break_lock: bool = False, without_flock: bool = False
    ) -> None:
        where = place if isinstance(place, Location) else Location(str(place))
        self._say(
            {"path": where.path, "options": {**where.options}, "at": at, "break_lock": break_lock}
            | {"without_flock": without_flock}
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return self.answer() if line == "ready\n" else json.loads(line)

    def take(self, place: Location | Path, **how: Any) -> dict[str, Any]:
        self.order(place, **how)
        return self.answer()

    def give_back(self) -> list[str]:
        """End the run; gives what it has logged."""
        self._say({})
        said: list[str] = self.answer()["said"]
        return said

    def kill(self) -> None:
        """``kill -9``, and leave it a zombie."""
        self.process.kill()
        wait_for(lambda: psutil.Process(self.process.pid).status() == psutil.STATUS_ZOMBIE, "its end")

    def _say(self, what: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()


@pytest.fixture
def runner() -> Iterator[Callable[[], Runner]]:
    started: list[Runner] = []

    def start() -> Runner:
        started.append(Runner())
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged by now."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == "reducer"]


def lock_of(process: int, **others: Any) -> Holder:
    """The lock of a process of this host."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return replace(Holder(socket.gethostname(), process, since, uuid.uuid4().hex), **others)


def stale_lock(**others: Any) -> Holder:
    """The lock of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return lock_of(process.pid, **others)


def write(folder: Path, held: Holder) -> Holder:
    (folder / LOCK).write_bytes(held.to_json())
    return held


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no file system of this process have locks."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(reducer.storage.lock_kinds, "SETTLE_SECONDS", 0.1)


def try_lock(place: Location, **how: Any) -> bool:
    try:
        with locked(place, **how):
            return True
    except InputError:
        return False


def winners(place: Location, *, rounds: int = 1, **how: Any) -> list[int]:
    """How many of eight threads have the lock at once, in each round."""
    barrier = threading.Barrier(8)

    def take(_: int) -> bool:
        barrier.wait()
        try:
            with locked(place, **how):
                barrier.wait()
                return True
        except InputError:
            barrier.wait()
            return False

    with ThreadPoolExecutor(8) as pool:
        return [sum(pool.map(take, range(8))) for _ in range(rounds)]


# One host


def test_the_second_is_refused_while_the_first_lives(tmp_path: Path, runner: Callable[[], Runner]) -> None:
    place = Location(str(tmp_path))
    assert holder(place) is None
    first = runner()
    assert first.take(tmp_path) == {"won": True, "said": []}
    held = holder(place)
    assert held is not None
    assert held.alive is True
    assert (held.host, held.pid) == (socket.gethostname(), first.process.pid)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(held.since)) < timedelta(seconds=30)
    content = (tmp_path / LOCK).read_bytes()
    assert json.loads(content) == {"host": held.host, "pid": held.pid, "since": held.since, "token": held.token}
    for refuse in (lambda: check_unlocked(place), lambda: locked(place).__enter__()):
        with pytest.raises(InputError) as refused:
            refuse()
        assert refused.value.exit_code == 2
        assert str(refused.value) == (
            f"{tmp_path} is locked by another run: host {held.host}, process {held.pid}, since {held.since}. "
            "Wait until it ends or, if it is surely gone, give --break-lock"
        )
    assert (tmp_path / LOCK).read_bytes() == content
    check_unlocked(place, break_lock=True)
    assert (tmp_path / LOCK).read_bytes() == content
    assert first.give_back() == []
    assert os.listdir(tmp_path) == []
    check_unlocked(place)
    with locked(place):
        assert os.listdir(tmp_path) == [LOCK]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("reaped", [False, True])
def test_the_lock_of_a_killed_run_is_taken_over(
    tmp_path: Path, runner: Callable[[], Runner], messages: Callable[[], list[str]], reaped: bool
) -> None:
    first = runner()
    assert first.take(tmp_path)["won"]
    first.kill()
    if reaped:
        first.process.wait()
    place = Location(str(tmp_path))
    held = holder(place)
    assert held is not None
    assert held.alive is False
    check_unlocked(place)
    assert messages() == []
    with locked(place):
        now = holder(place)
        assert now is not None
        assert (now.pid, now.alive) == (os.getpid(), True)
    assert messages() == [
        f"{tmp_path}: the lock of a run that ended without giving it back (host {held.host}, pid {held.pid}) was taken "
        "over"
    ]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("others", [{"pid": 1}, {"pid": os.getpid()}], ids=["of another", "of our own"])
def test_the_lock_of_a_killed_run_is_taken_over_though_its_process_number_is_in_use(
    tmp_path: Path, others: dict[str, Any]
) -> None:
    write(tmp_path, stale_lock(**others))
    held = holder(Location(str(tmp_path)))
    assert held is not None
    assert held.alive is False
    assert try_lock(Location(str(tmp_path)))


#: Takes the lock of a folder, says so, and tells after some seconds whether it still has it.
NAMESPACED = """
import os, sys
from reducer import InputError
from reducer.errors import LostLockError
from reducer.storage.location import Location
from reducer.storage.lock import holder, locked
try:
    with locked(Location(sys.argv[1])) as check:
        print("has it as process", os.getpid(), flush=True)
        sys.stdin.readline()
        check()
        print("still has it", flush=True)
except InputError as error:
    print(holder(Location(sys.argv[1])).alive, error, flush=True)
"""


def test_a_run_in_another_pid_namespace_of_the_same_host_name_is_refused(tmp_path: Path) -> None:
    namespace = ["unshare", "--pid", "--fork", "--mount-proc"]
    try:
        subprocess.run([*namespace, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("namespaces of processes may not be made here")
    command = [*namespace, sys.executable, "-c", NAMESPACED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "has it as process 1\n"
        second = subprocess.run(command, input="", capture_output=True, text=True, check=True)
        assert second.stdout.startswith(
            f"True {tmp_path} is locked by another run: host {socket.gethostname()}, process 1"
        )
        assert not try_lock(Location(str(tmp_path)))
        said, _ = first.communicate("\n")
    assert said == "still has it\n"
    assert os.listdir(tmp_path) == []


def test_a_process_does_not_take_its_own_lock_again(tmp_path: Path) -> None:
    place = Location(str(tmp_path))
    with locked(place):
        content = (tmp_path / LOCK).read_bytes()
        with pytest.raises(InputError, match=f"process {os.getpid()}"), locked(place):
            pass
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(try_lock, place).result() is False
        assert (tmp_path / LOCK).read_bytes() == content
    assert winners(place) == [1]
    assert os.listdir(tmp_path) == []


def race(tmp_path: Path, runners: list[Runner], rounds: int, held: Holder | None, **how: Any) -> None:
    """Let all run for the lock of a folder, at once, several times; exactly one must get it."""
    for number in range(rounds):
        folder = tmp_path / f"{number}-{uuid.uuid4().hex}"
        folder.mkdir()
        if held is not None:
            write(folder, held)
        at = time.time() + 0.05
        for one in runners:
            one.order(folder, at=at, **how)
        answers = [one.answer() for one in runners]
        won = [one for one, answer in zip(runners, answers, strict=True) if answer["won"]]
        assert len(won) == 1, answers
        now = holder(Location(str(folder)))
        assert now is not None
        assert now.pid == won[0].process.pid
        assert all("is locked by another run" in answer["said"] for answer in answers if not answer["won"])
        assert [one.give_back() for one in runners if one is not won[0]]
        assert os.listdir(folder) == [LOCK]
        won[0].give_back()
        assert os.listdir(folder) == []


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path, runner: Callable[[], Runner]) -> None:
    runners = [runner() for _ in range(8)]
    stale = stale_lock()
    race(tmp_path, runners, 12, stale)
    race(tmp_path, runners, 6, None)
    race(tmp_path, runners, 1, stale, without_flock=True)
    race(tmp_path, runners, 6, None, without_flock=True)


def test_a_folder_that_something_else_has_locked(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)  # flock RUN reducer run ... --output RUN
    fcntl.flock(folder, fcntl.LOCK_EX)
    with locked(Location(str(tmp_path))):
        assert not try_lock(Location(str(tmp_path)))
    os.close(folder)
    assert os.listdir(tmp_path) == []


def test_who_looks_at_a_lock_keeps_nobody_from_it(tmp_path: Path) -> None:
    write(tmp_path, stale_lock())
    with open(tmp_path / LOCK) as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        timer = threading.Timer(0.03, fcntl.flock, (looking, fcntl.LOCK_UN))
        timer.start()
        assert try_lock(Location(str(tmp_path)))
        timer.join()


def test_what_a_run_leaves_that_is_killed_as_it_takes_the_lock(
    tmp_path: Path, messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reducer.storage.lock_kinds, "HALF_WRITTEN_SECONDS", 0.02)
    place = Location(str(tmp_path))
    (tmp_path / LOCK).touch()
    assert holder(place) is None
    check_unlocked(place)
    with locked(place):
        assert not try_lock(place)
    assert os.listdir(tmp_path) == []
    assert messages() == []


def test_names_of_locks() -> None:
    # The last is of an earlier version.
    names = [LOCK, "notes.tmp", "lock.json.tmp", f".{LOCK}.{uuid.uuid4().hex}.tmp"]
    assert [is_of_lock(name) for name in names] == [True, False, False, True]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_run_that_fails_gives_its_lock_back(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), locked(Location(str(tmp_path))):
        raise error
    assert os.listdir(tmp_path) == []


def test_a_lock_that_cannot_be_removed_hides_no_failure(
    tmp_path: Path, messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(ValueError, match="the failure itself"), locked(Location(str(tmp_path))):
        monkeypatch.setattr(Path, "unlink", refuse)
        raise ValueError("the failure itself")
    monkeypatch.undo()
    assert messages() == [f"{tmp_path}: the lock (lock.json) could not be removed: Permission denied"]
    assert try_lock(Location(str(tmp_path)))


def test_a_folder_that_is_removed_meanwhile_hides_no_failure(tmp_path: Path, messages: Callable[[], list[str]]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(ValueError, match="the failure itself"), locked(Location(str(folder))):
        shutil.rmtree(folder)
        raise ValueError("the failure itself")
    assert messages() == [f"{folder}: the lock of this run was taken away: another run may have written here"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_what_goes_wrong_while_the_lock_is_written_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(handle: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((KeyboardInterrupt, InputError)), locked(Location(str(tmp_path))):
        pass
    assert os.listdir(tmp_path) == []


def test_a_forked_process_does_not_give_the_lock_back(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from reducer.storage.lock import locked\n"
        "from reducer.storage.location import Location\n"
        "with locked(Location(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"
        "        sys.exit()\n"
        "    os.wait()\n"
        "    print(os.listdir(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == f"['{LOCK}']\n"
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    assert holder(Location(str(tmp_path / "none"))) is None
    check_unlocked(Location(str(tmp_path / "none")))
    (tmp_path / "file").touch()
    for name, reason in (("none", "No such file or directory"), ("file", "Not a directory")):
        with pytest.raises(InputError) as refused, locked(Location(str(tmp_path / name))):
            pass
        assert str(refused.value) == f"the run folder {tmp_path / name} cannot be used: {reason}"


# Another host, and --break-lock


def test_the_lock_of_another_host_is_refused_until_it_is_broken(
    tmp_path: Path, messages: Callable[[], list[str]]
) -> None:
    place = Location(str(tmp_path))
    held = write(tmp_path, stale_lock(host="node7", since="2026-02-03T04:05:06+00:00"))
    assert held.alive is None
    said = f"host node7, process {held.pid}, since 2026-02-03T04:05:06+00:00"
    with pytest.raises(InputError, match=f"is locked by another run: {said.replace('+', '.')}. Wait"), locked(place):
        pass
    with pytest.raises(InputError, match="give --break-lock"):
        check_unlocked(place)
    assert holder(place) == held
    with locked(place, break_lock=True):
        now = holder(place)
        assert now is not None
        assert now.pid == os.getpid()
        assert not try_lock(place)
    assert messages() == [f"{tmp_path}: the lock of another run ({said}) was broken (--break-lock)"]
    assert os.listdir(tmp_path) == []


def test_a_run_whose_lock_was_broken_leaves_that_of_the_other(
    tmp_path: Path, runner: Callable[[], Runner], messages: Callable[[], list[str]]
) -> None:
    place = Location(str(tmp_path))
    second = runner()
    with locked(place):
        assert second.take(tmp_path, break_lock=True)["won"]
    held = holder(place)
    assert held is not None
    assert held.pid == second.process.pid
    taken = f"{tmp_path}: the lock of this run was taken away{{}}: another run may have written here"
    assert messages() == [taken.format(f" (now: {held})")]
    (said,) = second.give_back()
    assert said.endswith("was broken (--break-lock)")
    with locked(place):
        assert second.take(tmp_path, break_lock=True)["won"]
        second.give_back()
    assert messages()[1:] == [taken.format("")]
    assert os.listdir(tmp_path) == []


def test_a_run_notices_that_its_lock_was_broken(tmp_path: Path, runner: Callable[[], Runner]) -> None:
    second = runner()
    with locked(Location(str(tmp_path))) as check:
        check()
        assert second.take(tmp_path, break_lock=True)["won"]
        lost = f"the lock of {tmp_path} was taken by another run"
        with pytest.raises(
            LostLockError, match=rf"{lost} \(host .*, process {second.process.pid}, .*\): this one ends"
        ):
            check()
        second.give_back()
        with pytest.raises(LostLockError, match=f"{lost}: this one ends, and writes nothing more"):
            check()


def test_of_many_that_break_the_same_lock_one_gets_it(
    tmp_path: Path, messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, stale_lock(host="elsewhere"))
    all_have_read, has_read, read = threading.Barrier(8), threading.local(), reducer.storage.lock_kinds._LocalLock.read

    def read_together(lock: reducer.storage.lock_kinds._LocalLock) -> bytes | None:
        content = read(lock)
        if not hasattr(has_read, "before"):
            has_read.before = True
            all_have_read.wait()
        return content

    monkeypatch.setattr(reducer.storage.lock_kinds._LocalLock, "read", read_together)
    assert winners(Location(str(tmp_path)), break_lock=True) == [1]
    assert len(messages()) == 1
    assert "host elsewhere" in messages()[0]
    assert os.listdir(tmp_path) == []


def test_break_lock_where_there_is_none_says_nothing(tmp_path: Path, messages: Callable[[], list[str]]) -> None:
    assert try_lock(Location(str(tmp_path)), break_lock=True)
    assert messages() == []


GOOD = {"host": "h", "pid": 7, "since": "now", "token": "t"}


BROKEN: dict[str, bytes] = {
    "a half": b'{"host": "h", "pid": 7, "proc',
    "a list": b"[]",
    "null": b"null",
    "no text": b"\xff\xfe\x00",
    "a deep list": b"[" * 100_000,
    "a pid of text": json.dumps({**GOOD, "pid": "7"}).encode(),
    "no pid": json.dumps({**GOOD, "pid": 0}).encode(),
    "a large pid": json.dumps({**GOOD, "pid": 2**40}).encode(),
    "a true pid": json.dumps({**GOOD, "pid": True}).encode(),
    "control characters": json.dumps({**GOOD, "host": "\x1b[2J"}).encode(),
    "no time": json.dumps({**GOOD, "since": None}).encode(),
    "no token": json.dumps({name: value for name, value in GOOD.items() if name != "token"}).encode(),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_lock_that_cannot_be_read_is_refused_until_it_is_broken(
    tmp_path: Path, messages: Callable[[], list[str]], content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reducer.storage.lock_kinds, "HALF_WRITTEN_SECONDS", 0.02)
    place = Location(str(tmp_path))
    (tmp_path / LOCK).write_bytes(content)
    for refuse in (lambda: holder(place), lambda: check_unlocked(place), lambda: locked(place).__enter__()):
        with pytest.raises(InputError) as refused:
            refuse()
        assert str(refused.value) == (
            f"{tmp_path} holds a lock.json that cannot be read: another run may be at work there. Wait until "
            "it ends or, if surely none is, give --break-lock"
        )
    assert (tmp_path / LOCK).read_bytes() == content
    with locked(place, break_lock=True):
        assert holder(place) is not None
    assert messages() == [f"{tmp_path}: a lock.json that cannot be read was replaced (--break-lock)"]
    assert os.listdir(tmp_path) == []


def test_a_lock_of_another_version_is_read(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({**GOOD, "process_started": 1.5, "more": 1}))
    assert holder(Location(str(tmp_path))) == Holder(**GOOD)  # type: ignore[arg-type]


def test_a_lock_that_is_half_written_is_waited_for(tmp_path: Path) -> None:
    held = lock_of(os.getpid())
    (tmp_path / LOCK).touch()
    timer = threading.Timer(0.2, write, (tmp_path, held))
    timer.start()
    assert holder(Location(str(tmp_path))) == held
    timer.join()


# File systems without locks


def test_where_there_are_no_locks_the_file_keeps_others_out(
    tmp_path: Path, messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flock(monkeypatch)
    place = Location(str(tmp_path))
    assert winners(place) == [1]
    assert messages() == [f"{tmp_path}: its file system has no locks, lock.json alone keeps others out"]
    with locked(place):
        held = holder(place)
        assert held is not None
        assert (held.pid, held.alive) == (os.getpid(), True)
        assert not try_lock(place)
        with pytest.raises(InputError, match=f"process {os.getpid()}"):
            check_unlocked(place)
    stale = write(tmp_path, stale_lock())
    check_unlocked(place)
    with locked(place):
        assert not try_lock(place)
    left = f"{tmp_path}: the lock of a run that ended without giving it back (host {stale.host}, pid {stale.pid})"
    assert f"{left} was taken over" in messages()
    (tmp_path / LOCK).touch()
    assert not try_lock(place)
    assert try_lock(place, break_lock=True)
    assert os.listdir(tmp_path) == []


def test_a_process_that_is_hidden_may_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch)
    write(tmp_path, stale_lock())

    def refuse(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    # As where /proc is mounted with hidepid=2, and the process is of another user.
    monkeypatch.setattr(os, "kill", refuse)
    held = holder(Location(str(tmp_path)))
    assert held is not None
    assert held.alive is True
    assert not try_lock(Location(str(tmp_path)))


# URLs

#: Requests to S3 are made once.
ONCE = {"retries": {"total_max_attempts": 1}}


@pytest.fixture
def bucket(s3: S3Server) -> Location:
    """A run folder of the test's own on S3."""
    s3.make_bucket("locks")
    return Location(f"s3://locks/{uuid.uuid4().hex}", s3.options())


def keys(s3: S3Server, place: Location) -> list[str]:
    return s3.list_keys("locks", place.path.rpartition("/")[2])


def test_s3_refuses_the_second_even_if_the_first_was_killed(
    s3: S3Server, bucket: Location, runner: Callable[[], Runner], messages: Callable[[], list[str]]
) -> None:
    assert holder(bucket) is None
    check_unlocked(bucket)
    first = runner()
    assert first.take(bucket) == {"won": True, "said": []}
    held = holder(bucket)
    assert held is not None
    assert (held.pid, held.alive) == (first.process.pid, True)
    whose = f"{bucket.path} is locked by another run: {held}"
    advice = ". Wait until it ends or, if it is surely gone, give --break-lock"
    for gone in ("", " (no such process runs here now)"):
        for refuse in (lambda: check_unlocked(bucket), lambda: locked(bucket).__enter__()):
            with pytest.raises(InputError) as refused:
                refuse()
            assert str(refused.value) == whose + gone + advice
        if not gone:
            first.kill()
            first.process.wait()
    assert holder(bucket) == held
    check_unlocked(bucket, break_lock=True)
    with locked(bucket, break_lock=True):
        now = holder(bucket)
        assert now is not None
        assert now.pid == os.getpid()
        assert not try_lock(bucket)
    assert messages() == [f"{bucket.path}: the lock of another run ({held}) was broken (--break-lock)"]
    assert keys(s3, bucket) == []


def test_of_many_on_s3_one_gets_the_lock(s3: S3Server, bucket: Location, runner: Callable[[], Runner]) -> None:
    assert winners(bucket, rounds=2) == [1, 1]
    assert keys(s3, bucket) == []
    runners = [runner() for _ in range(3)]
    assert all(one.process.stdout is not None and one.process.stdout.readline() for one in runners)
    at = time.time() + 0.5
    for one in runners:
        one.order(bucket, at=at)
    assert sum(one.answer()["won"] for one in runners) == 1


def test_a_failing_run_gives_its_lock_on_s3_back(
    s3: S3Server, bucket: Location, runner: Callable[[], Runner], messages: Callable[[], list[str]]
) -> None:
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), locked(bucket):
            assert keys(s3, bucket) == [f"{bucket.path.rpartition('/')[2]}/{LOCK}"]
            raise error
        assert keys(s3, bucket) == []
    second = runner()
    with locked(bucket):
        assert second.take(bucket, break_lock=True)["won"]
    assert len(keys(s3, bucket)) == 1
    assert "was taken away (now: host" in messages()[0]
    second.give_back()
    assert keys(s3, bucket) == []


def test_a_broken_lock_on_s3_is_refused_until_it_is_broken(s3: S3Server, bucket: Location) -> None:
    s3.client().put_object(Bucket="locks", Key=f"{bucket.path.rpartition('/')[2]}/{LOCK}", Body=b"{")
    for refuse in (lambda: check_unlocked(bucket), lambda: locked(bucket).__enter__()):
        with pytest.raises(InputError, match=r"holds a lock\.json that cannot be read"):
            refuse()
    assert try_lock(bucket, break_lock=True)
    assert keys(s3, bucket) == []


def test_the_lock_is_ours_though_the_answer_was_lost(s3: S3Server, bucket: Location) -> None:
    with FaultProxy(s3.endpoint, one_in(1, "reset", ("PUT",))) as proxy:
        with locked(Location(bucket.path, s3.options(endpoint_url=proxy.endpoint))):
            assert not try_lock(bucket)
            puts = [status for method, _, status in proxy.log if method == "PUT"]
            assert puts == [0, 412]  # the first was carried out, its answer cut off
        assert keys(s3, bucket) == []


def test_a_lock_on_s3_that_cannot_be_removed_hides_no_failure(
    s3: S3Server, bucket: Location, messages: Callable[[], list[str]]
) -> None:
    with FaultProxy(s3.endpoint, one_in(1, "status-500", ("DELETE",), attempts=99)) as proxy:
        place = Location(bucket.path, s3.options(endpoint_url=proxy.endpoint, config_kwargs=ONCE))
        with pytest.raises(ValueError, match="the failure itself"), locked(place):
            raise ValueError("the failure itself")
    (said,) = messages()
    assert said.startswith(f"{bucket.path}: the lock (lock.json) could not be removed: OSError: ")
    assert not try_lock(bucket)


def test_s3_that_cannot_be_used(s3: S3Server, bucket: Location, messages: Callable[[], list[str]]) -> None:
    readonly = Location(bucket.path, s3.options(key=s3.ro_key, secret=s3.ro_secret))
    check_unlocked(readonly)
    secret = "not-the-secret-of-this-server"
    for place, match in (
        (readonly, "PermissionError.* Access is refused"),
        (Location(bucket.path, s3.options(secret=secret)), "PermissionError.* Access is refused"),
        (
            Location(bucket.path, s3.options(endpoint_url="http://127.0.0.1:9", config_kwargs=ONCE)),
            "Endpoint.* server is up",
        ),
    ):
        with (
            pytest.raises(InputError, match=f"the run folder {place.path} cannot be used: {match}") as refused,
            locked(place),
        ):
            pass
        assert secret not in str(refused.value)
        assert s3.ro_secret not in str(refused.value)
    assert messages() == []


def test_an_object_store_that_knows_no_conditions(bucket: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs
    from botocore.exceptions import ClientError

    call = s3fs.S3FileSystem.call_s3
    refused = []

    def call_s3(system: Any, method: str, **settings: Any) -> Any:
        if "IfNoneMatch" in settings:
            refused.append(method)
            cause = ClientError({"Error": {"Code": "NotImplemented", "Message": "A header is not known"}}, method)
            raise OSError(errno.ENOSYS, "A header is not known") from cause
        return call(system, method, **settings)

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", call_s3)
    assert winners(bucket) == [1]
    assert refused
    assert holder(bucket) is None


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "409"])
def test_a_conflict_on_s3_is_asked_again(bucket: Location, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    import s3fs
    from botocore.exceptions import ClientError

    call = s3fs.S3FileSystem.call_s3
    left = [1, 1]

    def call_s3(system: Any, method: str, **settings: Any) -> Any:
        if "IfNoneMatch" in settings and left:
            left.pop()
            raise OSError(errno.EBUSY, "conflict") from ClientError({"Error": {"Code": code}}, method)
        return call(system, method, **settings)

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", call_s3)
    assert try_lock(bucket)
    left.extend([1] * 99)
    monkeypatch.setattr(reducer.storage.lock_kinds, "PAUSE", 0.0)
    with pytest.raises(InputError, match=r"cannot be locked: others take its lock and give it back all the time$"):
        locked(bucket).__enter__()
    assert holder(bucket) is None


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_other_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(reducer.storage.lock_kinds, "SETTLE_SECONDS", 0.5)
    place = Location(f"memory://{uuid.uuid4().hex}" if scheme == "memory" else f"file://{tmp_path}")
    assert holder(place) is None
    assert winners(place) == [1]
    assert holder(place) is None
    with locked(place):
        with pytest.raises(InputError, match=r"is locked by another run: host .* give --break-lock"):
            check_unlocked(place)
        assert not try_lock(place)
        assert try_lock(place, break_lock=True)
    assert holder(place) is None
