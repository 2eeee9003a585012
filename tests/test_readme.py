"""README and docs say what the code does: the settings, the names of tests, and the same commands in both languages."""

import pathlib
import re

import pytest

from config import DATASET_DEFAULTS, FIELDS, flag_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.ko.md")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*(ROOT / name for name in READMES), *sorted((ROOT / "docs").glob("*.md"))]
}


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def test_both_languages_have_the_same_code():
    blocks = {name: re.findall(r"```.*?```", PAGES[name], re.S) for name in READMES}
    assert len(blocks["README.md"]) >= 5
    assert blocks["README.md"] == blocks["README.ko.md"]


def test_the_table_of_settings_is_complete_and_right():
    rows = dict(re.findall(r"^\| `(\w+)` \| (`--\w+` \| [^|]+) \|", PAGES["docs/settings.md"], re.M))
    expected = {}
    for name, field in FIELDS.items():
        default = shown(field.default)
        for dataset, values in DATASET_DEFAULTS.items():
            if values.get(name, field.default) != field.default:
                default += f"; {dataset} {shown(values[name])}"
        expected[name] = f"`{flag_of(name)}` | {default}"
    assert rows == expected


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(test_\w+)`", "".join(PAGES.values()))) - FIELDS.keys()
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) >= 20
    assert not {name for name in named if f"def {name}(" not in source}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_linked_exists(page):
    links = {link for link in re.findall(r"\]\(([^)#]+)", PAGES[page]) if not link.startswith("http")}
    assert not {link for link in links if not ((ROOT / page).parent / link).exists()}


def test_every_page_is_linked_from_the_readme():
    assert {page for page in PAGES if page not in READMES} <= set(re.findall(r"\]\(([^)#]+)", PAGES["README.md"]))
