"""DeepMind's published Perceivers against transformers, with the files that transformers writes and random weights."""

import json
import math
import pickle
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from published import CLASSES, IMAGES, MODELS, SIZE, TINY_TEXT, write_models
from safetensors.torch import load_file, save_file
from transformers import PerceiverConfig, PerceiverImageProcessor, PerceiverTokenizer
from transformers.models.perceiver import modeling_perceiver

try:
    from transformers.models.perceiver.image_processing_pil_perceiver import PerceiverImageProcessorPil
except ImportError:  # before transformers 5 there is but one, with Pillow
    PerceiverImageProcessorPil = PerceiverImageProcessor

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import parity

import pretrained
from adapters import ImageAdapter, PretrainedTextAdapter, from_description
from inference import predict
from messages import UserError
from perceiver_model import DECODER, CrossAttentionBlock, PerceiverModel, SelfAttentionBlock
from pretrained import fill_masks, load_pretrained, read_pretrained

LENGTH = 30
EVERY = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each of MODELS a folder as transformers writes it, with random weights."""
    root = tmp_path_factory.mktemp("published")
    write_models(root)
    return root


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of one of the folders, to be spoilt."""
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / name))


def theirs_of(folder, name):
    return getattr(modeling_perceiver, MODELS[name][0]).from_pretrained(folder / name, attn_implementation="eager")


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def precision(request):
    """The number type of the models, and how far from each other they may be."""
    torch.set_default_dtype(request.param)
    with parity.exact_positions():
        yield SimpleNamespace(dtype=request.param, tolerance=1e-10 if request.param is torch.float64 else 1e-5)
    torch.set_default_dtype(torch.float32)


def assert_close(actual, expected, tolerance):
    """Equal up to tolerance times the largest number expected, or times 1 where that is less."""
    assert actual.shape == expected.shape
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def inputs_of(name, masked, dtype):
    """Two samples as (ours, our mask, theirs, their mask); the second has few real tokens if masked."""
    torch.manual_seed(1)
    if name not in IMAGES:
        numbers = torch.randint(0, 262, (2, LENGTH))
        mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [11]])
        mask = mask if masked else None
        return numbers[..., None].to(dtype), mask, numbers, mask
    pixels = torch.randn(2, 3, SIZE, SIZE, dtype=dtype)
    if not masked:
        return pixels.flatten(2).mT, None, pixels, None
    mask = torch.ones(2, SIZE, SIZE, dtype=torch.bool)
    mask[1, :, 3:] = mask[1, 2:] = False
    pixels = pixels * mask[:, None]
    if name != "conv":
        return pixels.flatten(2).mT, mask.flatten(1), pixels, mask.flatten(1)
    # a token of the convolution is real where one of the 11 x 11 pixels that it sees is; they begin 3 outside
    seen = [[[mask[b, max(0, 4 * row - 3) : 4 * row + 8, max(0, 4 * col - 3) : 4 * col + 8].any() for col in range(3)]
             for row in range(3)] for b in range(2)]  # fmt: skip
    tokens = torch.tensor(seen).flatten(1)
    assert tokens[1].any() and not tokens[1].all()
    return pixels.flatten(2).mT, mask.flatten(1), pixels, tokens


# --- Parity ----------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_every_layer_and_the_logits_are_transformers(folders, name, masked, precision):
    ours = load_pretrained(folders / name)
    theirs = theirs_of(folders, name).to(precision.dtype).eval()
    assert not ours.training and all(parameter.dtype == precision.dtype for parameter in ours.parameters())
    x, mask, their_x, their_mask = inputs_of(name, masked, precision.dtype)
    given = {"inputs": their_x} | ({} if their_mask is None else {"attention_mask": their_mask.long()})
    blocks = (CrossAttentionBlock, SelfAttentionBlock)
    found, logits = parity.layers_and_logits(ours, blocks, lambda: ours(x, mask))
    wanted, expected = parity.layers_and_logits(
        theirs, modeling_perceiver.PerceiverLayer, lambda: theirs(**given).logits
    )
    if name == "language":  # transformers answers all of its queries, however long the text is
        expected, wanted[-1] = expected[:, :LENGTH], wanted[-1][:, :LENGTH]
    assert len(found) == len(wanted) == 2 + 3 * ours.encoder.num_blocks
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, precision.tolerance)
    assert_close(logits, expected, precision.tolerance)
    assert logits.std() > 0.1  # there was something to compare


