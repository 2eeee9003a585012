"""Runs that start from another model: what they take over, what stays frozen, and that they go on as any other."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published import IMAGES, MODELS, write_models
from running import called, end, output, stamp, succeed, wait_until
from safetensors.torch import load_file, save_file
from torch import nn

import finetune
import inference
import plots
import run_log
import train
from checkpoint import BEST, LAST, build_model, load_checkpoint, save_checkpoint
from config import make_parser, resolve
from data_utils import create_dataloader
from inference import load_model, predict
from perceiver_model import PerceiverModel
from pretrained import PretrainedTextAdapter, load_pretrained
from progress import RunState, parameter_groups

OURS = "--model_size tiny --d_model 16 --num_heads 2 --num_latents 4 --num_self_attention_layers 2"
DIGITS = f"--dataset digits --patch_size 4 --epochs 1 --batch_size 256 {OURS}"
COMMON = "--amp off --device cpu --batch_size 8"
WORDS = {"animal": "a cat and a dog", "plant": "한국의 tree, 나무", "stone": "granite 😀 or marble"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with published models, our checkpoints, and data of every kind."""
    root = tmp_path_factory.mktemp("world")
    write_models(root / "published")
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / "photos" / name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 120, (20, 26, 3), np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / "photos" / name / f"{number}.png")
    lines = [f'"{text[: 3 + n]}",{name}' for name, text in WORDS.items() for n in range(8)]
    (root / "texts.csv").write_text("\n".join(["text,label", *lines]), "utf-8")
    for name, channels in {"two": 2, "three": 3}.items():
        lengths = rng.integers(3, 9, 24)
        labels = np.arange(24) % 3
        x = [rng.normal(5 * labels[i], 2, (lengths[i], channels)) for i in range(24)]
        rows = [f"{i},{labels[i]}," + ",".join(f"{v:.4f}" for v in step) for i in range(24) for step in x[i]]
        header = "id,label," + ",".join("abc"[:channels])
        (root / f"{name}.csv").write_text("\n".join([header, *rows]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        quiet(patch)
        series = f"--dataset sequences --data_path two.csv --epochs 2 {OURS} {COMMON}"
        for folder, flags in {"digits": f"{DIGITS} --amp off", "series": series}.items():
            assert train.main(f"{flags} --checkpoint_dir {folder}".split()) == 0
    return root


def quiet(patch):
    """Runs in this process draw and log nothing that takes time."""
    patch.setattr(run_log, "tensorboard_writer", lambda *_: None)
    patch.setattr(plots, "plot_training_curves", lambda history, path, *_: path.write_text("curves"))


DATA = {
    "photos": "--dataset images --data_path photos",
    "texts": "--dataset text --data_path texts.csv",
    "two": "--dataset sequences --data_path two.csv",
    "three": "--dataset sequences --data_path three.csv",
}
OF = {"fourier": "photos", "learned": "photos", "conv": "photos", "language": "texts", "text": "texts"}


@pytest.fixture
def go(world, tmp_path, monkeypatch, capsys):
    """go(flags) runs train.main in `world`, with checkpoints in tmp_path: status, out, err."""
    monkeypatch.chdir(world)
    quiet(monkeypatch)

    def call(flags, main=train.main, where="--checkpoint_dir {}/run --log_dir {}/runs"):
        return called(capsys, main, f"{flags} {where}".format(tmp_path, tmp_path).split())

    return call


@pytest.fixture
def prepare(world, tmp_path, monkeypatch):
    """prepare(flags): a run before its first step."""
    monkeypatch.chdir(world)
    quiet(monkeypatch)

    def call(flags):
        flags = f"{flags} {COMMON} --checkpoint_dir {tmp_path}/run --log_dir {tmp_path}/runs"
        args = make_parser("").parse_args(flags.split())
        start = finetune.read_start(args.flags["init_from"]) if "init_from" in args.flags else None
        return train.prepare(resolve(args.flags, args.file, start=start and start.settings)[0], start=start)

    return call


# --- What is taken over -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_all_but_the_last_layer_comes_from_a_published_model(prepare, capsys, name):
    run = prepare(f"{DATA[OF[name]]} --init_from published/{name}")
    capsys.readouterr()
    model, source = run.state.model, load_pretrained(f"published/{name}")
    theirs, ours = source.state_dict(), model.state_dict()
    last = {f"{'classifier' if name == 'language' else 'output.decoder.output'}.{part}" for part in ("weight", "bias")}
    new = {key for key in ours if key not in theirs or ours[key].shape != theirs[key].shape}
    assert new == last | ({"norm.weight", "norm.bias"} if name == "language" else set())
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() - new)
    # and with the same function: the latents of the same items are the same
    item = next(iter(run.splits["val"]))["input"][None]
    item = torch.as_tensor(item)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encode(item), source.encode(item), rtol=0, atol=1e-6)


