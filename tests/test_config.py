"""Settings: precedence, checks, the JSON file, the command line, resume."""

import importlib
import json
import math
import pathlib
import re
import subprocess
import sys
import typing

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import config
from config import DATASET_DEFAULTS, FIELDS, Settings, flag_of, make_parser, resolve
from messages import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMES = st.sampled_from(sorted(FIELDS))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["1e-4", "false", "none", "cpu", "tiny", [50, 200], 10**400]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=4,
)


def numbers(kind, rules):
    """Valid numbers, as JSON may hold them."""
    if kind is int:
        return st.integers(rules.get("at_least", 0), rules.get("at_most", 10**6))
    low, high = rules.get("above", rules.get("at_least")), rules.get("below", rules.get("at_most", 1e9))
    return st.floats(low, high, exclude_min="above" in rules, exclude_max="at_most" not in rules)


def valid_values(name):
    """Valid values of a setting, as its JSON holds them."""
    rules, declared = FIELDS[name].metadata, FIELDS[name].type
    if "choices" in rules:
        return st.sampled_from(rules["choices"])
    if declared is bool:
        return st.booleans()
    if declared in (str, str | None):
        return st.sampled_from(["data", "a folder", "데이터", *[None] * (declared is not str)])
    if typing.get_origin(declared) is tuple:
        return st.lists(st.integers(1, 999), min_size=2, max_size=2).map(sorted)
    if declared in (int, float):
        return numbers(declared, rules)
    return st.none() | numbers(int, rules)


def in_python(value):
    return tuple(value) if isinstance(value, list) else value


def as_flag(name, value):
    """The words of the command line that give this value."""
    if isinstance(value, bool):
        return [flag_of(name) if value else "--no_" + flag_of(name)[2:]]
    if isinstance(value, list):
        return [flag_of(name), *map(str, value)]
    return [f"{flag_of(name)}={'none' if value is None else value}"]


def parse(*words):
    return make_parser("test").parse_args(words)


