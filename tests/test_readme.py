"""README and docs say what the code does: settings, commands, names of tests, the order of imports; and they stay short
enough to be read as plain text."""

import ast
import pathlib
import re
import shlex
import unicodedata

import pytest

import inference
from config import DATASET_DEFAULTS, FIELDS, flag_of, make_parser, resolve

ROOT = pathlib.Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.ko.md")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*(ROOT / name for name in READMES), *sorted((ROOT / "docs").glob("*.md"))]
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def prose(text):
    return BLOCK.sub("", text)


def table_rows(text):
    return [line for line in prose(text).splitlines() if line.startswith("|")]


def columns(text):
    """As a terminal counts them: a Korean character takes two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def inline_code(text):
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def commands(text):
    """The commands of a page, in blocks and in the text, as lists of words."""
    blocks = [block.replace("\\\n", " ").splitlines() for language, block in BLOCK.findall(text) if language == "bash"]
    for line in [line for block in blocks for line in block] + inline_code(text):
        words = shlex.split(line, comments=True) if "python" in line or "torchrun" in line else []
        if any(word.endswith(".py") for word in words):
            yield words


# --- Settings, commands, tests, files --------------------------------------------------------------------------------


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


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_is_understood(page, monkeypatch):
    class Parsed(Exception):
        pass

    def parsed(path):
        raise Parsed

    def understood(flags):
        args = make_parser("").parse_args(flags)
        resolve(file=args.file, flags=args.flags)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(inference, "load_checkpoint", parsed)
    monkeypatch.setattr(inference, "load_pretrained", parsed)
    for words in commands(PAGES[page]):
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, flags = words[at], [word for word in words[at + 1 :] if word not in ("$what", "...")]
        if "--" in flags:  # what follows is for train.py
            understood(flags[flags.index("--") + 1 :])
            flags = flags[: flags.index("--")]
        if script == "train.py":
            understood(flags)
        elif script == "inference.py" and flags:
            with pytest.raises(Parsed):
                inference.main(flags)
        elif "-m" not in words and flags:
            source = (ROOT / script).read_text(encoding="utf-8")
            source += (ROOT / "benchmarks" / "measure.py").read_text(encoding="utf-8")
            known = {flag_of(name) for name in FIELDS} if "add_settings" in source else set()
            asked = {flag for flag in flags if flag.startswith("--")} - known
            assert not [flag for flag in asked if f'"{flag}"' not in source and f" {flag[2:]}=" not in source], words


def test_there_are_commands_to_be_checked():
    assert len([words for words in commands(PAGES["README.md"]) if "train.py" in " ".join(words)]) >= 5
    assert sum(len(list(commands(text))) for text in PAGES.values()) >= 40


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(test_\w+)`", "".join(PAGES.values()))) - FIELDS.keys()
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) >= 20
    assert not {name for name in named if f"def {name}(" not in source}


def anchors(text):
    titles = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if not link.startswith("http")]
    for link in links:
        file, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_linked_from_the_readme():
    assert {page for page in PAGES if page not in READMES} <= set(re.findall(r"\]\(([^)#]+)", PAGES["README.md"]))


# --- Size and shape --------------------------------------------------------------------------------------------------


def test_the_readme_is_read_in_one_sitting():
    assert len(PAGES["README.md"].encode()) <= 12 * 1024
    assert len(PAGES["README.md"].splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES)
def test_pages_can_be_read_as_plain_text(page):
    """No cell of a table is wider than 100 columns, and no other line than 120."""
    cells = [cell.strip() for row in table_rows(PAGES[page]) for cell in re.split(r"(?<!\\)\|", row)]
    assert not [cell for cell in cells if columns(cell) > 100]
    lines = [line for line in PAGES[page].splitlines() if not line.startswith(("|", "!["))]
    assert not [line for line in lines if columns(line) > 120]


def test_both_languages_have_the_same_structure():
    english, korean = (PAGES[name] for name in READMES)
    assert BLOCK.findall(english) == BLOCK.findall(korean) and len(BLOCK.findall(english)) >= 5

    def skeleton(text):
        headings = [len(marks) for marks in re.findall(r"^(#+) ", prose(text), re.M)]
        tables = [row.count("|") for row in table_rows(text)]
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("README")]
        return headings, tables, sorted(links), sorted(inline_code(text))

    assert skeleton(english) == skeleton(korean)


# --- The house -------------------------------------------------------------------------------------------------------


def test_imports_go_downward_as_the_architecture_lists_them():
    listed = re.findall(r"^(\w+)\.py  ", PAGES["docs/architecture.md"], re.M)
    assert sorted(listed) == sorted(path.stem for path in ROOT.glob("*.py"))
    for number, name in enumerate(listed):
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not imported & set(listed[number:]), name
