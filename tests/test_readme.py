"""The README says what the code does: its settings, its test names, and the same commands in both languages."""

import pathlib
import re

import pytest

from config import DATASET_DEFAULTS, FIELDS, flag_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
READMES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md")}


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def test_both_languages_have_the_same_code():
    blocks = {name: re.findall(r"```.*?```", text, re.S) for name, text in READMES.items()}
    assert len(blocks["README.md"]) >= 8
    assert blocks["README.md"] == blocks["README.ko.md"]


@pytest.mark.parametrize("readme", READMES)
def test_the_table_of_settings_is_complete_and_right(readme):
    rows = dict(re.findall(r"^\| `(\w+)` \| (`--\w+` \| [^|]+) \|", READMES[readme], re.M))
    expected = {}
    for name, field in FIELDS.items():
        default = shown(field.default)
        for dataset, values in DATASET_DEFAULTS.items():
            if values.get(name, field.default) != field.default:
                default += f"; {dataset} {shown(values[name])}"
        expected[name] = f"`{flag_of(name)}` | {default}"
    assert rows == expected


@pytest.mark.parametrize("readme", READMES)
def test_every_test_that_it_names_exists(readme):
    named = set(re.findall(r"`(test_\w+)`", READMES[readme])) - FIELDS.keys()
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) >= 20
    assert not {name for name in named if f"def {name}(" not in source}


@pytest.mark.parametrize("readme", READMES)
def test_every_file_that_it_links_to_exists(readme):
    links = {link for link in re.findall(r"\]\(([^)#]+)", READMES[readme]) if not link.startswith("http")}
    assert links and all((ROOT / link).exists() for link in links)