def test_what_is_taken_and_what_is_not_is_named_and_counted(go):
    done = go(f"{DATA['photos']} --init_from published/fourier --epochs 1 {COMMON}")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("start "))
    assert lines[at] == "start   76 of 78 tensors, 152,801 of 152,852 numbers, from published/fourier"
    names = "output.decoder.output.bias {}, output.decoder.output.weight {} x 16"
    assert lines[at + 1 : at + 3] == [
        f"        2 begin anew: {names.format(3, 3)}",
        f"        2 not taken over: {names.format(5, 5)}",
    ]
    rows = [line.split() for line in lines]
    assert ["init_from", "published/fourier", "flag"] in rows and ["d_model", "16", "[features]", "init_from"] in rows
    assert "model_size" not in done.out


@pytest.mark.parametrize("source, data, taken", [
    ("digits", "--dataset digits --patch_size 4", True),
    ("series", DATA["two"], True),
    ("series", DATA["three"], True),  # the same classes
    ("series", DATA["texts"], False),  # as many classes, but others
])  # fmt: skip
def test_the_last_layer_is_taken_where_the_answers_are_the_same(prepare, capsys, source, data, taken):
    run = prepare(f"{data} --init_from {source}/{BEST}")
    weights = load_checkpoint(f"{source}/{BEST}")["model"]
    assert torch.equal(run.state.model.classifier.weight, weights["classifier.weight"]) is taken
    assert ("the answers are others than there" in capsys.readouterr().out) is not taken


def test_weights_of_other_shapes_begin_anew(prepare, capsys):
    run = prepare(f"{DATA['three']} --init_from series/{BEST} --num_latents 6")
    model, weights = run.state.model, load_checkpoint(f"series/{BEST}")["model"]
    assert model.encoder.latents.shape == (6, 16)
    assert torch.equal(model.encoder.self_attention[0][0].mlp[0].weight,
                       weights["encoder.self_attention.0.0.mlp.0.weight"])  # fmt: skip
    out = capsys.readouterr().out
    assert "encoder.latents 6 x 16" in out and "encoder.latents 4 x 16" in out
    assert "encoder.cross_attention.0.attention.key.weight 16 x 19" in out  # 3 channels and 16 of positions


def test_a_flag_that_makes_the_model_another_one_is_named(go):
    flags = f"{DATA['two']} --init_from series --num_latents 6 --d_model 16 --model_size base --epochs 1 {COMMON}"
    done = go(flags)
    assert done.status == 0, done.err
    notes = [line for line in done.out.splitlines() if line.startswith("note:")]
    assert "note: num_latents 6 (flag) is not that of series, 4" in notes
    assert "note: model_size (flag) has no effect: it needs init_from none, not series" in notes
    assert not any("d_model" in line for line in notes)


# --- Preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_preprocessing_of_a_published_model_comes_along(prepare, name):
    run = prepare(f"{DATA[OF[name]]} --init_from published/{name}")
    (adapter,) = finetune.read_start(f"published/{name}").adapters.values()
    start = load_pretrained(f"published/{name}").adapters
    assert run.data["adapters"] == {key: finetune.Start.known.fget(
        finetune.read_start(f"published/{name}"))["adapters"][key] for key in start}  # fmt: skip
    ids, dataset = run.splits["test"].ids, run.splits["test"]
    if name in IMAGES:
        assert adapter.crop == 0.8 and adapter.image_shape == [16, 16, 3]
        assert torch.equal(dataset[0]["input"], adapter(Path("photos", ids[0])))
    else:
        assert isinstance(adapter, PretrainedTextAdapter) and adapter.max_seq_len == 40
        assert dataset[0]["input"][0] == 4 and dataset[0]["input"][-1] == 5  # [CLS] and [SEP]


