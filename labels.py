"""Labels as they stand in a file -> classes; what looks like a slip is said, or refused, alike in every format.

    class_name      the class that a cell means: '1' for 1, 1.0 and "1.0"
    read_labels     the classes of cells, and what is wrong with which of them
    slips           notes on labels that look like mistakes
    ClassNumbers    the number of a class, found under any spelling of its name
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
_NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE][+-]))([eE][+-]?\d{1,3})?")  # that is written as no whole one is
_WHOLE = re.compile(r"[+-]?\d+")
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")
_MISSING = {"nan", "none", "null", "n/a", "#n/a", "<na>", "nat", "nil", "missing", "?", "-"}  # NA is Namibia, too
_LONGEST = 1000  # characters of a label
_SEVERAL = "several labels for an item are not offered yet"
_FRACTION = "it is a measurement, and regression is not offered yet; write whole numbers, or words such as low and high"


def class_name(cell: Any, where: str) -> str:
    """The name of the class that a cell means, in NFC: '1' for 1, 1.0 and "1.0", 'true' for True.

    Raises UserError for what is no class: a fraction, several labels, nothing.
    """
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, int) or (isinstance(cell, float) and cell.is_integer()):
        return str(int(cell))
    if cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and math.isnan(cell)):
        raise UserError(f"{where}: the label is empty; fill it in, or remove the row")
    if isinstance(cell, (list, tuple, dict)):
        raise UserError(f"{where}: label {shown(cell)} is no class: {_SEVERAL}; give one, as text or a whole number")
    if isinstance(cell, float):
        raise UserError(f"{where}: label {cell} is no class: {_FRACTION}")
    if not isinstance(cell, str):
        raise UserError(f"{where}: label {shown(cell)} is no class; write text, a whole number, true or false")
    name = nfc(cell).strip()
    if not (name.isascii() and name.isprintable()) and not _folded(name):
        raise UserError(f"{where}: label {shown(name)} holds nothing that can be seen; write a name, or remove the row")
    if len(name) > _LONGEST:
        raise UserError(f"{where}: label {shown(name)} has {len(name)} characters; name the column by --label_column")
    if _NUMBER.fullmatch(name):
        value = Decimal(name)
        if value != value.to_integral_value():
            raise UserError(f"{where}: label {shown(name)} is no class: {_FRACTION}")
        return str(int(value))
    if _DECIMAL_COMMA.fullmatch(name):
        raise UserError(f"{where}: label {shown(name)} is no class: {_FRACTION}; if it is a list, {_SEVERAL}")
    try:
        name.encode()
    except UnicodeEncodeError as error:  # "\ud83d" in JSON
        raise UserError(
            f"{where}: label {shown(name)} holds half a surrogate pair; write the whole character"
        ) from error
    return name


def class_names_of(cell: Any, where: str) -> list[str]:
    """The names in a cell of several labels: a list, or text with ';' between them; nothing is none.

    Raises UserError for what is no class.
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return []
    parts = cell.split(";") if isinstance(cell, str) else cell if isinstance(cell, (list, tuple)) else [cell]
    return [class_name(part, where) for part in parts if not (isinstance(part, str) and not part.strip())]


def is_unlabelled(cell: Any) -> bool:
    """Whether this is no label, of a step or a character: nothing, NaN or -100. It is neither learnt nor judged."""
    return cell is None or (cell.strip() in ("", "-100") if isinstance(cell, str) else cell in (-100,) or cell != cell)


def same_class(one: Any, other: Any) -> bool:
    """Whether two cells mean the same class, be they classes or not."""
    try:
        return class_name(one, "") == class_name(other, "")
    except UserError:
        return one == other