def settings_of(*words):
    args = parse(*words)
    return resolve(args.flags, args.file)[0]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def problems(function, *args, **kwargs):
    """The lines of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    return str(caught.value).splitlines()


# --- Types -----------------------------------------------------------------------------------------------------------


def assert_declared_types(chosen):
    for name, field in FIELDS.items():
        value, declared = getattr(chosen, name), field.type
        if typing.get_origin(declared) is tuple:
            assert type(value) is tuple and [type(item) for item in value] == [int, int], name
        else:
            assert type(value) in (typing.get_args(declared) or (declared,)), name
            assert not isinstance(value, float) or math.isfinite(value), name


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, value=JSON_VALUES)
def test_any_json_value_is_a_valid_setting_or_refused_by_name(tmp_path, name, value):
    path = write(tmp_path / "c.json", {name: value})
    try:
        chosen, _ = resolve(file=config.load_json(path))
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith(f"{path}: {name}: expected ")
    else:
        assert_declared_types(chosen)
        assert not isinstance(value, bool) or FIELDS[name].type is bool
        assert not isinstance(value, str) or FIELDS[name].type in (str, str | None)


@settings(max_examples=200, deadline=None)
@given(NAMES, st.text(max_size=8).filter(lambda s: s[:1] != "-") | (st.integers() | st.floats()).map(str))
def test_any_text_on_the_command_line_is_a_valid_setting_or_refused_by_flag(name, text):
    flag = flag_of(name)
    words = [f"{flag}={text}"] if FIELDS[name].type != tuple[int, int] else [flag, "1", text]
    try:
        chosen = settings_of(*words)
    except UserError as error:
        assert flag in str(error)
    else:
        assert_declared_types(chosen)


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries({}, optional={name: valid_values(name) for name in FIELDS}))
def test_settings_survive_json(values):
    chosen, _ = resolve(file=values)
    stored = json.loads(json.dumps(chosen.to_dict(), allow_nan=False))
    assert set(stored) == set(FIELDS)
    assert Settings.from_dict(stored) == chosen
    for name, value in values.items():
        assert getattr(chosen, name) == in_python(value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("learning_rate", "1e-4", ["a number", "above 0", '"1e-4"', "without the quotes"]),
        ("num_epochs", 2.5, ["a whole number", "epochs", "2.5"]),
        ("num_epochs", "3", ["a whole number", '"3"', "without the quotes"]),
        ("augment", "false", ["true or false", '"false"', "without the quotes"]),
        ("augment", 0, ["true or false", "0"]),
        ("amp", "false", ["auto, bf16, fp16, off", '"false"']),
        ("amp", False, ["auto, bf16, fp16, off", "false"]),
        ("batch_size", True, ["a whole number", "true"]),
        ("batch_size", None, ["a whole number", "null"]),
        ("batch_size", {"value": 32}, ["a whole number", '{"value": 32}']),
        ("batch_size", [32], ["a whole number", "[32]"]),
        ("batch_size", 0, ["at least 1", "0"]),
        ("batch_size", -4, ["at least 1", "-4"]),
        ("batch_size", 2**31, ["too large"]),
        ("num_samples", 2**5000, ["a whole number of 5001 bits", "too large"]),
        ("d_model", 2_000_000, ["at least 1 and at most 100000", "2000000"]),
        ("num_latents", 2_000_000_000, ["at most 100000"]),
        ("num_self_attention_layers", 1001, ["at most 1000"]),
        ("num_workers", 2_000_000_000, ["at most 1024"]),
        ("image_size", 2**31 - 1, ["at most 16384"]),
        ("num_latents", 0, ["at least 1 and at most 100000, or null"]),
        ("num_classes", 1, ["at least 2"]),
        ("learning_rate", 0, ["above 0"]),
        ("learning_rate", math.nan, ["a number", "NaN"]),
        ("grad_clip", math.inf, ["a number", "Infinity"]),
        ("grad_clip", 10**400, ["a number", "too large"]),
        ("weight_decay", -0.1, ["at least 0"]),
        ("dropout", 1, ["at least 0 and below 1"]),
        ("val_fraction", 0, ["above 0 and below 1"]),
        ("seq_len_range", [200, 50], ["two whole numbers", "lower first", "[200, 50]"]),
        ("seq_len_range", [0, 50], ["at least 1"]),
        ("seq_len_range", [50], ["two whole numbers"]),
        ("seq_len_range", [50, 60, 70], ["two whole numbers"]),
        ("seq_len_range", [1.5, 60], ["two whole numbers"]),
        ("seq_len_range", "50,60", ["two whole numbers"]),
        ("dataset_type", "cifar", ["synthetic, cifar10, digits", '"cifar"']),
        ("data_dir", "", ["text"]),
        ("data_dir", "a\0b", ["text"]),
        ("checkpoint_dir", 5, ["text", "5"]),
    ],
)
def test_wrong_values_are_refused_with_the_valid_form(tmp_path, name, value, words):
    for lines in (
        problems(config.load_json, write(tmp_path / "c.json", {name: value})),
        problems(resolve, flags={name: value}),
        problems(Settings, **{name: value}),
    ):
        assert len(lines) == 1
        for word in (f"{name}: expected", *words):
            assert word in lines[0]


def test_whole_floats_are_whole_numbers_and_ints_are_numbers():
    chosen = Settings(num_samples=1e5, seq_len_range=[50.0, 60], grad_clip=2)
    assert repr((chosen.num_samples, chosen.seq_len_range, chosen.grad_clip)) == "(100000, (50, 60), 2.0)"


# --- The file --------------------------------------------------------------------------------------------------------


def test_the_example_file():
    chosen = settings_of("--config", str(ROOT / "config.json"))
    assert chosen == Settings(
        batch_size=32, learning_rate=1e-4, num_epochs=100, weight_decay=1e-4, model_size="base",
        dataset_type="synthetic", seq_len_range=(50, 200), num_samples=5000,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lr", "learning_rate"), ("epochs", "num_epochs"), ("dataset", "dataset_type"),
        ("model", "model_size"), ("LR", "learning_rate"), ("learning_rte", "learning_rate"),
        ("batchsize", "batch_size"), ("num_latent", "num_latents"), ("Batch-Size", "batch_size"),
    ],
)  # fmt: skip
def test_a_misspelt_name_is_refused_with_the_nearest(tmp_path, key, nearest):
    lines = problems(config.load_json, write(tmp_path / "c.json", {key: "1e-4"}))
    assert len(lines) == 1
    assert f'"{key}": unknown setting' in lines[0]
    assert lines[0].endswith(f" {nearest}")


@given(st.text(max_size=12).filter(lambda key: key not in FIELDS), JSON_VALUES)
def test_any_unknown_name_is_refused(key, value):
    assert "unknown setting" in problems(resolve, file={key: value})[0]


def test_thousands_of_unknown_names_are_counted_and_a_few_explained(tmp_path):
    """Each explanation compares a name with all that there are, which took minutes for a file of these."""
    names = [f"learning_rate_{number}" for number in range(20_000)]
    lines = problems(config.load_json, write(tmp_path / "c.json", dict.fromkeys(names, 1)))
    assert len(lines) == 21 and lines[-1].endswith("c.json: 19980 more unknown settings")
    assert all(f'"{name}": unknown setting, the nearest' in line for name, line in zip(names, lines[:20], strict=False))
    lines = problems(config.load_json, write(tmp_path / "c.json", "{" + ", ".join(['"seed": 1'] * 20_000) + "}"))
    assert lines == [f'{tmp_path / "c.json"}: "seed": given more than once, keep one']
    pairs = ", ".join(f'"a{number // 2}": 1' for number in range(2000))
    lines = problems(config.load_json, write(tmp_path / "c.json", "{" + pairs + "}"))
    assert len(lines) == 42 and f"{tmp_path / 'c.json'}: 980 more names are given more than once" in lines
    lines = problems(parse, *(f"--flag_{number}" for number in range(2000)))
    assert len(lines) == 21 and lines[-1] == "1980 more unknown flags or unexpected arguments"
    assert "20000 words on the command line" in problems(parse, *(f"--flag_{number}" for number in range(20_000)))[0]
    (line,) = problems(config.load_json, write(tmp_path / "c.json", {"batch_sise" * 1_000_000: 1}))
    assert len(line) < 300


def test_a_nested_file_is_refused(tmp_path):
    lines = problems(config.load_json, write(tmp_path / "c.json", {"training": {"learning_rate": 1e-4}}))
    assert len(lines) == 1
    assert '"training"' in lines[0] and "not nested" in lines[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"batch_size": 32,\n "seed" 1}', ["not JSON", "line 2, column 9"]),
        ("", ["not JSON", "line 1, column 1"]),
        ('{"batch_size": 32} x', ["not JSON", "line 1, column 20"]),
        ("[1, 2]", ["expected an object", "[1, 2]"]),
        ("null", ["expected an object", "null"]),
        ("[" * 200_000, ["not JSON"]),
        ('{"seed": ' + "9" * 5000 + "}", ["not JSON", "limit"]),
        ('{"seed": 1, "batch_size": 2, "seed": 1}', ['"seed": given more than once']),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, text, words):
    path = write(tmp_path / "c.json", text)
    lines = problems(config.load_json, path)
    assert len(lines) == 1
    for word in (path, *words):
        assert word in lines[0]


def test_missing_and_binary_files_are_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, word in (("absent.json", "No such file"), (".", "directory"), ("binary", "not JSON")):
        path = tmp_path / name
        (line,) = problems(parse, "--config", str(path))
        assert line.startswith(f"{path}: ") and word in line


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "c.json").write_text('{"seed": 3}', encoding="utf-8-sig")
    assert config.load_json(str(tmp_path / "c.json")) == {"seed": 3}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path, data):
    whole = bytearray((ROOT / "config.json").read_bytes())
    position = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        del whole[position:]
    else:
        whole[position] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "c.json").write_bytes(whole)
    try:
        assert_declared_types(resolve(file=config.load_json(str(tmp_path / "c.json")))[0])
    except UserError as error:
        assert str(tmp_path) in str(error)


# --- Where values come from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flag_beats_file_beats_data_set_beats_default(tmp_path, name, data):
    in_file, in_flag = data.draw(valid_values(name)), data.draw(valid_values(name))
    path = write(tmp_path / "c.json", {name: in_file})
    args = parse("--config", path)
    chosen, sources = resolve(args.flags, args.file)
    assert (getattr(chosen, name), sources[name]) == (in_python(in_file), "file")
    args = parse("--config", path, *as_flag(name, in_flag))
    chosen, sources = resolve(args.flags, args.file)
    assert (getattr(chosen, name), sources[name]) == (in_python(in_flag), "flag")
    args = parse("--config", path, *as_flag(name, Settings().to_dict()[name]))
    assert getattr(resolve(args.flags, args.file)[0], name) == FIELDS[name].default


@pytest.mark.parametrize("dataset", DATASET_DEFAULTS)
def test_the_data_set_has_its_own_defaults(dataset):
    chosen, sources = resolve(flags={"dataset_type": dataset})
    for name in FIELDS.keys() - {"dataset_type"}:
        own = DATASET_DEFAULTS[dataset].get(name, FIELDS[name].default)
        assert getattr(chosen, name) == own
        assert sources[name] == ("data set" if name in DATASET_DEFAULTS[dataset] else "default")


def test_a_flag_equal_to_a_default_beats_the_file(tmp_path):
    path = write(tmp_path / "c.json", {"learning_rate": 1e-4})
    for rate in (5e-3, Settings.learning_rate, DATASET_DEFAULTS["synthetic"]["learning_rate"]):
        assert settings_of("--config", path, "--lr", str(rate)).learning_rate == rate


def test_none_undoes_the_value_of_a_file(tmp_path):
    path = write(tmp_path / "c.json", {"num_latents": 64, "max_seq_len": None})
    assert settings_of("--config", path).num_latents == 64
    assert settings_of("--config", path, "--num_latents", "none").num_latents is None
    assert "or none" in problems(parse, "--num_latents", "0")[0]
    assert "none" in problems(parse, "--batch_size", "none")[0]


def test_settings_are_frozen_and_checked():
    with pytest.raises(AttributeError):
        Settings().seed = 1
    assert len(problems(Settings, seed=-1, dropout=2.0)) == 2


def test_model_sizes_are_those_of_the_model():
    perceiver_model = pytest.importorskip("perceiver_model")
    assert FIELDS["model_size"].metadata["choices"] == tuple(perceiver_model.MODEL_SIZES)


def test_given_settings_without_effect_are_named():
    file = json.loads((ROOT / "config.json").read_text())
    flags = {"dataset_type": "cifar10", "use_positions": False, "num_frequency_bands": 4}
    notes = config.unused_settings(*resolve(flags, file))
    assert [note.split()[0] for note in notes] == ["num_samples", "seq_len_range", "num_frequency_bands"]
    assert "(file) has no effect: it needs dataset_type synthetic, not cifar10" in notes[0]
    assert "(flag) has no effect: it needs use_positions true, not false" in notes[2]
    assert config.unused_settings(*resolve(file=file)) == []
    flags = {"dataset_type": "images", "data_path": "a", "freeze": "encoder", "cache_features": True, "flip": True}
    (note,) = config.unused_settings(*resolve(flags))  # of its conditions, the one that does not hold
    assert note == "flip (flag) has no effect: it needs cache_features false, not true"


# --- Resume ----------------------------------------------------------------------------------------------------------


def test_the_checkpoint_takes_the_place_of_the_defaults():
    base = resolve(flags={"dataset_type": "digits", "batch_size": 8, "num_epochs": 2})[0].to_dict()
    chosen, sources = resolve(flags={"num_epochs": 20}, base=base)
    assert chosen.to_dict() == base | {"num_epochs": 20}
    assert (sources["num_epochs"], sources["batch_size"]) == ("flag", "checkpoint")


def test_changes_on_resume_are_grouped_and_the_fixed_ones_refused():
    base = resolve(flags={"seed": 1})[0].to_dict()
    flags = {"num_epochs": 99, "learning_rate": 0.5, "seed": 1, "patch_size": 16}
    changes = config.changed_settings(base, resolve(flags, base=base)[0])
    assert changes == {
        "free": {"num_epochs": (20, 99)}, "inexact": {"learning_rate": (5e-4, 0.5)}, "fixed": {},
    }  # fmt: skip
    lines = problems(resolve, {"seed": 2}, {"seq_len_range": [5, 9], "val_fraction": 0.2}, base)
    assert [line.split(":")[0] for line in lines] == ["seq_len_range", "val_fraction", "seed"]
    assert "the checkpoint has 50 200, the file 5 9" in lines[0]
    assert "the checkpoint has 1, the flag 2" in lines[2]


def test_a_checkpoint_with_bad_settings_is_refused():
    lines = problems(resolve, base={"learning_rat": 1, "seed": -1, 5: 6})
    assert [line.split(":")[0] for line in lines] == ["checkpoint"] * 3


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("num_epochs", "free"), ("num_workers", "free"), ("save_every", "free"), ("checkpoint_dir", "free"),
        ("log_dir", "free"), ("data_dir", "free"), ("early_stopping_patience", "free"),
        ("batch_size", "inexact"), ("learning_rate", "inexact"), ("dropout", "inexact"), ("amp", "inexact"),
        ("augment", "inexact"), ("device", "inexact"),
        ("seed", "fixed"), ("val_fraction", "fixed"), ("dataset_type", "fixed"), ("d_model", "fixed"),
    ],
)  # fmt: skip
def test_what_a_changed_setting_means_on_resume(name, kind):
    assert FIELDS[name].metadata["on_resume"] == kind


@pytest.mark.parametrize("needed, refused", [(0, False), (2**20, False), (2**70, True), (math.inf, True)])
def test_what_no_machine_could_hold_is_refused(needed, refused):
    if refused:
        (line,) = problems(config.check_memory, needed, "so much")
        assert re.fullmatch(r"so much would take [\d,inf]+ GiB, and cpu has [\d,]+ GiB", line)
    else:
        config.check_memory(needed, "so much")


# --- The command line ------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_at_once(tmp_path):
    path = write(tmp_path / "c.json", {"lr": "1e-4", "num_epochs": 2.5})
    lines = problems(parse, "--config", path, "--batch_size", "0", "--sed", "3", "--amp", "on", "stray")
    assert len(lines) == 6
    words = ("--sed", "stray", "--batch_size", "--amp", '"lr"', "num_epochs")
    for line, word in zip(lines, words, strict=True):
        assert word in line


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--learning_rate", "--lr"), ("--num_epochs", "--epochs"), ("--dataset_type", "--dataset"),
     ("--batchsize", "--batch_size"), ("--model", "--model_size"), ("--no_augmnt", "--no_augment")],
)  # fmt: skip
def test_an_unknown_flag_is_refused_with_the_nearest(flag, nearest):
    for words in ([flag, "3"], [f"{flag}=3"]):
        (line,) = problems(parse, *words)
        assert line.startswith(f"{flag}: unknown flag") and line.endswith(f" {nearest}")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--amp"], "--amp: expected one argument: one of auto, bf16, fp16, off"),
        (["--seq_len_range", "3"], "--seq_len_range: expected 2 arguments: two whole numbers"),
        (["--lr", "1e-4x"], '--lr: expected a number (per step) above 0, got "1e-4x"'),
        (["--epochs", "-1"], "--epochs: expected a whole number (epochs) of at least 1, got -1"),
        (["--lr=-1e-4"], "above 0, got -0.0001"),
        (["--augment=no"], "--augment"),
    ],
)
def test_wrong_words_are_refused(words, expected):
    (line,) = problems(parse, *words)
    assert expected in line


def test_spellings_of_flags():
    chosen = settings_of("--no-augment", "--share-weights", "--no_use_positions", "--num_samples", "1e3")
    assert (chosen.augment, chosen.share_weights, chosen.use_positions) == (False, True, False)
    assert chosen.num_samples == 1000
    assert settings_of("--no_augment", "--augment").augment is True


def test_names_of_columns_are_words_or_a_list(tmp_path):
    for words in (["a,b c"], ["a", "b c"]):
        assert settings_of("--feature_columns", *words, "--seed", "1").feature_columns == "a,b c"
    path = write(tmp_path / "c.json", {"ignore_columns": ["when", "a,b"], "feature_columns": "x"})
    chosen = settings_of("--config", path)
    assert (chosen.ignore_columns, chosen.feature_columns) == ('when,"a,b"', "x")
    assert "ignore_columns: expected text" in problems(resolve, file={"ignore_columns": [1]})[0]


def test_resume_names_a_checkpoint(tmp_path):
    path = write(tmp_path / "c.json", {"checkpoint_dir": "in_file"})
    assert parse().resume is None
    assert parse("--resume", "some.pth").resume == "some.pth"
    assert pathlib.Path(parse("--resume").resume) == pathlib.Path("checkpoints", "last_model.pth")
    assert pathlib.Path(parse("--resume", "--config", path).resume).parent.name == "in_file"
    args = parse("--resume", "--config", path, "--checkpoint_dir", "in_flag")
    assert pathlib.Path(args.resume).parent.name == "in_flag"


def test_another_command_takes_a_few_settings():
    parser = config.Parser(description="test")
    parser.add_argument("--split")
    parser.add_settings(["batch_size", "device"], default="the checkpoint's")
    args = parser.parse_args(["--batch_size", "7", "--split", "val"])
    assert (args.flags, args.split) == ({"batch_size": 7}, "val")
    assert "(default the checkpoint's)" in " ".join(parser.format_help().split())
    assert problems(parser.parse_args, ["--epochs", "3"])[0].startswith("--epochs: unknown flag")


def test_help_has_every_setting_with_meaning_unit_and_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("NO_COLOR", "1")
    text = " ".join(make_parser("test").format_help().split())
    assert "--config FILE JSON file" in text
    assert "--resume [FILE] continue" in text
    for name, field in FIELDS.items():
        meaning, unit = field.metadata["help"], field.metadata["unit"]
        assert unit or field.type in (bool, str, str | None) or name == "seed"
        entry = re.split(rf" {flag_of(name)}\b", text, maxsplit=1)[1]  # --lr is not --lr_encoder_scale
        assert entry.index(f"{meaning} [{unit}] (default " if unit else f"{meaning} (default ") < 80, name
    own = "images small; sequences tiny; text tiny; multimodal tiny"
    assert f"(default base; synthetic tiny; digits tiny; {own})" in text


@pytest.mark.parametrize("script", ["train", "inference"])
def test_help_is_one_screen_and_says_where_the_rest_is(monkeypatch, capsys, script):
    monkeypatch.setenv("COLUMNS", "100")
    texts = {}
    for flag in ("--help", "-h", "--help_all"):
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(script).main([flag])
        texts[flag] = capsys.readouterr().out
        assert ended.value.code == 0
    short = texts["--help"].splitlines()
    assert texts["-h"] == texts["--help"] and len(short) <= 50 and max(map(len, short)) <= 120
    assert "--help_all" in texts["--help"] and "--batch_size N" in texts["--help"]
    flags = set(re.findall(r"^  (--\w+)", texts["--help"], re.M))
    everything = set(re.findall(r"^  (?:-h, )?(--\w+)", texts["--help_all"], re.M))
    assert flags < everything and len(everything) > 25
    if script == "train":
        assert everything >= set(map(flag_of, FIELDS))


def test_the_settings_shown_are_those_given_and_those_not_at_their_default():
    chosen, sources = resolve({"num_epochs": 3, "amp": "auto", "d_model": None}, {"weight_decay": 1e-4, "seed": 0})
    text = config.format_settings(chosen, sources, {"amp": "bf16", "d_model": 128})
    rows = [row.split() for row in text.splitlines()]
    assert sorted(rows) == sorted([
        ["dataset_type", "synthetic", "default"],
        ["model_size", "tiny", "data", "set"],
        ["d_model", "none", "=", "128", "flag"],
        ["num_epochs", "3", "[epochs]", "flag"],
        ["learning_rate", "0.0005", "[per", "step]", "data", "set"],
        ["weight_decay", "0.0001", "[times", "the", "rate]", "file"],
        ["amp", "auto", "=", "bf16", "flag"],
        ["seed", "0", "file"],
    ])  # fmt: skip
    chosen, sources = resolve({"max_seq_len": None, "select_by": None, "patch_size": 8}, base=chosen.to_dict())
    rows = [row.split("  ") for row in config.format_settings(chosen, sources, {}).splitlines()]
    rows = {name: " ".join(others).split(" flag")[0].strip() for _, name, *others in rows}
    assert rows["max_seq_len"] == "none = no limit" and rows["select_by"] == "none = the task's own: accuracy"
    assert "patch_size" not in rows and "mlp_ratio" not in rows and rows["num_epochs"].startswith("3 [epochs]")


# --- What "auto" means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "mps", "auto"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, True, "cuda")]
)
def test_auto_takes_the_best_device_there_is(monkeypatch, cuda, mps, auto):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert config.choose_device("auto").type == auto
    assert config.choose_device("cpu").type == "cpu"
    for device in ("cuda", "mps"):
        if {"cuda": cuda, "mps": mps}[device]:
            assert config.choose_device(device).type == device
        else:
            (line,) = problems(config.choose_device, device)
            assert line.startswith(f"device: {device} is not available here; choose one of auto, ")


@pytest.mark.parametrize(
    ("amp", "device", "machine", "dtype"),
    [
        ("auto", "cuda", (9, 0), torch.bfloat16),
        ("auto", "cuda", (7, 5), torch.float16),
        ("auto", "cpu", {"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ("auto", "cpu", {"avx512_bf16": True, "amx_bf16": False}, None),
        ("auto", "cpu", {"sve_bf16": True}, None),
        ("auto", "mps", None, None),
        ("off", "cuda", (9, 0), None),
        ("off", "cpu", {"amx_bf16": True}, None),
        ("bf16", "cpu", {}, torch.bfloat16),
        ("fp16", "cuda", (9, 0), torch.float16),
    ],
)
def test_mixed_precision(monkeypatch, amp, device, machine, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: machine, raising=False)
    assert config.choose_precision(amp, torch.device(device)) is dtype


def test_fp16_without_cuda_is_refused():
    (line,) = problems(config.choose_precision, "fp16", torch.device("cpu"))
    assert line == "amp: fp16 needs a CUDA device, not cpu; choose one of auto, bf16, off"


# --- A real process --------------------------------------------------------------------------------------------------

COMMAND = """
import sys
sys.path.insert(0, {root!r})
import config, messages