def test_series_keep_the_standardisation_of_the_model(prepare, capsys):
    known = load_checkpoint(f"series/{BEST}")["data"]["adapters"]["series"]
    text = Path("two.csv").read_text()
    Path("shifted.csv").write_text("\n".join(
        [line if line.startswith("id") else ",".join([*line.split(",")[:2], *(str(float(v) + 100)
         for v in line.split(",")[2:])]) for line in text.splitlines()]))  # fmt: skip
    run = prepare(f"--dataset sequences --data_path shifted.csv --init_from series/{BEST}")
    assert run.data["adapters"]["series"] == known
    assert np.concatenate([item["input"] for item in run.splits["train"]]).mean() > 10
    # of others there is no standardisation to be kept
    assert "standardised by these data" not in capsys.readouterr().out
    run = prepare(f"{DATA['three']} --init_from series/{BEST}")
    assert len(run.data["adapters"]["series"]["mean"]) == 3
    assert "the channels of the series are a, b, c, those of init_from a, b: they are" in capsys.readouterr().out
    Path("swapped.csv").write_text(text.replace("id,label,a,b", "id,label,b,a"))
    prepare(f"--dataset sequences --data_path swapped.csv --init_from series/{BEST}")
    assert "to take them in the same order: --feature_columns a,b" in capsys.readouterr().out
    run = prepare(f"--dataset sequences --data_path swapped.csv --feature_columns a,b --init_from series/{BEST}")
    assert run.data["adapters"]["series"] == known


def test_built_in_images_keep_the_normalisation_of_the_model(prepare, capsys):
    """Where their channels are as many."""
    checkpoint = load_checkpoint(f"digits/{BEST}")
    checkpoint["data"]["adapters"]["image"] |= {"mean": [1.5], "std": [2.5]}
    save_checkpoint("other.pth", checkpoint)
    run = prepare("--dataset digits --patch_size 4 --init_from other.pth")
    assert (run.data["adapters"]["image"]["mean"], run.data["adapters"]["image"]["std"]) == ([1.5], [2.5])
    run = prepare(f"{DATA['photos']} --init_from other.pth")
    assert len(run.data["adapters"]["image"]["mean"]) == 3
    assert "your images have 3 channels, those of init_from 1" in capsys.readouterr().out


# --- Images of another size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fourier", "conv"])
def test_computed_positions_keep_their_frequencies_in_images_of_another_size(prepare, name):
    run = prepare(f"{DATA['photos']} --init_from published/{name} --image_size 24")
    source = load_pretrained(f"published/{name}", image_size=24)
    item = run.splits["val"][0]["input"][None]
    assert item.shape == (1, 24 * 24, 3)
    with torch.no_grad():
        torch.testing.assert_close(run.state.model.eval().encode(item), source.encode(item), rtol=0, atol=1e-6)


def test_our_models_keep_their_frequencies_too(prepare, go):
    go(f"{DATA['photos']} --image_size 16 --patch_size 4 --epochs 1 {OURS} {COMMON}", where="--checkpoint_dir {}/first")
    first = Path(run_folder(prepare)).parent / "first"
    run = prepare(f"{DATA['photos']} --init_from {first} --image_size 32")
    positions = run.state.model.modalities["image"].positions
    assert (positions.grid_shape, positions.max_resolution, positions.num_bands) == ([8, 8], [4, 4], 2)
    weights = load_checkpoint(first / BEST)["model"]
    assert all(torch.equal(values, weights[name]) for name, values in run.state.model.state_dict().items())


def run_folder(prepare):
    return prepare(DATA["two"] + " --epochs 1 " + OURS).folder


@pytest.mark.parametrize("flags, parts", [
    ("photos --init_from published/learned --image_size 24", ["24", "each position of 16 x 16", "none for 24 x 24"]),
    ("photos --init_from published/learned --patch_size 2", ["patch_size 2", "none for 8 x 8"]),
    ("texts --init_from published/language --max_seq_len 64", ["max_seq_len 64", "positions of 40 tokens"]),
    ("texts --init_from published/text --max_seq_len none", ["max_seq_len None", "positions of 40 tokens"]),
])  # fmt: skip
def test_learned_positions_are_those_that_they_are(go, flags, parts):
    data, *rest = flags.split()
    done = go(" ".join([DATA[data], *rest]))
    assert done.status == 2 and done.err.count("\n") == 1 and all(part in done.err for part in parts), done.err