@pytest.mark.parametrize("name", ["fourier", "conv"])
@pytest.mark.parametrize("size", [24, 37])
def test_images_of_another_size_are_read_as_transformers_reads_them(folders, name, size, precision):
    ours = load_pretrained(folders / name, image_size=size)
    theirs = theirs_of(folders, name).to(precision.dtype).eval()
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert_close(ours(pixels.flatten(2).mT), theirs(inputs=pixels).logits, precision.tolerance)


@pytest.mark.parametrize("name, parts", [
    ("learned", ["24 x 24", "learned a vector for each position of 16 x 16"]),
    ("language", ["image_size=24 has no effect", "reads texts"]),
])  # fmt: skip
def test_another_size_is_refused_with_the_reason_where_it_cannot_be(folders, name, parts):
    with pytest.raises(UserError) as caught:
        load_pretrained(folders / name, image_size=24)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("name", ["fourier", "conv"])
def test_positions_that_transformers_rounds_make_little_difference(folders, name):
    ours, theirs = load_pretrained(folders / name), theirs_of(folders, name).eval()
    x, _, pixels, _ = inputs_of(name, False, torch.float32)
    with torch.no_grad():
        assert_close(ours(x), theirs(inputs=pixels).logits, 1e-4)


@EVERY
@pytest.mark.parametrize("precision", [torch.float64], ids=["float64"], indirect=True)
def test_gradients_are_transformers(folders, name, precision):
    """But for the part of an output projection W that the bias b of the values adds there: y = W (x + b) + c has the
    gradient g (x + b) by W, where g is the one by c, and ours, with b in c, has g x."""
    ours = load_pretrained(folders / name, attention_dropout=0.0)
    theirs = theirs_of(folders, name).to(precision.dtype).eval()
    x, mask, their_x, their_mask = inputs_of(name, True, precision.dtype)
    ours(x, mask).sin().sum().backward()
    logits = theirs(inputs=their_x, attention_mask=their_mask.long()).logits
    (logits[:, :LENGTH] if name == "language" else logits).sin().sum().backward()
    expected = dict(theirs.named_parameters())
    for own, parameter in ours.named_parameters():
        other = pretrained.published_name(own, name == "language")
        gradient = expected[other].grad
        if other.endswith("attention.output.dense.weight"):
            values = expected[other.replace("output.dense.weight", "self.value.bias")]
            gradient = gradient - torch.outer(expected[other.replace("weight", "bias")].grad, values.detach())
        assert gradient.any()
        assert_close(parameter.grad, gradient.reshape(parameter.shape), precision.tolerance)


# --- Parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", parity.PUBLISHED)
def test_the_published_models_have_as_many_parameters_as_is_said(name, tmp_path):
    architecture, changes = parity.PUBLISHED[name]
    config = PerceiverConfig(**changes)
    with torch.device("meta"):
        theirs = getattr(modeling_perceiver, architecture)(config)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    arguments, _ = pretrained.read_architecture(tmp_path)
    with torch.device("meta"):
        ours = PerceiverModel(**arguments)
    their_sizes = {each: parameter.numel() for each, parameter in theirs.named_parameters()}
    folded = [sum(size for each, size in their_sizes.items() if each.endswith(f"self.{part}.bias"))
              for part in ("key", "value")]  # fmt: skip
    counts = [sum(their_sizes.values()), *folded, sum(parameter.numel() for parameter in ours.parameters())]
    assert counts[0] - sum(folded) == counts[3]
    assert name != "fourier" or counts[0] == 48_440_627
    (row,) = re.findall(rf"    \S*{name}\S* +([\d,]+) +([\d,]+) \+ +([\d,]+) +([\d,]+)\n", pretrained.__doc__)
    assert [int(number.replace(",", "")) for number in row] == counts


@EVERY
def test_every_weight_of_the_file_is_used_and_every_parameter_learns(folders, name):
    ours = load_pretrained(folders / name).train()
    x, mask, *_ = inputs_of(name, False, torch.float32)
    logits = ours(x.float(), mask).flatten(0, -2)
    F.cross_entropy(logits, torch.arange(len(logits)) % CLASSES).backward()
    idle = [each for each, parameter in ours.named_parameters() if not parameter.grad.any()]
    assert not idle


