"""Plain data from a file that anybody may have written, read as the type that the data should have.

    read(values, Schedule, "progress.schedule")      # a Schedule, or a UserError that says what is wrong, and where

A type is a Python annotation, so a dataclass or a TypedDict says once what it holds, in memory and in a file:

    bool, None, Any, Tensor    themselves
    int                        a whole number from 0 to 2**53, beyond which JSON and float64 no longer tell them apart
    float                      a finite number, or an int
    str                        text that can be written as UTF-8
    list[X], dict[K, X]        of any length; tuple[X, Y] is a list or tuple of exactly that many
    X | Y                      one of them
    a TypedDict                a dict with these keys; others are ignored, since later versions may write more
    a dataclass                a dict of its fields, from which it is made
    Annotated[X, test, words]  an X that passes the test; the words say what it must be

Nothing is read deeper than its type says, so nesting in a file cannot cause endless work.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Set
from typing import Annotated, Any

from torch import Tensor

from messages import UserError

Size = Annotated[int, lambda number: 1 <= number < 2**31, "a whole number of 1 or more"]
Positive = Annotated[float, lambda number: number > 0, "a finite number above 0"]


def read(value: Any, kind: Any, where: str) -> Any:
    """`value` as a `kind`.

    Raises:
        UserError: it is not; one line that begins with `where`.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = read(value, parts[0], where)
        return value if parts[1](value) else _refuse(where, parts[2], value)
    if origin in (typing.Union, types.UnionType):
        return _read_one_of(value, parts, where)
    if not _is_one(value, origin or kind) or (origin is tuple and len(value) != len(parts)):
        _refuse(where, words_for(kind), value)
    if origin is tuple:
        return tuple(read(item, part, f"{where}[{i}]") for i, (item, part) in enumerate(zip(value, parts, strict=True)))
    if origin is list:
        return [read(item, parts[0], f"{where}[{number}]") for number, item in enumerate(value)]
    if origin is dict:
        for key in value:
            read(key, parts[0], f"a key of {where}")
        return {key: read(item, parts[1], f"{where}[{shown(key)}]") for key, item in value.items()}
    if typing.is_typeddict(kind):
        return value | _read_fields(value, kind, kind.__required_keys__, where)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(value, kind, where)
    return value


def _read_one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    for kind in kinds:
        try:
            return read(value, kind, where)
        except UserError as error:
            problem = error
            if isinstance(value, (dict, list)) and _is_one(value, typing.get_origin(kind) or kind):
                break  # it was meant to be of this kind: the fault lies deeper
    else:
        _refuse(where, " or ".join(map(words_for, kinds)), value)
    raise problem


def _read_dataclass(value: dict, kind: Any, where: str) -> Any:
    fields = dataclasses.fields(kind)
    for name in value.keys() - {field.name for field in fields}:
        raise UserError(f"{where}: unknown {shown(name)}")
    required = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
    values = _read_fields(value, kind, required, where)
    try:
        return kind(**values)
    except ValueError as error:  # of __post_init__
        raise UserError(f"{where}: {error}") from error


def _read_fields(value: dict, kind: Any, required: Set[str], where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    places = {name: f"{where}.{name}" if where else name for name in hints}
    for name in sorted(required - value.keys()):
        raise UserError(f"{places[name]} is missing")
    return {name: read(value[name], _bare(hint), places[name]) for name, hint in hints.items() if name in value}


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) in (typing.Required, typing.NotRequired) else hint


def _is_one(value: Any, kind: Any) -> bool:
    """Whether `value` itself is of that kind, whatever it contains."""
    if kind is int:
        return type(value) is int and 0 <= value <= 2**53
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if kind is str:
        return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
    if kind in (list, tuple):
        return isinstance(value, (list, tuple))
    if kind in (bool, Tensor):
        return isinstance(value, kind)
    if kind is type(None):
        return value is None
    return kind is Any or isinstance(value, dict)


def words_for(kind: Any) -> str:
    """What a value of this kind is, for a message."""
    if typing.get_origin(kind) is Annotated:
        return typing.get_args(kind)[2]
    simple = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", Tensor: "a tensor",
              list: "a list", type(None): "none"}  # fmt: skip
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(typing.get_args(kind))}"
    return simple.get(typing.get_origin(kind) or kind, "a dict")


def shown(value: Any) -> str:
    """A value from a file for a message: short, printable, and without looking inside it."""
    if type(value) is int and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    if not isinstance(value, str):
        return f"a {type(value).__name__}"
    text = value if len(value) <= 60 else value[:57] + "..."
    return repr(text) if text.isprintable() else ascii(text)


def _refuse(where: str, words: str, value: Any) -> typing.NoReturn:
    raise UserError(f"{where} must be {words}, not {shown(value)}")