# --- Frozen -----------------------------------------------------------------------------------------------------------


def train_some(go, flags, tmp_path):
    done = go(f"{flags} {COMMON} --epochs 3 --ema_decay 0.9 --weight_decay 0.5 --lr 0.01")
    assert done.status == 0, done.err
    return load_checkpoint(tmp_path / "run" / LAST), done


@pytest.mark.parametrize("name", ["conv", "language", "series"])
def test_a_frozen_encoder_keeps_its_bits(go, prepare, tmp_path, name):
    source = f"series/{BEST}" if name == "series" else f"published/{name}"
    flags = f"{DATA[OF.get(name, 'two')]} --init_from {source} --freeze encoder"
    before = prepare(flags).state.model.state_dict()
    checkpoint, done = train_some(go, flags, tmp_path)
    last = {key for key in before if key.startswith(("classifier.", "output.decoder.output."))}
    for weights in (checkpoint["model"], checkpoint["trained_model"]):
        changed = {key for key in before if not torch.equal(before[key], weights[key])}
        assert changed == last
    assert len(checkpoint["optimizer"]["state"]) == 2
    frozen = sum(before[key].numel() for key in before.keys() - last if before[key].is_floating_point())
    frozen -= sum(values.numel() for key, values in before.items() if "running" in key)
    assert f"{frozen:,} frozen" in done.out


def test_a_frozen_encoder_takes_no_gradient_memory_and_no_average_of_its_own(prepare):
    run = prepare(f"{DATA['photos']} --init_from published/conv --freeze encoder --ema_decay 0.9")
    model = run.state.model.train()
    assert not model.pooled_latents(torch.randn(2, 256, 3)).requires_grad
    assert [name for name, module in model.named_modules() if module.training] == ["", "output.decoder.output"]
    model(torch.randn(2, 256, 3)).sum().backward()
    assert {name for name, weights in model.named_parameters() if weights.grad is not None} == {
        "output.decoder.output.weight", "output.decoder.output.bias",
    }  # fmt: skip
    shared = {weights.data_ptr() for weights in model.parameters()}
    own = [name for name, weights in run.state.kept.named_parameters() if weights.data_ptr() not in shared]
    assert own == ["output.decoder.output.weight", "output.decoder.output.bias"]


@pytest.mark.parametrize("name", ["fourier", "conv", "text", "language", "series"])
def test_cached_features_give_the_answers_of_a_frozen_encoder(go, tmp_path, name):
    source = f"series/{BEST}" if name == "series" else f"published/{name}"
    flags = f"{DATA[OF.get(name, 'two')]} --init_from {source} --freeze encoder"
    whole, _ = train_some(go, flags + " --no_augment" * (name in IMAGES), tmp_path)
    cached, done = train_some(go, flags + " --cache_features", tmp_path)
    assert cached["progress"]["history"][-1]["train_loss"] != cached["progress"]["history"][0]["train_loss"]
    for key, values in whole["model"].items():
        torch.testing.assert_close(cached["model"][key], values, rtol=0, atol=1e-5)
    for one, other in zip(whole["progress"]["history"], cached["progress"]["history"], strict=True):
        for key in ("train_loss", "val_loss", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], abs=1e-5)
    assert whole["progress"]["test"] == cached["progress"]["test"]
    if name in IMAGES:
        assert "images  in training neither moved nor mirrored" in done.out


def test_augmentation_of_cached_features_is_refused_in_words(go):
    flags = f"{DATA['photos']} --init_from published/fourier --freeze encoder --cache_features --flip --compile"
    done = go(f"{flags} --lr_encoder_scale 0.5 --epochs 1 {COMMON}")
    assert done.status == 0, done.err
    for name in ("flip", "compile"):
        assert f"note: {name} (flag) has no effect: it needs cache_features false, not true" in done.out
    assert "note: lr_encoder_scale (flag) has no effect: it needs freeze none, not encoder" in done.out


