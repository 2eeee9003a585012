"""Labels as they stand in a file -> classes or numbers. Slips are noted or refused alike in every format.

    class_name      the class that a cell means: '1' for 1, 1.0 and "1.0"
    class_names_of  the classes in a cell of several labels
    number_of       the number that a cell means
    read_labels     the classes of cells, and an error for each wrong one
    slips           notes on labels that look like mistakes
    ClassNumbers    the number of a class, found under any spelling of its name

A cell is what a file holds: text, a number, true or false, a list of these (.jsonl), or a dict if the label stands in
several named columns.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from messages import UserError
from tables import nfc, shown

OUTSIDE = "outside"  # the class of the characters of a text that are in no span
_NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE][+-]))([eE][+-]?\d{1,3})?")  # not written like a whole number
_WHOLE = re.compile(r"[+-]?\d+")
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")
_GROUPED = re.compile(r"[+-]?\d[\d., '\u00a0\u202f\u2019_]*\d")  # 1,5 and 1.234,5 and 1 000 and 1'000
_MISSING = {"nan", "none", "null", "n/a", "#n/a", "<na>", "nat", "nil", "missing", "?", "-"}  # not NA: also Namibia
_LONGEST = 1000  # characters of a label
_SEVERAL = "for items with any number of labels say --task multilabel"
_FRACTION = "for numbers say --task regression; for classes write whole numbers, or words such as low and high"
LARGEST = 1e100  # of a numeric label; its square, and a sum of squares, are still finite


def class_name(cell: Any, where: str) -> str:
    """The name of the class that a cell means, in NFC: '1' for 1, 1.0 and "1.0", 'true' for True.

    Raises:
        UserError: it is not a class but a fraction, several labels, or nothing.
    """
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, int) or (isinstance(cell, float) and cell.is_integer()):
        return str(int(cell))
    if cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and math.isnan(cell)):
        raise UserError(f"{where}: the label is empty; fill it in, or remove the row")
    if isinstance(cell, (list, tuple, dict)):
        raise UserError(f"{where}: label {shown(cell)} is not a class; give one, as text or a whole number, or "
                        f"{_SEVERAL}")
    if isinstance(cell, float):
        raise UserError(f"{where}: label {cell} is not a class: {_FRACTION}")
    if not isinstance(cell, str):
        raise UserError(f"{where}: label {shown(cell)} is not a class; write text, a whole number, true or false")
    name = nfc(cell).strip()
    if not (name.isascii() and name.isprintable()) and not _folded(name):
        raise UserError(f"{where}: label {shown(name)} has no visible characters; write a name, or remove the row")
    if len(name) > _LONGEST:
        raise UserError(f"{where}: label {shown(name)} has {len(name)} characters; name the column by --label_column")
    if _NUMBER.fullmatch(name):
        value = Decimal(name)
        if value != value.to_integral_value():
            raise UserError(f"{where}: label {shown(name)} is not a class: {_FRACTION}")
        return str(int(value))
    if _DECIMAL_COMMA.fullmatch(name):
        raise UserError(f"{where}: label {shown(name)} is not a class: {_FRACTION}; if it is a list, separate its "
                        f"names by ';' and say --task multilabel")
    try:
        name.encode()
    except UnicodeEncodeError as error:  # "\ud83d" in JSON
        raise UserError(
            f"{where}: label {shown(name)} holds half a surrogate pair; write the whole character"
        ) from error
    return name


def label_parts(cell: Any) -> list[Any]:
    """The parts of a cell of several labels, a list or text with ';' between them. An empty cell has none."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return []
    parts = cell.split(";") if isinstance(cell, str) else cell if isinstance(cell, (list, tuple)) else [cell]
    return [part for part in parts if not (isinstance(part, str) and not part.strip())]


def is_unlabelled(cell: Any) -> bool:
    """Whether this is no label, of a step or a character: nothing, NaN or -100. It is neither learnt nor judged."""
    return cell is None or (cell.strip() in ("", "-100") if isinstance(cell, str) else cell in (-100,) or cell != cell)


def class_names_of(cell: Any, where: str) -> list[str]:
    """The names in a cell of several labels: its parts, or the keys of a dict whose value is 1.

    Raises:
        UserError: a part is not a class, or a value of a dict is neither 0 nor 1.
    """
    if isinstance(cell, dict):
        return [name for name, value in cell.items() if _is_there(value, f"{where}, {name!r}")]
    return [class_name(part, where) for part in label_parts(cell)]


def _is_there(value: Any, where: str) -> bool:
    if is_zero(value):
        return False
    if str(value).strip().lower() in ("1", "1.0", "true"):
        return True
    raise UserError(f"{where}: {shown(value)} is neither 1 (the item has the label) nor 0; correct it")