@EVERY
def test_what_is_read_is_plain_data_from_which_the_model_comes_back(folders, name):
    arguments, weights, data = read_pretrained(folders / name)
    arguments, data = json.loads(json.dumps([arguments, data]))
    again = PerceiverModel(**arguments).eval()
    again.load_state_dict(weights)
    model = load_pretrained(folders / name)
    x, mask, *_ = inputs_of(name, True, torch.float32)
    with torch.no_grad():
        assert torch.equal(again(x, mask), model(x, mask))
    assert model.data_info == data
    assert {key: from_description(value) for key, value in data["adapters"].items()} == model.adapters
    assert [list(data["features"])] == [["image" if name in IMAGES else "text"]]


@EVERY
def test_a_model_with_other_classes_takes_over_all_but_the_last_layer(folders, name):
    """By name and shape, as a run that starts from these weights does."""
    arguments, weights, _ = read_pretrained(folders / name)
    own = {key: value for key, value in arguments.items() if key not in {"tie_embedding", *DECODER}}
    own |= {"num_classes": 3, "head": "query"}
    expected = PerceiverModel(**own).state_dict()
    others = {key for key, value in expected.items() if key not in weights or weights[key].shape != value.shape}
    if name == "language":
        assert others and all(key.startswith("output.") for key in others)
    else:
        assert others == {"output.decoder.output.weight", "output.decoder.output.bias"}


def test_changes_that_leave_the_weights_as_they_are(folders):
    model = load_pretrained(folders / "fourier", attention_dropout=0.25, gradient_checkpointing=True)
    attention = [module.dropout for module in model.modules() if type(module).__name__ == "MultiHeadAttention"]
    assert set(attention) == {0.25} and model.encoder.gradient_checkpointing
    plain = load_pretrained(folders / "fourier")
    assert {module.dropout for module in plain.modules() if type(module).__name__ == "MultiHeadAttention"} == {0.1}


@pytest.mark.parametrize("changes", [{"num_classes": 7}, {"num_latents": 9}, {"head": "mean"}])
def test_changes_of_weights_are_refused_by_name(folders, changes):
    with pytest.raises(UserError, match=f"with {next(iter(changes))} changed"):
        load_pretrained(folders / "fourier", **changes)
    with pytest.raises(TypeError, match="'drop_out'.*'dropout'"):
        load_pretrained(folders / "fourier", drop_out=0.1)


# --- Files -----------------------------------------------------------------------------------------------------------