def test_the_encoder_may_learn_at_a_smaller_rate(prepare):
    """The first step of AdamW moves a weight without decay by the rate, whatever its gradient is."""
    run = prepare(f"{DATA['photos']} --init_from published/fourier --lr_encoder_scale 0.1 --weight_decay 0")
    model, state = run.state.model, run.state
    before = {name: weights.clone() for name, weights in model.named_parameters()}
    state.set_rate(1e-3)
    model.eval()
    model(torch.randn(4, 256, 3)).sin().sum().backward()
    state.optimizer.step()
    for name, weights in model.named_parameters():
        rate = 1e-3 if name.startswith("output.decoder.output.") else 1e-4
        moved = (weights - before[name])[weights.grad.abs() > 1e-4].abs()
        assert moved.numel() or name.endswith(("bias", "table"))
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=2e-2, atol=0)
    counted = [weights for group in state.groups for weights in group["params"]]
    assert len(counted) == len({id(weights) for weights in counted}) == len(before)
    assert [group["lr_scale"] for group in state.groups] == [1.0, 1.0, 0.1, 0.1]
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for group, decays in zip(parameter_groups(model, 0.3, 0.1), (True, False, True, False), strict=True):
        assert group["weight_decay"] == (0.3 if decays else 0.0)
        assert all((id(weights) in linear) is decays for weights in group["params"])


def test_a_scale_of_one_leaves_the_optimizer_as_it_was():
    model = PerceiverModel(3, 2, d_model=8, num_heads=2, num_latents=2, num_self_attention_layers=1)
    state = RunState(model, None, 1e-3, 0.1, 0.0, False)
    assert len(state.groups) == 2 and state.parameter_counts()[2] == 0
    assert sum(state.parameter_counts()) == sum(weights.numel() for weights in model.parameters())


# --- The run goes on as any other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, flags", [
    pytest.param(  # with the statistics of a batch norm
        "conv", "--lr_encoder_scale 0.1 --ema_decay 0.9", marks=pytest.mark.slow
    ),
    ("language", "--freeze encoder --cache_features --ema_decay 0.9"),
])  # fmt: skip
def test_a_killed_run_goes_on_bit_for_bit_without_the_model_it_started_from(start, world, tmp_path, name, flags):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(world / "published" / name, folder / "source")
        for what in ("photos", "texts.csv"):
            (folder / what).symlink_to(world / what)
    flags = f"{DATA[OF[name]]} --init_from source {flags} {COMMON} --epochs 3 --save_every 1"
    succeed(start, whole, flags)
    last = killed / "checkpoints" / LAST
    process = start(killed, flags)
    assert wait_until(last.exists, process)
    first = stamp(last)
    assert wait_until(lambda: stamp(last) != first, process)
    process.kill()
    end(process)
    shutil.rmtree(killed / "source")
    done = load_checkpoint(last)["step"]
    assert done > 0
    succeed(start, killed, "--resume")
    one, other = (load_checkpoint(folder / "checkpoints" / LAST) for folder in (whole, killed))
    for what in ("model", "trained_model"):
        assert all(torch.equal(values, other[what][key]) for key, values in one[what].items())
    state, resumed = (checkpoint["optimizer"]["state"] for checkpoint in (one, other))
    assert all(torch.equal(values, resumed[n][key]) for n, known in state.items() for key, values in known.items())
    assert one["progress"]["test"] == other["progress"]["test"]
    assert "resuming" in output(killed)


def test_where_a_run_came_from_is_written_down(go, tmp_path, world):
    flags = f"{DATA['photos']} --init_from published/fourier --epochs 1 {COMMON}"
    assert go(flags).status == 0
    checksum = hashlib.sha256((world / "published/fourier/model.safetensors").read_bytes()).hexdigest()
    for known in (
        json.loads((tmp_path / "run" / "settings.json").read_text()),
        load_checkpoint(tmp_path / "run" / BEST)["settings"],
    ):
        assert (known["init_from"], known["init_checksum"]) == ("published/fourier", checksum)
    # the settings are those of the same run once more, unless the file has changed
    again = f"--config {tmp_path}/run/settings.json --checkpoint_dir {tmp_path}/again --log_dir {tmp_path}/runs"
    assert go(again, where="").status == 0
    one, other = (load_checkpoint(tmp_path / name / BEST)["model"] for name in ("run", "again"))
    assert all(torch.equal(values, other[key]) for key, values in one.items())
    done = go(f"{again} --init_from published/conv", where="")
    assert done.status == 2 and done.err.startswith("error: init_checksum: published/conv is another file, its SHA-256")
    done = go(f"--resume {tmp_path}/run/{LAST} --init_from published/conv", where="")
    assert done.status == 2 and "init_from: cannot change on resume" in done.err