def is_zero(value: Any) -> bool:
    """Whether the cell of a label says that the item does not have it."""
    return str(value).strip().lower() in ("0", "0.0", "-0.0", "false")


def number_of(cell: Any, where: str) -> float:
    """The number that a label means.

    Raises:
        UserError: a word, nothing, NaN, infinity, or a number that is too large.
    """
    if cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and math.isnan(cell)):
        raise UserError(f"{where}: the label is empty; fill it in, or remove the row")
    text = cell.strip() if isinstance(cell, str) else ""
    if text.lower() in _MISSING or text == "NA":
        raise UserError(f"{where}: label {shown(cell)} is a missing value; fill it in, or remove the row")
    try:
        if isinstance(cell, (bool, bytes)) or "_" in text:  # float("1_000") would be 1000
            raise ValueError
        value = float(cell)
    except (TypeError, ValueError):
        remedy = "correct it, or remove the row"
        if _GROUPED.fullmatch(text):
            remedy = "write it with a decimal point, and without a separator of thousands"
        elif re.search(r"\d", text):
            remedy = "write the number alone, without a unit or a sign"
        raise UserError(f"{where}: label {shown(cell)} is not a number; {remedy}") from None
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise UserError(f"{where}: label {shown(cell)} is not a finite number; correct it, or remove the row")
    if abs(value) > LARGEST:
        raise UserError(f"{where}: label {shown(cell)} is beyond {LARGEST:g}; correct it, or use another unit")
    return value