@messages.exit_on_user_error
def main():
    args = config.make_parser("test").parse_args()
    chosen, _ = config.resolve(args.flags, args.file)
    if chosen.seed == 13:
        raise RuntimeError("a fault")
    print(chosen.learning_rate)

main()
"""


def run(*words):
    command = [sys.executable, "-c", COMMAND.format(root=str(ROOT)), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_mistake_ends_with_one_line_and_status_2(tmp_path):
    done = run("--lr", "fast")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'error: --lr: expected a number (per step) above 0, got "fast"\n'
    done = run("--config", write(tmp_path / "c.json", {"lr": "1e-4", "amp": "false", "num_epochs": 2.5}))
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["error"] * 3


def test_a_fault_keeps_its_traceback():
    done = run("--seed", "13")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "RuntimeError: a fault" in done.stderr


def test_a_good_command_line_runs(tmp_path):
    done = run("--config", write(tmp_path / "c.json", {"learning_rate": 1e-4}), "--lr", "2e-4")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.0002\n", "")


def test_a_default_of_a_data_set_gives_way_to_what_it_would_go_against():
    assert resolve(flags={"dataset_type": "text"})[0].stem == "conv"
    assert resolve(flags={"dataset_type": "text", "task": "reconstruct"})[0].stem == "none"
    assert resolve(flags={"dataset_type": "digits"})[0].select_by == "last"
    assert resolve(flags={"dataset_type": "digits", "early_stopping_patience": 5})[0].select_by is None


def test_a_run_of_before_a_setting_was_there_goes_on_as_it_was():
    """And not with the default that its data set has for new runs."""
    before = Settings(dataset_type="text", data_path="a.csv").to_dict()
    del before["stem"]
    assert resolve(base=before)[0].stem == "none"