@pytest.mark.parametrize("name", ["conv", "language"])
def test_a_finetuned_model_is_read_like_any_other(go, tmp_path, name):
    data = DATA[OF[name]]
    assert go(f"{data} --init_from published/{name} --epochs 1 {COMMON}").status == 0
    path = tmp_path / "run" / BEST
    model, _ = load_model(path)
    items = [Path("photos/red/0.png"), Path("photos/blue/1.png")] if name == "conv" else list(WORDS.values())
    found = predict(model, items)
    tokens = [model.adapters["image" if name == "conv" else "text"](item) for item in items]
    with torch.no_grad():
        for answer, one in zip(found, tokens, strict=True):
            expected = build_model(load_checkpoint(path))(one[None])[0].softmax(0)
            assert list(answer["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
    done = go(f"--model_path {path} --analyze --output_dir {tmp_path}/results", inference.main, "")
    assert done.status == 0, done.err
    assert (tmp_path / "results" / "attention.png").stat().st_size > 0
    shown = go(f"--model_path {path} --input {data.split()[-1]} --output_dir {tmp_path}/new", inference.main, "")
    assert shown.status == 0 and "24 predictions" in shown.out


def test_a_finetuned_model_can_be_finetuned_again(go, prepare, tmp_path):
    go(f"{DATA['photos']} --init_from published/conv --epochs 1 {COMMON}", where="--checkpoint_dir {}/first")
    run = prepare(f"{DATA['photos']} --init_from {tmp_path}/first")
    weights = load_checkpoint(tmp_path / "first" / BEST)["model"]
    assert all(torch.equal(values, weights[key]) for key, values in run.state.model.state_dict().items())


# --- Mistakes ---------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def spoilt(folder, how):
    path = folder / "model.safetensors"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "pickle":
        path.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))
    elif how == "missing":
        path.unlink()
    elif how == "weights":
        weights = load_file(path)
        save_file({key: values for key, values in weights.items() if "latents" not in key}, path)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    return folder


@pytest.mark.parametrize("how, part", [
    ("truncated", "model.safetensors is truncated or damaged"),
    ("pickle", "damaged or holds other objects than tensors; refused, none was run"),
    ("missing", "has no weights; put model.safetensors or pytorch_model.bin there"),
    ("weights", "missing perceiver.embeddings.latents"),
    ("architecture", "its architecture is 'BertModel'"),
])  # fmt: skip
def test_a_spoilt_folder_is_refused_in_a_line(go, world, tmp_path, how, part):
    folder = spoilt(Path(shutil.copytree(world / "published/fourier", tmp_path / "fourier")), how)
    done = go(f"{DATA['photos']} --init_from {folder}")
    assert done.status == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert part in done.err and str(folder) in done.err
    assert not Path("exploded").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, part", [
    ("--init_from photos", "photos holds neither config.json, as a published model does, nor best_model.pth"),
    ("--init_from nowhere.pth", "cannot read the checkpoint nowhere.pth: No such file or directory"),
    ("--init_from nowhere", "nowhere is no folder; put config.json"),
    ("--init_from texts.csv", "texts.csv is not a checkpoint of this project"),
    ("--freeze encoder", "freeze: encoder: it would keep the random weights of a new model"),
    ("--init_from published/fourier --cache_features", "cache_features: the features change as long as the encoder"),
    ("--init_from digits --d_model 8 --num_heads 1", "none fits this model by name and shape"),
    ("--init_from digits --freeze encoder", "freeze: encoder: these weights did not come from init_from"),
    ("--init_from published/fourier --freeze decoder", "--freeze: expected one of none, encoder"),
    ("--init_from published/fourier --lr_encoder_scale 0", "--lr_encoder_scale: expected a number"),
])  # fmt: skip
def test_mistakes_are_refused_in_a_line(go, tmp_path, flags, part):
    done = go(f"{DATA['photos']} {flags} --batch_size 8")
    assert done.status == 2 and part in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "run").exists()