def as_bin(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    return weights


def equal(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@EVERY
def test_both_formats_are_one_model(folder, name):
    path = folder(name)
    model = load_pretrained(path)
    as_bin(path)
    (path / "model.safetensors").unlink()
    assert equal(load_pretrained(path), model) and equal(load_pretrained(str(path)), model)


def test_half_precision_in_the_file_becomes_the_default(folder):
    path = folder("conv")
    halves = {name: value.half() if value.is_floating_point() else value for name, value in as_bin(path).items()}
    save_file(halves, path / "model.safetensors")
    model = load_pretrained(path)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}


def test_without_safetensors_the_other_format_is_read_or_asked_for(folder, monkeypatch):
    path = folder("fourier")
    model = load_pretrained(path)
    monkeypatch.setattr(pretrained, "_has_safetensors", lambda: False)
    with pytest.raises(UserError, match="pip install safetensors, or put pytorch_model.bin beside it"):
        load_pretrained(path)
    as_bin(path)
    (path / "model.safetensors").write_bytes(b"not looked at")
    assert equal(load_pretrained(path), model)


def change_weights(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


@pytest.mark.parametrize("name", ["fourier", "language"])
def test_weights_that_are_missing_left_over_or_of_another_shape_are_named(folder, name):
    path = folder(name)

    def spoil(weights):
        del weights["perceiver.embeddings.latents"]
        del weights["perceiver.encoder.self_attends.1.attention.self.key.bias"]
        weights["perceiver.encoder.extra.weight"] = torch.zeros(2)
        weights["perceiver.encoder.cross_attention.mlp.dense1.bias"] = torch.zeros(7)

    change_weights(path, spoil)
    with pytest.raises(UserError) as caught:
        load_pretrained(path)
    for part in (
        str(path),
        "missing perceiver.embeddings.latents",
        "missing perceiver.encoder.self_attends.1.attention.self.key.bias",
        "unexpected perceiver.encoder.extra.weight",
        "perceiver.encoder.cross_attention.mlp.dense1.bias is (7,) where config.json asks for (16,)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_finite_real_numbers_are_named(folder, value):
    path = folder("fourier")

    def spoil(weights):
        weights["perceiver.encoder.self_attends.0.layernorm.weight"][0] = value
        weights["perceiver.embeddings.latents"] = weights["perceiver.embeddings.latents"].int()

    change_weights(path, spoil)
    with pytest.raises(UserError) as caught:
        load_pretrained(path)
    assert "perceiver.encoder.self_attends.0.layernorm.weight holds NaN or infinity" in str(caught.value)
    assert "perceiver.embeddings.latents holds no real numbers" in str(caught.value)


@pytest.mark.parametrize("name", ["learned", "conv", "language"])
def test_no_weight_may_be_missing(folder, name):
    """Not even a bias that is dropped, and not a statistic. Of the layers, the first stands for all."""
    path = folder(name)
    original = load_file(path / "model.safetensors")
    for missing in (each for each in original if not re.search(r"self_attends\.[12]|cross_attention\.mlp", each)):
        save_file({key: value for key, value in original.items() if key != missing}, path / "model.safetensors")
        with pytest.raises(UserError, match=f"missing {re.escape(missing)}$"):
            load_pretrained(path)


def test_of_many_weights_that_do_not_fit_the_number_is_given(folder):
    path = folder("fourier")
    change_weights(path, lambda weights: weights.update({f"more.{n}": torch.zeros(1) for n in range(30)}))
    with pytest.raises(UserError, match=r"unexpected more\.0, .* and 20 more$"):
        load_pretrained(path)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("content, part", [
    (b"", "damaged"),
    (b"PK\x03\x04 cut off", "damaged"),
    (b"no tensors at all", "damaged"),
    (pickle.dumps(Bomb(), protocol=2), "none was run"),
    ({"a": Bomb()}, "none was run"),
    ([1, 2], "something other than weights"),
    ({"a": 1}, "something other than weights"),
], ids=["empty", "truncated", "foreign", "pickle", "object", "list", "number"])  # fmt: skip
def test_files_that_are_no_weights_are_refused_and_nothing_is_run(folder, monkeypatch, content, part):
    path = folder("fourier")
    monkeypatch.chdir(path)
    (path / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (path / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, path / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        load_pretrained(path)
    assert part in str(caught.value) and "pytorch_model.bin" in str(caught.value) and "\n" not in str(caught.value)
    assert not (path / "exploded").exists()


@pytest.mark.parametrize("size", [0, 7, 100, 5000])
def test_a_truncated_safetensors_file_is_refused(folder, size):
    path = folder("learned")
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:size])
    with pytest.raises(UserError, match="model.safetensors is truncated or damaged"):
        load_pretrained(path)


def change_json(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (values | changes).items() if value is not ...}))


@pytest.mark.parametrize("name, changes, part", [
    ("fourier", {"architectures": ["PerceiverForOpticalFlow"]}, "'PerceiverForOpticalFlow'; those read here: Per"),
    ("fourier", {"architectures": ...}, "None"),
    ("fourier", {"architectures": {"0": 1}}, "{'0': 1}"),
    ("fourier", {"architectures": [["a"]]}, "['a']"),
    ("fourier", {"d_latents": ...}, "lacks 'd_latents'"),
    ("fourier", {"d_latents": 15}, "d_model=15 is not divisible by num_heads=4"),
    ("fourier", {"d_latents": "16"}, "d_model must be a whole number"),
    ("fourier", {"hidden_act": "relu"}, "hidden_act='relu' is not read here, only 'gelu'"),
    ("fourier", {"use_query_residual": False}, "use_query_residual=False"),
    ("fourier", {"cross_attention_widening_factor": 3}, "cross_attention_widening_factor=3"),
    ("fourier", {"id2label": {"0": "a", "2": "b"}}, "id2label must name the classes 0, 1, 2"),
    ("fourier", {"id2label": ["a", "b"]}, "id2label must name the classes 0, 1, 2"),
    ("fourier", {"id2label": {"0": None}}, "id2label must name the classes 0, 1, 2"),
    ("language", {"max_position_embeddings": "40"}, "number of 2 or more, not 40 and '40'"),
    ("fourier", {"num_latents": 7}, "perceiver.embeddings.latents is (6, 16) where config.json asks for (7, 16)"),
    ("fourier", {"num_blocks": 10**12}, "num_blocks=1,000,000,000,000 is more than the 1,000"),
    ("language", {"vocab_size": 300}, "vocab_size=300 is not read here, only 262"),
])  # fmt: skip
def test_a_config_of_another_model_is_refused_by_name(folder, name, changes, part):
    path = folder(name)
    change_json(path / "config.json", **changes)
    with pytest.raises(UserError) as caught:
        load_pretrained(path)
    assert part in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("changes, part", [
    ({"do_normalize": False}, "do_normalize=False is not read here"),
    ({"resample": 2}, "resample=2"),
    ({"size": {"height": 16, "width": 8}}, "side of a square"),
    ({"size": {"shortest_edge": 16}}, "side of a square"),
    ({"crop_size": 0}, "crop_size=0"),
    ({"image_mean": [0.5]}, "image_mean"),
    ({"image_std": [1, "2", 3]}, "image_std"),
    ({"image_std": [0.0, 0.2, 0.3]}, "above 0"),
    ({"mask_token": 3}, "six different words"),
    ({"sep_token": "[PAD]"}, "six different words"),
    ({"model_max_length": None}, "number of 2 or more, not None"),
])  # fmt: skip
def test_another_preprocessing_is_refused_by_name(folder, changes, part):
    texts = any(name in changes for name in ("mask_token", "sep_token", "model_max_length"))
    path = folder("language" if texts else "fourier")
    change_json(path / ("tokenizer_config.json" if texts else "preprocessor_config.json"), **changes)
    with pytest.raises(UserError, match=part):
        load_pretrained(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_damaged_descriptions_are_refused_by_name(folder, file, content):
    path = folder("fourier")
    (path / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(str(path / file))):
        load_pretrained(path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, file):
    path = folder("fourier")
    (path / file).unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{re.escape(file)}"):
        load_pretrained(path)


def test_the_other_descriptions_may_be_missing(folder):
    """As in a folder that only the model was saved to; transformers' defaults hold."""
    path = folder("fourier")
    (path / "preprocessor_config.json").unlink()
    adapter = load_pretrained(path).adapters["image"]
    expected = PerceiverImageProcessorPil()
    assert adapter.image_shape == [expected.size["height"], expected.size["width"], 3] and adapter.crop == 224 / 256
    np.testing.assert_allclose([adapter.mean, adapter.std], 255 * np.array([expected.image_mean, expected.image_std]))
    path = folder("language")
    (path / "tokenizer_config.json").unlink()
    assert load_pretrained(path).adapters["text"] == PretrainedTextAdapter(TINY_TEXT["max_position_embeddings"])


# --- The hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub that has these folders by name, as huggingface_hub offers it."""
    models, asked = {}, []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        if name not in models:
            raise OSError(f"no model {name}\nand more")
        return str(models[name])

    module = ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return SimpleNamespace(models=models, asked=asked)


def test_a_name_is_that_of_a_folder_or_of_a_model_on_the_hub(hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = folder("fourier")
    model = load_pretrained(path)
    hub.models["deepmind/vision-perceiver-fourier"] = path
    assert equal(load_pretrained("deepmind/vision-perceiver-fourier"), model)
    assert [patterns[-1] for patterns in hub.asked] == ["model.safetensors"]  # not both formats
    assert {"config.json", "preprocessor_config.json", "tokenizer_config.json"} < set(hub.asked[0])
    as_bin(path)
    (path / "model.safetensors").unlink()
    assert equal(load_pretrained("deepmind/vision-perceiver-fourier"), model)
    assert hub.asked[-1][-1] == "pytorch_model.bin"
    asked = len(hub.asked)
    shutil.copytree(path, "deepmind/vision-perceiver-fourier")
    load_pretrained("deepmind/vision-perceiver-fourier")
    assert len(hub.asked) == asked


@pytest.mark.parametrize("installed", [False, True], ids=["without", "with"])
def test_what_cannot_be_found_is_answered_with_the_files_to_put_where(hub, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError) as caught:
        load_pretrained("deepmind/vision-perceiver-none")
    parts = ["deepmind/vision-perceiver-none", "config.json", "model.safetensors or pytorch_model.bin", "folder"]
    parts += ["(no model deepmind/vision-perceiver-none)"] if installed else ["pip install huggingface_hub"]
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "../x", Path("/no/where")])
def test_what_is_no_name_is_not_looked_for_on_the_hub(hub, source):
    with pytest.raises(UserError, match="no folder.*config.json"):
        load_pretrained(source)
    assert not hub.asked


# --- Images ----------------------------------------------------------------------------------------------------------


def picture(width, height, mode="RGB"):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, *channels), np.uint8)
    return Image.fromarray(np.repeat(np.repeat(pixels, 3, 0), 3, 1))