def same_label(one: Any, other: Any) -> bool:
    """Whether two cells mean the same label; cells that are no labels are compared as they are."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_label(one[name], other[name]) for name in one)
    for meaning in (class_name, number_of):
        with suppress(UserError):
            return meaning(one, "") == meaning(other, "")
    return one == other


def read_labels(
    cells: Sequence[Any], places: Sequence[str], known: Collection[str] = ()
) -> tuple[list[str | None], list[UserError]]:
    """(the class of each cell, None for a wrong one; an error for each wrong one, with its place).

    known: class names that are not questioned, those of a checkpoint. If all other labels are whole numbers, 'nan',
    'None' and the like are missing values, as in an array of numbers.
    """
    names: list[str | None] = []
    errors: list[UserError] = []
    seen: dict[tuple[type, Any], str] = {}  # most cells are like one before; 1, 1.0 and True are equal, hence the type
    for cell, place in zip(cells, places, strict=True):
        plain = isinstance(cell, (str, int, float))
        if plain and (name := seen.get((type(cell), cell))) is not None:
            names.append(name)
            continue
        try:
            told = isinstance(cell, str) and cell.strip() in known
            names.append(cell.strip() if told else class_name(cell, place))
            if plain:
                seen[type(cell), cell] = names[-1]
        except UserError as error:
            names.append(None)
            errors.append(error)
    there = {name for name in names if name is not None and name not in known}
    missing = {name for name in there if name.lower() in _MISSING}
    if missing and (rest := there.union(known) - missing) and all(map(_WHOLE.fullmatch, rest)):
        for number, (name, place) in enumerate(zip(names, places, strict=True)):
            if name in missing:
                names[number] = None
                errors.append(UserError(f"{place}: label {name!r} among numbers is a missing value; fill it in, or "
                                        "remove the row"))
    return names, errors


def class_order(labels: Iterable[str]) -> list[str]:
    """The distinct labels: by number if all of them are numbers, otherwise as text."""
    distinct = sorted(set(labels))
    try:
        return sorted(distinct, key=float) if all(math.isfinite(float(label)) for label in distinct) else distinct
    except ValueError:
        return distinct


# --- Slips -----------------------------------------------------------------------------------------------------------


def slips(
    cells: Sequence[Any], names: Sequence[str], several: bool = False, remedies: Sequence[str] = (),
    of_steps: bool = False,
) -> list[str]:
    """Notes on labels of training items that look like mistakes.

    Args:
        cells, names: the labels as they stand in the file, and the classes that they mean.
        several: whether an item may have any number of labels; `cells` and `names` are then those of all items, one
            after the other.
        of_steps: whether an item has a label for each step; likewise.
        remedies: the flags for unequal classes that are not given yet.
    """
    counts = Counter(names)
    notes = [*_spellings(cells, names), *_lookalikes(counts), *_missing(counts), *_combined(counts, several)]
    return notes if several or of_steps else notes + _many(counts, remedies)


def _counted(names: Iterable[str], counts: Counter) -> str:
    return ", ".join(f"{shown(name)} ({counts[name]})" for name in sorted(names)[:6])


def _spellings(cells: Sequence[Any], names: Sequence[str]) -> list[str]:
    spellings = defaultdict(set)
    for cell, name in zip(cells, names, strict=True):
        spellings[name].add(cell.strip() if isinstance(cell, str) else name if isinstance(cell, bool) else str(cell))
    mixed = [sorted(found)[:2] for _, found in sorted(spellings.items()) if len(found) > 1]
    if not mixed:
        return []
    examples = ", ".join(" and ".join(map(shown, pair)) for pair in mixed[:3])
    return [f"labels that are written in several ways are one class: {examples}"]


def _folded(name: str) -> str:
    """The name without differences of case, invisible characters, kinds of blanks and leading zeros."""
    name = unicodedata.normalize("NFKC", name).casefold()
    name = "".join(c for c in name if unicodedata.category(c) not in ("Cf", "Cc") or c.isspace())
    name = " ".join(name.split())
    return name.lstrip("+0") or "0" if _WHOLE.fullmatch(name) and name[0] != "-" else name


def _lookalikes(counts: Counter) -> list[str]:
    alike = defaultdict(list)
    for name in counts:
        alike[_folded(name)].append(name)
    groups = [names for names in alike.values() if len(names) > 1]
    if not groups:
        return []
    examples = "; ".join(_counted(names, counts) for names in groups[:3]) + ("; ..." if len(groups) > 3 else "")
    return [f"labels that differ only in case, blanks, invisible characters or zeros are classes of their own: "
            f"{examples}; make them equal if they mean the same"]


def _missing(counts: Counter) -> list[str]:
    missing = [name for name in counts if name.lower() in _MISSING]
    if all(_WHOLE.fullmatch(name) for name in counts if name != "NA"):
        missing += [name for name in counts if name == "NA"]
    if not missing or len(missing) == len(counts):
        return []
    return [f"a label looks like a missing value, and is a class of its own: {_counted(missing, counts)}; "
            "remove these rows if they have no label"]


def _combined(counts: Counter, several: bool) -> list[str]:
    """Labels that hold several names: each of them is a label by itself, or comes in other combinations too."""
    remedy = "separate them by ';'" if several else _SEVERAL
    for separator in ("|", ";", ",", "/", "+", "&", " "):
        parts = {name: _parts(name, separator) for name in counts}
        combined = {name: found for name, found in parts.items() if len(found) > 1}
        uses = Counter(part for found in parts.values() for part in set(found))
        alone = {found[0] for found in parts.values() if len(found) == 1}
        for name, found in combined.items():
            if all(part in alone or (separator != " " and uses[part] > 1) for part in found):
                return [f"a label such as {shown(name)} seems to hold several names; each combination is learnt as a "
                        f"class of its own; {remedy}"]
    return []


def _parts(name: str, separator: str) -> list[str]:
    """'a|b' and "['a', 'b']" -> ['a', 'b']"""
    if name[:1] + name[-1:] in ("[]", "()", "{}"):
        name = name[1:-1]
    return [part.strip(" '\"") for part in name.split(separator) if part.strip(" '\"")]


def _many(counts: Counter, remedies: Sequence[str]) -> list[str]:
    if not counts:
        return []
    notes, total = [], sum(counts.values())
    (largest, most), (smallest, least) = counts.most_common(1)[0], counts.most_common()[-1]
    if len(counts) > 20 and total < 3 * len(counts):
        notes.append(f"{len(counts)} classes for {total} items: if the labels are measurements, say --task regression; "
                     "if they are names of items, name the column of labels by --label_column")
    elif most >= 10 * least and len(counts) > 1:
        notes.append(f"the classes are unequal: {shown(largest)} has {most} of {total} training items, "
                     f"{shown(smallest)} {least}; look at the balanced accuracy"
                     + (f", and see {' and '.join(remedies)}" if remedies else ""))
    return notes


# --- Numbers ---------------------------------------------------------------------------------------------------------


class ClassNumbers:
    """The number of a class by its name, in any spelling that `class_name` takes for the same.

    So labels read today find the classes of an older checkpoint, which may be called "1.0" or have decomposed letters.
    """

    def __init__(self, class_names: Sequence[str]):
        self.numbers = {name: number for number, name in enumerate(class_names)}
        for name, number in list(self.numbers.items()):
            with suppress(UserError):  # a name that would be refused today
                self.numbers.setdefault(class_name(name, ""), number)
        self.folded = {_folded(name): name for name in class_names}

    def get(self, name: str) -> int | None:
        return self.numbers.get(name)

    def nearest(self, name: str) -> str:
        """' (there is ...)' if a class differs only in case, blanks or invisible characters; otherwise ''."""
        near = self.folded.get(_folded(name))
        return f" (there is {shown(near)})" if near else ""
