"""Files that are written whole or not at all, folders that one run owns, and what is said of disks that fail."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import evaluation
import files
import plots
from files import LOCK, disk_advice, new_folder, owned, remedy, written_whole
from messages import UserError

# --- Written whole ---------------------------------------------------------------------------------------------------


def test_a_file_is_the_old_one_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with written_whole(path, "w", encoding="utf-8", newline="") as file:
        file.write("a\r\n")
        file.flush()
        assert path.read_text() == "old"
        (beside,) = {*os.listdir(tmp_path)} - {path.name}
        assert beside == f"table.csv.{os.getpid()}.tmp"
    assert path.read_bytes() == b"a\r\n"
    with pytest.raises(KeyboardInterrupt), written_whole(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"a\r\n" and os.listdir(tmp_path) == [path.name]


def test_two_threads_write_one_name(tmp_path):
    """Each of the two whole files is there in the end, nothing of the other in it."""
    path, barrier, errors = tmp_path / "results.json", threading.Barrier(2), []

    def write(value):
        try:
            for _ in range(30):
                with written_whole(path) as file:
                    file.write(value * 1000)
                    barrier.wait(10)
                    file.write(value * 1000)
                barrier.wait(10)
                assert path.read_bytes() in (b"a" * 2000, b"b" * 2000)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(value,)) for value in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("writes", ["figure", "table"])
def test_pictures_and_tables_replace_older_ones_whole(tmp_path, monkeypatch, writes):
    path = tmp_path / ("picture.png" if writes == "figure" else "results.json")
    path.write_bytes(b"old")

    def write():
        if writes == "figure":
            plots.plot_confusion_matrix(np.eye(3, dtype=int), ["a", "b", "c"], path)
        else:
            evaluation.write_results(path, {"accuracy": 1.0})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]
    write()
    if writes == "figure":
        with Image.open(path) as picture:
            picture.load()
    assert os.listdir(tmp_path) == [path.name]


def held_by_another_program(times, call=os.replace):
    """os.replace of Windows while a virus scanner holds the file: it fails so many times."""
    failed = []

    def replace(source, target):
        if len(failed) < times:
            failed.append(target)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))
        call(source, target)

    return replace


def test_a_file_that_another_program_holds_is_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "last_model.pth"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", held_by_another_program(3))
    with written_whole(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == [path.name]


def test_it_is_given_up_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", held_by_another_program(10**6))
    monkeypatch.setattr(files, "PATIENCE", 0.3)
    started = time.monotonic()
    with pytest.raises(PermissionError), written_whole(tmp_path / "table.csv") as file:
        file.write(b"new")
    assert 0.1 < time.monotonic() - started < 5 and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("number", "filename", "says"),
    [
        (errno.ENOSPC, "runs/events", "cannot write runs/events: No space left on device; free space, then"),
        (errno.EDQUOT, b"runs/\xea\xb0\x80", "cannot write runs/가: Disk quota exceeded; free space, then"),
        (errno.EFBIG, None, "cannot write a log: File too large; free space, then"),
        (errno.EROFS, b"runs", "cannot write runs: Read-only file system; make the disk writable, then"),
        (errno.EACCES, "a", "cannot write a: Permission denied; close the program that holds it, or get the right to"),
        (errno.EIO, "a", "cannot write a: Input/output error; make sure that its folder is there and its disk works"),
    ],
)
def test_each_kind_of_failure_has_its_remedy(number, filename, says):
    with pytest.raises(UserError) as error, disk_advice():
        raise OSError(number, os.strerror(number), filename)
    assert str(error.value).startswith(says) and "continue with --resume" in str(error.value)
    assert "b'" not in str(error.value)
    assert remedy(OSError(number, "")) in says + str(error.value)


# --- Folders ---------------------------------------------------------------------------------------------------------


def test_a_new_folder_has_a_name_of_its_own(tmp_path):
    folders = [new_folder(tmp_path, "run") for _ in range(3)]
    assert [folder.name for folder in folders] == ["run", "run_2", "run_3"]


def test_a_folder_that_was_made_for_nothing_is_gone_again(tmp_path):
    with pytest.raises(UserError, match="no such thing"), owned(tmp_path / "a" / "b"):
        raise UserError("no such thing")
    assert not os.listdir(tmp_path)
    with owned(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "last_model.pth").write_bytes(b"")
    assert os.listdir(tmp_path / "a" / "b") == ["last_model.pth"]


def own_and_wait(folder, pipe):
    with owned(folder):
        pipe.send(os.getpid())
        pipe.recv()


@pytest.fixture
def elsewhere(tmp_path):
    """A process that owns tmp_path / "folder" until it is told to end."""
    context = multiprocessing.get_context("fork")
    pipe, theirs = context.Pipe()
    process = context.Process(target=own_and_wait, args=(tmp_path / "folder", theirs))
    process.start()
    assert pipe.recv() == process.pid
    yield process, pipe
    process.kill()
    process.join()


def test_one_run_at_a_time(tmp_path, elsewhere):
    process, pipe = elsewhere
    for _ in range(2):  # a try that fails changes nothing
        with pytest.raises(UserError) as error, owned(tmp_path / "folder"):
            pass
        for part in (f"{tmp_path / 'folder'} belongs to a run", f"process {process.pid} on ", "--checkpoint_dir"):
            assert part in str(error.value)
    with owned(tmp_path / "other"):
        pass
    pipe.send("end")
    process.join()
    assert not (tmp_path / "folder").exists()
    with owned(tmp_path / "folder"), pytest.raises(UserError, match="this one"), owned(tmp_path / "folder"):
        pass


def test_a_killed_process_owns_nothing(tmp_path, elsewhere):
    process, _ = elsewhere
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "folder" / LOCK).exists()
    with owned(tmp_path / "folder"):
        assert str(os.getpid()) in (tmp_path / "folder" / LOCK).read_text()
    assert not os.listdir(tmp_path / "folder")


def test_child_processes_do_not_own_the_folder(tmp_path):
    """A worker that outlives the process that forked it, as workers of a killed run do for some seconds."""
    with owned(tmp_path / "folder"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        (tmp_path / "folder" / "a").write_text("")
    try:
        with owned(tmp_path / "folder"):
            pass
    finally:
        child.kill()
        child.join()


def test_a_link_is_the_same_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with owned(tmp_path / "folder"), pytest.raises(UserError, match="belongs to a run"), owned(tmp_path / "link"):
        pass


def test_many_at_once(tmp_path):
    """Of the threads that ask for one folder at any moment, one has it."""
    inside, most, got = [], [], []

    def ask():
        for _ in range(40):
            try:
                with owned(tmp_path / "folder"):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.0005)
                    inside.pop()
                    got.append(1)
            except UserError:
                pass

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and got and not (tmp_path / "folder" / LOCK).exists()


def test_a_disk_without_locks(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "lockf", none)
    with owned(tmp_path / "folder"):
        assert "has no locks (No locks available): let no other run use this folder" in capsys.readouterr().out


def test_a_full_disk_does_not_prevent_a_lock(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *args, **kwargs):
            self.file = open(*args, **kwargs)  # noqa: SIM115
            self.fileno, self.close = self.file.fileno, self.file.close

        def truncate(self, size):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "open", Full, raising=False)
    with owned(tmp_path / "folder"), pytest.raises(UserError), owned(tmp_path / "folder"):
        pass


def test_windows_locks_a_byte_that_nobody_reads(tmp_path, monkeypatch):
    """Its own call, simulated here: a locked byte cannot be read by others, and the text names the owner."""
    locked = {}

    def locking(descriptor, mode, size):
        place = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        if locked.setdefault(place, descriptor) != descriptor:
            raise PermissionError(errno.EACCES, "Permission denied")
        assert mode == 1 and size == 1 and place[1] > 10_000

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=1), raising=False)
    with owned(tmp_path / "folder"):
        monkeypatch.setattr(files, "_owners", {})  # as in another process
        with pytest.raises(UserError, match=f"process {os.getpid()} on "), owned(tmp_path / "folder"):
            pass
        monkeypatch.undo()