@pytest.mark.parametrize("width, height", [(40, 30), (30, 41), (99, 100), (16, 16), (5, 9), (300, 8)])
def test_images_are_prepared_as_by_transformers(width, height):
    image = picture(width, height)
    sizes = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 36, "width": 36}}
    mean, std = ([255 * value for value in pretrained.IMAGENET[name]] for name in ("image_mean", "image_std"))
    adapter = ImageAdapter([32, 32, 3], 1, mean, std, any_size=True, crop=32 / 36)
    tokens = adapter(image)
    assert tokens.shape == (32 * 32, 3) and tokens.dtype == torch.float32
    for processor, tolerance in ((PerceiverImageProcessorPil, 1e-5), (PerceiverImageProcessor, 0.05)):
        expected = processor(**sizes)(image, return_tensors="pt").pixel_values[0].flatten(1).T
        torch.testing.assert_close(tokens, expected, rtol=0, atol=tolerance)  # torchvision rounds otherwise


def test_images_come_in_every_form(tmp_path):
    adapter = ImageAdapter([8, 8, 3], 1, [0.0] * 3, [1.0] * 3, True)
    image = picture(20, 30)
    expected = adapter(image)
    image.save(tmp_path / "image.png")
    for form in (tmp_path / "image.png", str(tmp_path / "image.png"), np.asarray(image)):
        assert torch.equal(adapter(form), expected)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned back by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(adapter(tmp_path / "turned.png"), expected)
    grey = picture(20, 30, "L")
    expected = adapter(grey)
    assert torch.equal(expected[:, 0], expected[:, 2])
    for form in (np.asarray(grey), np.asarray(grey)[..., None]):
        assert torch.equal(adapter(form), expected)
    assert adapter(picture(20, 30, "RGBA")).isfinite().all()


