"""What people are told: mistakes in one line, notes, and text from files made safe for screens and spreadsheets."""

import errno
import functools
import io
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

# --- Text from files -------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text with escapes for control and invisible characters and non-UTF-8 bytes: \\x1b, \\n, \\u200b, \\xb0."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\u3000" else _escaped(c) for c in text)


def as_utf8(text: str) -> str:
    """The text with those bytes of a file name that are not UTF-8 as escapes, so that any file can hold it."""
    if text.isascii():  # most are, and it is seen at once
        return text
    return "".join(_escaped(c) if "\ud800" <= c <= "\udfff" else c for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # Python's form of such a byte
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


# The first columns of the tables that an evaluation and a prediction write
OUR_TABLES = (
    ("id", "split", "true", "predicted", "confidence"), ("id", "class", "confidence"), ("id", "start", "end", "class"),
)  # fmt: skip
_FORMULA = re.compile("\\s*[=+@\uff1d\uff0b\uff20\uff0d-]|[\\t\\r\\n]")  # starts a formula, also in full width
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def spreadsheet_cell(text: str) -> str:
    """The text as a cell that no spreadsheet runs: a formula gets an apostrophe before it. Numbers stay."""
    return f"'{text}" if _FORMULA.match(text.lstrip("'")) and not _NUMBER.fullmatch(text) else text


def from_spreadsheet_cell(cell: str) -> str:
    """The text from which `spreadsheet_cell` made the cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell.lstrip("'")) else cell


def figure_text(value: float | None) -> str:
    """A number for the screen, with at least four significant digits; - if it is undefined."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.6g}" if abs(value) > 1 else f"{value:.4g}"


# --- Notes and mistakes ----------------------------------------------------------------------------------------------


def print_note(text: str) -> None:
    """Show a line that the user should know about; nothing stops for it."""
    print(f"note: {printable(text)}", flush=True)


def quoted(path: str | os.PathLike) -> str:
    """The path as a word of a command that the user may copy."""
    return subprocess.list2cmdline([path]) if os.name == "nt" else shlex.quote(os.fspath(path))


class UserError(ValueError):
    """A mistake of the user's. Each line of the message names what is wrong, the value and the remedy.

    Anything quoted from files and names is escaped, see `printable`.
    """

    def __init__(self, message: str = ""):
        super().__init__("\n".join(map(printable, message.split("\n"))))


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put the place (a file and line, an item) before the message of a UserError within the block, unless it has it."""
    try:
        yield
    except UserError as error:
        if place in str(error):
            raise
        raise UserError(f"{place}: {error}") from error


def refuse_together(errors: Iterable[UserError], most: int = 10) -> None:
    """Raise one UserError with a line for each of the first errors and the number of the rest; none if there are none.
    """
    lines = [str(error) for error in errors]
    if lines:
        more = [f"and {len(lines) - most} more like these"] if len(lines) > most else []
        raise UserError("\n".join(lines[:most] + more))


# --- Progress --------------------------------------------------------------------------------------------------------

QUIET = 2  # seconds of work that nothing is said about


def with_progress(items: Iterable[Any], what: str, total: int | None = None, lines: bool = True) -> Iterator[Any]:
    """The items, one by one. After QUIET seconds a bar on a terminal; in a log file a line then and one at the end.

    what: is done, such as 'checking images'. total: how many items, where len() does not say it. lines: False for
    work that is done in every epoch, about which a log file need not speak.
    """
    total = len(items) if total is None and hasattr(items, "__len__") else total
    if sys.stderr.isatty() and sys.stdout.isatty():  # processes other than the first print nowhere
        yield from tqdm(items, what, total, delay=QUIET, leave=False, dynamic_ncols=True)
        return
    started, told, number = time.monotonic(), not lines, 0
    for number, item in enumerate(items, 1):
        yield item
        if not told and (seconds := time.monotonic() - started) > QUIET:
            told = True
            left = f" of {total:,}, about {seconds / number * (total - number):,.0f} s left" if total else ""
            print(f"{what}: {number:,}{left}", flush=True)
    if told and lines:
        print(f"{what}: {number:,} in {time.monotonic() - started:,.0f} s", flush=True)


# --- What becomes of errors ------------------------------------------------------------------------------------------


# How torch (on CPU, CUDA, MPS), cuBLAS and C++ say that memory ran out; Python and NumPy raise MemoryError
_NO_MEMORY = (
    "out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc", "shared memory", "</torch_",
    "Storage size calculation overflowed",
)  # fmt: skip


_LOST_WORKER = re.compile(r"DataLoader worker \(pid.*?\) (is killed by signal: [\w ]+|exited unexpectedly)")


@contextmanager
def memory_advice(when: str, remedies: Iterable[str], afterwards: str = "") -> Iterator[None]:
    """Turn running out of memory within the block into a UserError with the remedies, the most helpful first."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, OSError):
            ran_out = error.errno == errno.ENOMEM
        else:
            ran_out = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            ran_out = ran_out or any(words in str(error) for words in _NO_MEMORY)
        if not ran_out or _LOST_WORKER.match(str(error)):
            raise
        wanted = re.search(r"allocate ([\d.]+) (bytes|[KMGTPE]iB)", str(error))
        if wanted:
            number, unit = float(wanted[1]), wanted[2]
            wanted = f"{number / 2**30:,.1f} GiB" if unit == "bytes" else f"{number:g} {unit}"
        raise UserError(
            f"out of memory {when}{f' ({wanted} more were asked for)' if wanted else ''}; try, in this order: "
            f"{', '.join(remedies)}{afterwards}"
        ) from error


@contextmanager
def worker_advice() -> Iterator[None]:
    """Turn the death of a process that loads data, which torch may notice at any moment, into a UserError."""

    def unraisable(found: Any) -> None:
        # Where an exception cannot leave a destructor, Python prints it, and torch raises it once more
        if not _LOST_WORKER.match(str(found.exc_value)):
            usual(found)

    usual, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield
    except RuntimeError as error:
        if not (lost := _LOST_WORKER.match(str(error))):
            raise
        raise UserError(
            f"{lost[0]}; the system kills processes when memory or shared memory runs out: use fewer --num_workers, a "
            "smaller --batch_size, more shared memory (docker run --shm-size=8g); continue a training run with --resume"
        ) from error
    finally:
        sys.unraisablehook = usual


def exit_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a command: a UserError ends it with `error: ...` on stderr and status 2.

    Characters that the screen cannot show are escaped, and Pillow's own warnings, which name no file, are suppressed.
    """

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # not if a caller has replaced it by something else
                stream.reconfigure(errors="backslashreplace")
        try:
            remedies = ("a smaller --batch_size", "fewer processes", "no other programs")
            with warnings.catch_warnings(), memory_advice("on this machine", remedies), worker_advice():
                warnings.filterwarnings("ignore", module=r"PIL\.")
                return main(*args, **kwargs)
        except UserError as error:
            for line in str(error).split("\n"):
                print(f"error: {line}", file=sys.stderr)
            raise SystemExit(2) from None

    return run
