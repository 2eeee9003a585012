"""Files that the commands write: each one whole or not at all, in a folder that one run at a time owns.

    with owned("checkpoints"):                       # a second run in this folder is refused
        with written_whole("checkpoints/log.jsonl", "w", encoding="utf-8") as file:
            file.write(...)                          # the old file stays until the new one is complete
"""

import errno
import os
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

from messages import UserError, print_note

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

PathLike = str | os.PathLike
LOCK = "run.lock"
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # how the system reports a lock that another process holds
PATIENCE = 5  # seconds to wait for a file that another program holds open

_owners: dict[Path, object] = {}  # folders of this process's runs, since a process is not stopped by its own locks


# --- Reading ---------------------------------------------------------------------------------------------------------


def checksum_of(path: PathLike) -> int:
    """crc32 of a file's bytes. Raises UserError if it cannot be read."""
    result = 0
    try:
        with open(path, "rb") as file:
            while data := file.read(2**20):
                result = zlib.crc32(data, result)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return result


# --- Writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(path: PathLike, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """A file to write, which replaces `path` at the end of the block: complete, and flushed to the disk.

    Until then it lies beside `path`, under a name that no other process or thread uses. It is removed if the block
    raises. `options` are those of open().

    Raises:
        OSError: it cannot be written; the old file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{threading.get_native_id()}.tmp")
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def replace(source: Path, target: Path) -> None:
    """Move a file, replacing an existing one.

    On Windows that fails while a virus scanner, an editor or a backup holds the file, usually for a moment, so it is
    tried for PATIENCE seconds.
    """
    wait = 0.05
    until = time.monotonic() + PATIENCE
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if time.monotonic() + wait > until:
                raise
        time.sleep(wait)
        wait *= 2


def remedy(error: OSError) -> str:
    """What the user can do about a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space"
    if error.errno == errno.EROFS:
        return "make the disk writable"
    if isinstance(error, PermissionError):
        return "close the program that holds it, or get the right to write there"
    return "make sure that its folder is there and its disk works"


@contextmanager
def disk_advice(path: PathLike = "a log") -> Iterator[None]:
    """Turn a file that cannot be written (`path`, if the error names none) into a UserError with the remedy. (The
    checkpoint's own errors are handled in checkpoint.py.)"""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename or path)
        raise UserError(
            f"cannot write {name}: {error.strerror or error}; {remedy(error)}, then continue with --resume; "
            "the last checkpoint is whole"
        ) from error


# --- Folders ---------------------------------------------------------------------------------------------------------


def make_folder(path: PathLike) -> Path:
    """The folder, created if necessary.

    Raises:
        UserError: nothing can be written into it.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Path(path)
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}; choose another folder") from error


def new_folder(parent: Path, name: str) -> Path:
    """A new folder of this name, with a number after it if the name is taken."""
    for number in count(1):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        with disk_advice(), suppress(FileExistsError):
            folder.mkdir()
            return folder


@contextmanager
def owned(folder: PathLike) -> Iterator[None]:
    """Own the folder, created if necessary, for the length of the block.

    The lock is the operating system's, on a file in the folder, so it ends with the process, however that ends. Child
    processes do not inherit it: a loader's workers, which outlive a killed run for a moment, do not hold it.

    Raises:
        UserError: another run owns the folder, or it cannot be written into.
    """
    folder, run = Path(folder), object()
    real = folder.resolve()
    if _owners.setdefault(real, run) is not run:
        raise _in_use(folder, f"process {os.getpid()}, this one")
    missing = [each for each in (real, *real.parents) if not os.path.exists(each)]
    try:
        with _locked(folder):
            yield
    finally:
        for each in missing:  # removed again if nothing was written into it
            with suppress(OSError):
                each.rmdir()
        del _owners[real]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / LOCK
    for attempt in count():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab+", buffering=0)  # noqa: SIM115 (the lock lasts as long as the file is open)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < 10:
                continue  # another run, which left nothing here, has just removed the folder
            raise UserError(f"cannot write into {folder}: {error.strerror}; choose another folder") from error
        try:
            _lock(file)
        except OSError as error:
            if error.errno in HELD:
                file.seek(0)
                owner = file.read().decode(errors="replace").strip()
                file.close()
                raise _in_use(folder, owner) from error
            print_note(f"the disk of {folder} has no locks ({error.strerror}): let no other run use this folder")
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # the previous owner has removed the file since it was opened
    owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    try:
        with suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(owner.encode())
        yield
    finally:
        with suppress(OSError):  # Windows does not remove an open file; there it stays, without a lock
            path.unlink()
        file.close()


def _lock(file: IO) -> None:
    if fcntl:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        file.seek(2**30)  # far beyond the text: nobody else can read what is locked
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def _in_use(folder: Path, owner: str) -> UserError:
    return UserError(
        f"{folder} belongs to a run that is still going ({owner or 'another process'}): wait until it ends, stop it, "
        "or choose another --checkpoint_dir"
    )