@pytest.mark.parametrize(
    "item", [np.full((4, 4), 0.5), np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8), "no.png", 3], ids=str
)
def test_what_is_no_image_is_refused(item):
    with pytest.raises(UserError):
        ImageAdapter([8, 8, 3], 1, [0.0] * 3, [1.0] * 3, True)(item)


def test_predict_names_the_class_that_transformers_gives(folder):
    path = folder("conv")
    names = {"0": "tench, Tinca tinca", "1": "crane", "2": "crane", "3": "maillot", "4": "goose"}
    change_json(path / "config.json", id2label=names, label2id=...)
    model = load_pretrained(path)
    assert model.data_info["class_names"] == ["tench, Tinca tinca", "crane (1)", "crane (2)", "maillot", "goose"]
    images = [picture(40, 30), picture(16, 50)]
    found = predict(model, images)
    processor = PerceiverImageProcessorPil.from_pretrained(path)
    with torch.no_grad():
        logits = theirs_of(path.parent, "conv").eval()(processor(images, return_tensors="pt").pixel_values).logits
    for answer, probabilities in zip(found, logits.softmax(1), strict=True):
        assert answer["label"] == probabilities.argmax()
        assert answer["class"] == model.data_info["class_names"][answer["label"]]
        assert list(answer["probabilities"].values()) == pytest.approx(probabilities.tolist(), abs=1e-4)