def read_labels(
    cells: Sequence[Any], places: Sequence[str], known: Collection[str] = ()
) -> tuple[list[str | None], list[UserError]]:
    """(the class of each cell, None where there is none; what is wrong with those, by place).

    `known` are names of classes that are not questioned: those of a checkpoint. Beside whole numbers alone, what stands
    for a missing value ('nan', 'None') is one, as in an array of numbers.
    """
    names: list[str | None] = []
    errors: list[UserError] = []
    for cell, place in zip(cells, places, strict=True):
        try:
            told = isinstance(cell, str) and cell.strip() in known
            names.append(cell.strip() if told else class_name(cell, place))
        except UserError as error:
            names.append(None)
            errors.append(error)
    there = {name for name in names if name is not None and name not in known}
    missing = {name for name in there if name.lower() in _MISSING}
    if missing and (rest := there - missing) and all(map(_WHOLE.fullmatch, rest)):
        for number, (name, place) in enumerate(zip(names, places, strict=True)):
            if name in missing:
                names[number] = None
                errors.append(UserError(f"{place}: label {name!r} beside numbers is a missing one; fill it in, or "
                                        "remove the row"))
    return names, errors


def class_order(labels: Iterable[str]) -> list[str]:
    """The distinct labels: by number if all of them are numbers, otherwise as text."""
    distinct = sorted(set(labels))
    try:
        return sorted(distinct, key=float) if all(math.isfinite(float(label)) for label in distinct) else distinct
    except ValueError:
        return distinct


# -- slips ----------------------------------------------------------------------------------------------------


def slips(cells: Sequence[Any], names: Sequence[str], of_items: bool = True) -> list[str]:
    """Notes on labels of training data, cells and the classes they mean, that look like mistakes; `of_items`: each is
    that of an item, not of one of its steps."""
    counts = Counter(names)
    many = _many(counts) if of_items else []
    return [*_spellings(cells, names), *_lookalikes(counts), *_missing(counts), *_combined(counts), *many]


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
    """What is left of a name without case, invisible characters, kinds of blanks, leading zeros."""
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


def _combined(counts: Counter) -> list[str]:
    """Cells that hold several names: each of them is a label by itself, or comes in other combinations too."""
    for separator in ("|", ";", ",", "/", "+", "&", " "):
        parts = {name: _parts(name, separator) for name in counts}
        combined = {name: found for name, found in parts.items() if len(found) > 1}
        uses = Counter(part for found in parts.values() for part in set(found))
        alone = {found[0] for found in parts.values() if len(found) == 1}
        for name, found in combined.items():
            if all(part in alone or (separator != " " and uses[part] > 1) for part in found):
                return [f"a label such as {shown(name)} seems to hold several names; each combination is learnt as a "
                        f"class of its own, since {_SEVERAL}"]
    return []


def _parts(name: str, separator: str) -> list[str]:
    """'a|b' and "['a', 'b']" -> ['a', 'b']"""
    if name[:1] + name[-1:] in ("[]", "()", "{}"):
        name = name[1:-1]
    return [part.strip(" '\"") for part in name.split(separator) if part.strip(" '\"")]


def _many(counts: Counter) -> list[str]:
    if not counts:
        return []
    notes, total = [], sum(counts.values())
    (largest, most), (smallest, least) = counts.most_common(1)[0], counts.most_common()[-1]
    if len(counts) > 20 and total < 3 * len(counts):
        notes.append(f"{len(counts)} classes for {total} items: if the labels are measurements, regression is not "
                     "offered yet; if they are names of items, name the column of labels by --label_column")
    elif most >= 10 * least and len(counts) > 1:
        notes.append(f"the classes are unequal: {shown(largest)} has {most} of {total} training items, "
                     f"{shown(smallest)} {least}; class weights, and choosing the best epoch by another score than "
                     "accuracy, are not offered yet: look at the balanced accuracy")
    return notes


# -- numbers --------------------------------------------------------------------------------------------------


class ClassNumbers:
    """The number of a class by its name; spellings that `class_name` takes for the same are found as well.

    So classes of an older checkpoint, which knew "1.0" and decomposed letters, are found by labels read as today.
    """

    def __init__(self, class_names: Sequence[str]):
        self.numbers = {name: number for number, name in enumerate(class_names)}
        for name, number in list(self.numbers.items()):
            with suppress(UserError):  # a name that is none today
                self.numbers.setdefault(class_name(name, ""), number)
        self.folded = {_folded(name): name for name in class_names}

    def get(self, name: str) -> int | None:
        return self.numbers.get(name)

    def nearest(self, name: str) -> str:
        """' (there is ...)' of a class that differs only in case, blanks or invisible characters; '' if none does."""
        near = self.folded.get(_folded(name))
        return f" (there is {shown(near)})" if near else ""