# --- inference.py --pretrained ----------------------------------------------------------------------------------------


def rows_of(path):
    import csv

    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_a_published_model_names_the_classes_of_photos(go, world, tmp_path):
    folder = Path(shutil.copytree(world / "published/conv", tmp_path / "conv"))
    names = {"0": "tench, Tinca tinca", "1": "crane", "2": "crane", "3": "maillot", "4": "goose"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": names}))
    done = go(f"--pretrained {folder} --input photos --output_dir {tmp_path}/results", inference.main, "")
    assert done.status == 0, done.err
    rows = rows_of(tmp_path / "results" / "predictions.csv")
    files = sorted(Path("photos").rglob("*.png"))
    assert [row["id"] for row in rows] == [str(file.relative_to("photos")) for file in files]
    found = predict(load_pretrained(folder), files)
    assert [row["class"] for row in rows] == [answer["class"] for answer in found]
    assert {row["class"] for row in rows} <= {"tench, Tinca tinca", "crane (1)", "crane (2)", "maillot", "goose"}
    assert f"{rows[0]['id']}  {rows[0]['class']}  {rows[0]['confidence']}\n" in done.out


def test_a_published_language_model_fills_masks(go, tmp_path):
    (tmp_path / "in.csv").write_text("id,text\nfirst,words are [MASK][MASK].\nsecond,nothing hidden\n")
    done = go(f"--pretrained published/language --input {tmp_path}/in.csv --output_dir {tmp_path}/results",
              inference.main, "")  # fmt: skip
    assert done.status == 0
    expected = inference.fill_masks(load_pretrained("published/language"), "words are [MASK][MASK].")
    assert [(row["id"], row["text"]) for row in rows_of(tmp_path / "results" / "predictions.csv")] == [
        ("first", expected)
    ]
    assert "in.csv, line 3: the text has no [MASK] to be filled" in done.err and "1 could not be read" in done.out


@pytest.mark.parametrize("flags, part", [
    ("--input photos", "--model_path: name a checkpoint, or with --pretrained the folder of a published model"),
    ("--model_path x --pretrained y --input photos", "--model_path: name a checkpoint, or with --pretrained"),
    ("--pretrained published/conv", "--pretrained: say with --input what to predict"),
    ("--pretrained photos --input photos", "photos has no config.json"),
    ("--pretrained nowhere --input photos", "nowhere is no folder; put config.json"),
])  # fmt: skip
def test_mistakes_of_prediction_are_refused_in_a_line(go, flags, part):
    done = go(flags, inference.main, "")
    assert done.status == 2 and part in done.err and done.err.count("\n") == 1, done.err


def test_processes_share_the_work_of_encoding(world, monkeypatch):
    """Each encodes its share of every batch, and all get the whole, in the order of the samples."""
    monkeypatch.chdir(world)
    model = load_pretrained("published/text")
    model.task = None
    rng = np.random.default_rng(0)
    items = [{"input": rng.integers(0, 262, (n, 1)), "label": n % 3} for n in range(2, 13)]
    whole = finetune.encode(model, create_dataloader(items, 4, shuffle=True), "all", "cpu", None)
    parts, shares = [], [create_dataloader(items, 4, shuffle=True, share=(rank, 2)) for rank in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(finetune.distributed, "gather", lambda found: parts.append(found) or [])
        patch.setattr(finetune.distributed, "broadcast", lambda _: {"latents": np.zeros((0, 1), np.float32)}
                      | {"targets": np.zeros(0), "lengths": np.zeros(0)})  # fmt: skip
        for loader in shares:
            finetune.encode(model, loader, "part", "cpu", None)
    together = finetune.unshared(parts, shares[0].batch_sampler.batches(0))
    torch.testing.assert_close(torch.from_numpy(together["latents"]), whole.latents, rtol=0, atol=1e-6)
    assert whole.targets.tolist() == [n % 3 for n in range(2, 13)] == together["targets"].tolist()
    assert whole.lengths.tolist() == list(range(2, 13))
    with torch.no_grad():
        for item, latent in zip(items, whole.latents, strict=True):
            expected = model.pooled_latents(torch.tensor(item["input"]).float()[None])[0]
            torch.testing.assert_close(latent, expected, rtol=0, atol=1e-6)