# --- Texts -----------------------------------------------------------------------------------------------------------

TOKENIZER = PerceiverTokenizer()
PIECES = st.sampled_from(["[MASK]", "[CLS]", "[PAD]", "[SEP]", "[", "MASK]", "한국어", "é", "😀", " ", "a"])
TEXTS = st.lists(PIECES | st.text(max_size=5), min_size=1, max_size=8).map("".join).filter(str.strip)


@given(TEXTS)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_texts_are_the_numbers_of_transformers(text):
    expected = TOKENIZER(text).input_ids
    adapter = PretrainedTextAdapter()
    tokens = adapter(text)
    assert tokens.dtype == torch.float32 and tokens[:, 0].tolist() == expected
    assert adapter.text(expected[1:-1]) == text
    for limit in (3, 7):
        cut = TOKENIZER(text, truncation=True, max_length=limit).input_ids
        assert PretrainedTextAdapter(limit)(text)[:, 0].tolist() == cut


@pytest.mark.parametrize("item", [b"bytes", 3, "", "  ", "half \ud800"])
def test_what_is_no_text_is_refused(item):
    with pytest.raises(UserError):
        PretrainedTextAdapter()(item)


def test_special_symbols_may_be_spelt_otherwise(folder):
    path = folder("language")
    change_json(path / "tokenizer_config.json", mask_token={"content": "<mask>"}, sep_token="<end>")
    adapter = load_pretrained(path).adapters["text"]
    assert adapter.symbols == ["[PAD]", "[BOS]", "[EOS]", "<mask>", "[CLS]", "<end>"]
    assert adapter("<mask>a")[:, 0].tolist() == [4, 3, 6 + ord("a"), 5]


def test_masks_are_filled_with_the_bytes_that_transformers_finds_most_likely(folder):
    path = folder("language")
    change_weights(path, lambda weights: weights["embedding_decoder.bias"][:6].add_(100))  # of the special symbols
    model, theirs = load_pretrained(path), theirs_of(path.parent, "language").eval()
    for text in ("words are [MASK][MASK][MASK].", "[MASK]", "é[MASK]😀 [SEP] b[MASK]"):
        encoded = TOKENIZER(text, return_tensors="pt", padding="max_length", max_length=40)
        ids = encoded.input_ids[0]
        with torch.no_grad():
            logits = theirs(**encoded).logits[0]
        logits[:, :6] = -math.inf  # a special symbol is no answer
        filled = torch.where(ids == TOKENIZER.mask_token_id, logits.argmax(1), ids)[: encoded.attention_mask.sum()]
        expected = bytes(number - 6 for number in filled[1:-1].tolist() if number >= 6)
        found = fill_masks(model, text)
        assert found.replace("[SEP]", "") == expected.decode(errors="replace")
        assert "[MASK]" not in found


@pytest.mark.parametrize("text, part", [
    ("nothing hidden", r"no \[MASK\]"),
    ("[MASK]" + 40 * "a", "3 bytes too long, the model reads 38"),
    ("", "empty"),
])  # fmt: skip
def test_texts_that_cannot_be_filled_are_refused(folders, text, part):
    with pytest.raises(UserError, match=part):
        fill_masks(load_pretrained(folders / "language"), text)


@pytest.mark.parametrize("name", ["text", "fourier"])
def test_only_a_masked_language_model_fills_masks(folders, name):
    with pytest.raises(UserError, match="masked language model"):
        fill_masks(load_pretrained(folders / name), "[MASK]")
    with pytest.raises(UserError, match="masked language model"):
        fill_masks(PerceiverModel(3, 2, d_model=8, num_heads=2), "[MASK]")


def test_predict_classifies_texts(folders):
    model = load_pretrained(folders / "text")
    texts = ["a good film", "나쁜 영화", "x" * 100]
    with torch.no_grad():
        for answer, text in zip(predict(model, texts), texts, strict=True):
            ids = TOKENIZER(text, return_tensors="pt", truncation=True, max_length=40).input_ids
            logits = theirs_of(folders, "text").eval()(inputs=ids).logits[0]
            assert list(answer["probabilities"].values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)
    assert model.data_info["class_names"] == [f"LABEL_{n}" for n in range(CLASSES)]
