"""DeepMind's published Perceivers (Perceiver IO, arXiv 2107.14795): their files -> our arguments, weights and adapters.

    from inference import predict
    from pretrained import fill_masks, load_pretrained
    predict(load_pretrained("path/to/vision-perceiver-fourier/"), ["cat.jpg"])  # classes of ImageNet
    fill_masks(load_pretrained("path/to/language-perceiver/"), "Some words are" + 9 * "[MASK]")

A folder holds what the Hugging Face hub has under deepmind/vision-perceiver-fourier, -learned, -conv and
deepmind/language-perceiver, or what save_pretrained() of transformers wrote for the same classes:

    config.json                               architecture and class names
    model.safetensors or pytorch_model.bin    weights
    preprocessor_config.json                  images: crop, size, mean and deviation
    tokenizer_config.json                     texts: longest text, names of the special symbols

Without the last two, transformers' defaults apply, which are the values of the published models. Nothing in a file is
executed: pytorch_model.bin is read with `weights_only=True`. model.safetensors needs the package safetensors, which is
optional, since the published models come in both formats.

**What becomes of the weights.** The result is a PerceiverModel that computes what transformers' class computes, with
fewer parameters (perceiver_model.MultiHeadAttention has the derivation): a bias of the keys changes nothing and is
dropped; a bias b of the values becomes W b, added to the bias of the output projection W. Further training differs
slightly from transformers', since the gradient of W lacks the part that comes from b.

    model                       transformers has    biases of keys and values    ours has
    vision-perceiver-fourier          48,440,627             7,429 +  7,429    48,425,769
    vision-perceiver-learned          62,255,848             7,680 +  7,680    62,240,488
    vision-perceiver-conv             48,646,522             7,490 +  7,490    48,631,542
    language-perceiver               201,108,230             7,168 + 35,328   201,065,734

**What was tested.** The tests compare every layer and the logits with transformers on small models with random weights,
benchmarks/parity.py on models of the published sizes with random weights. The published files were not available. If
you have them, this makes the same comparison with them:

    python benchmarks/parity.py path/to/vision-perceiver-fourier/ path/to/language-perceiver/
"""

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

import tasks
from adapters import SYMBOLS, ImageAdapter, PretrainedTextAdapter, describe, from_description
from messages import UserError
from perceiver_model import PerceiverModel

# --- Loading ---------------------------------------------------------------------------------------------------------


class Pretrained(NamedTuple):
    """A published model as plain data.

    Attributes:
        arguments: of PerceiverModel.
        weights: by our names.
        data: what inference.load_model gives as `data_info`: features, adapters (their descriptions) and, of a
            classifier, task (its description), class_names and num_outputs.
    """

    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    data: dict[str, Any]


def load_pretrained(source: str | Path, image_size: int | None = None, **changes: Any) -> PerceiverModel:
    """A published model, ready for prediction: on the CPU, in evaluation mode.

    `model.adapters` prepares raw items, `model.data_info` describes the data and, of a classifier, `model.task`
    knows what an answer is, as those of inference.load_model.

    Args:
        source: a folder, or a name on the Hugging Face hub, such as "deepmind/vision-perceiver-fourier".
        image_size: side of the images to be read [pixels], if not that of training. Computed positions keep their
            frequencies; models with learned positions have none for other images.
        changes: arguments of PerceiverModel that change no weight, such as `attention_dropout=0.0` or
            `gradient_checkpointing=True`.

    Raises:
        UserError: a file is missing, damaged or of another kind of model; weights are missing, left over or of another
            shape, named one by one; an image_size that the model cannot have; changes that do change weights.
        TypeError: changes with an unknown argument.
    """
    arguments, weights, data = read_pretrained(source, image_size)
    with torch.device("meta"):
        model = PerceiverModel(**arguments | changes)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        names = ", ".join(changes)
        raise UserError(f"with {names} changed, the model would have other weights than {source}") from error
    model.data_info = data
    model.adapters = {name: from_description(description) for name, description in data["adapters"].items()}
    if "task" in data:
        model.task = tasks.from_description(data["task"])
    return model.eval()


def read_pretrained(source: str | Path, image_size: int | None = None) -> Pretrained:
    """The parts of a published model, see `load_pretrained`."""
    folder = find_folder(source)
    arguments, data = read_architecture(folder, image_size)
    with torch.device("meta"):
        expected = PerceiverModel(**arguments).state_dict()
    return Pretrained(arguments, _converted(_read_weights(folder), expected, folder), data)


def read_architecture(folder: Path, image_size: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything but the weights: the arguments of PerceiverModel, and the data, see `Pretrained`."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; name the folder of a published model: {BY_HAND}")
    config = _read_json(folder / "config.json")
    architecture = config.get("architectures")
    if isinstance(architecture, list) and len(architecture) == 1:
        (architecture,) = architecture
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UserError(f"{folder}: its architecture is {architecture!r}; those read here: {', '.join(ARCHITECTURES)}")
    modality = "image" if "Image" in architecture else "text"
    try:
        if modality == "image":
            adapter = _image_adapter(folder, config, architecture, image_size)
        else:
            adapter = _text_adapter(folder, config, image_size)
        features = {modality: adapter.features}
        arguments = {"input_dim": features} | _arguments(config, architecture, adapter.features.get("vocab_size"))
        with torch.device("meta"):
            PerceiverModel(**arguments)  # refuses what does not go together
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} lacks {error}") from error
    except (TypeError, ValueError) as error:  # UserError is one
        raise UserError(f"{folder}: {error}") from error
    data = {"features": features, "adapters": {modality: describe(adapter)}}
    if arguments["head"] == "query":
        names = _class_names(config)
        data |= {"task": tasks.describe(tasks.Classification(names)), "class_names": names, "num_outputs": len(names)}
    return arguments, data


# --- Filling in ------------------------------------------------------------------------------------------------------


def fill_masks(model: PerceiverModel, text: str) -> str:
    """The text with every [MASK] replaced by the byte that a masked language model finds most likely there.

    A [MASK] stands for one byte: a word of five letters and the space before it are six of them. All are answered at
    once, each without knowing the answers to the others; special symbols are no answer. Bytes that are no UTF-8
    together become U+FFFD.

    Raises:
        UserError: the model is no masked language model of `load_pretrained`; the text is too long or has no
            [MASK].
    """
    adapter = getattr(model, "adapters", {}).get("text")
    if model.head != "positions" or not isinstance(adapter, PretrainedTextAdapter):
        raise UserError("masks are filled by a masked language model; load one, such as deepmind/language-perceiver")
    tokens = adapter(text)[:, 0].long()  # (L,)
    if (excess := len(adapter.numbers(text)) - adapter.max_seq_len) > 0:
        raise UserError(f"the text is {excess} bytes too long, the model reads {adapter.max_seq_len - 2}; shorten it")
    masked = tokens == SYMBOLS.index("[MASK]")
    if not masked.any():
        raise UserError(f"the text has no {adapter.symbols[SYMBOLS.index('[MASK]')]} to be filled")
    device, offset = next(model.parameters()).device, len(SYMBOLS)
    with torch.inference_mode():
        logits = model(tokens[None, :, None].to(device))[0, masked.to(device)]  # (masks, vocabulary)
    tokens[masked] = logits[:, offset:].argmax(1).cpu() + offset
    return adapter.text(tokens[1:-1].tolist())


# --- Config.json and the files of preprocessing ----------------------------------------------------------------------

# What transformers' classes have in their code and not in config.json
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "PerceiverForImageClassificationFourier": {"num_frequency_bands": 64, "max_resolution": [224, 224]},
    "PerceiverForImageClassificationLearned": {
        "stem": "linear",
        "stem_dim": 256,
        "learned_positions": True,
        "project_positions": True,
    },
    "PerceiverForImageClassificationConvProcessing": {
        "stem": "conv",
        "stem_dim": 64,
        "num_frequency_bands": 64,
        "max_resolution": [56, 56],
    },
    "PerceiverForMaskedLM": {"num_decoder_heads": 8, "decoder_dim": 256},
    "PerceiverForSequenceClassification": {},
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # of values 0..1


MOST_LAYERS = 1000  # of a block, and blocks


def _arguments(config: dict[str, Any], architecture: str, vocab_size: int | None) -> dict[str, Any]:
    """The arguments of PerceiverModel except input_dim.

    Raises:
        KeyError: config.json lacks one.
    """
    _check_values(
        config,
        hidden_act="gelu",
        use_query_residual=True,
        cross_attention_shape_for_attention="kv",
        cross_attention_widening_factor=config["self_attention_widening_factor"],
    )
    for name in ("num_self_attends_per_block", "num_blocks"):
        if type(config[name]) is int and config[name] > MOST_LAYERS:
            raise UserError(f"{name}={config[name]:,} is more than the {MOST_LAYERS:,} that are read here")
    width = config["d_model"]  # of a token as the encoder reads it
    arguments = {
        "d_model": config["d_latents"],
        "num_latents": config["num_latents"],
        "num_cross_attention_layers": 1,
        "num_self_attention_layers": config["num_self_attends_per_block"],
        "num_blocks": config["num_blocks"],
        "num_heads": config["num_self_attention_heads"],
        "num_cross_attention_heads": config["num_cross_attention_heads"],
        "cross_attention_dim": width if config["qk_channels"] is None else config["qk_channels"],
        "cross_attention_value_dim": config["v_channels"],
        "self_attention_dim": config["qk_channels"],
        "self_attention_value_dim": config["v_channels"],
        "mlp_ratio": config["self_attention_widening_factor"],
        "attention_dropout": config["attention_probs_dropout_prob"],
        "query_bias": True,
    }
    if vocab_size is not None:
        _check_values(config, vocab_size=vocab_size)
        length = config["max_position_embeddings"]
        arguments |= {"embedding_dim": width, "learned_positions": True, "max_length": length, "add_positions": True}
    if architecture == "PerceiverForMaskedLM":
        arguments |= {"head": "positions", "num_classes": vocab_size, "tie_embedding": True}
        arguments |= {"num_queries": length, "query_dim": width, "decoder_value_dim": width}
    else:
        arguments |= {"head": "query", "num_classes": len(_class_names(config))}
    return arguments | ARCHITECTURES[architecture]


def _class_names(config: dict[str, Any]) -> list[str]:
    """The names of the classes; a name that several classes have (ImageNet has two cranes) gets the class number."""
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # of two classes transformers writes none
    numbers = [str(number) for number in range(len(names))]
    if not isinstance(names, dict) or set(numbers) != names.keys() or not _are(names.values(), str):
        raise UserError("config.json: id2label must name the classes 0, 1, 2, ...")
    count = Counter(names.values())
    return [names[number] if count[names[number]] == 1 else f"{names[number]} ({number})" for number in numbers]


def _image_adapter(
    folder: Path, config: dict[str, Any], architecture: str, image_size: int | None
) -> ImageAdapter:
    values = _read_json(folder / "preprocessor_config.json", optional=True)
    steps = dict.fromkeys(("do_center_crop", "do_resize", "do_rescale", "do_normalize"), True)
    steps |= {"resample": Image.Resampling.BICUBIC, "rescale_factor": 1 / 255}
    _check_values(steps | values, **steps)
    trained, around = _side(values, "size", 224), _side(values, "crop_size", 256)
    side = trained if image_size is None else image_size
    if "Learned" in architecture and side != config["image_size"]:
        raise UserError(
            f"images of {side} x {side} pixels cannot be read: the model has learned a vector for each position of "
            f"{config['image_size']} x {config['image_size']} pixels and knows no others"
        )
    statistics = {name: values.get(name, usual) for name, usual in IMAGENET.items()}
    for name, given in statistics.items():
        if not isinstance(given, list) or len(given) != 3 or not _are(given, (int, float)):
            raise UserError(f"preprocessor_config.json has {name}={given!r}; it must be three numbers")
    if min(statistics["image_std"]) <= 0:
        raise UserError(f"preprocessor_config.json has image_std={statistics['image_std']}; it must be above 0")
    mean, std = ([255 * value for value in given] for given in statistics.values())
    return ImageAdapter([side, side, 3], 1, mean, std, any_size=True, crop=trained / around)


def _side(values: dict[str, Any], name: str, usual: int) -> int:
    size = values.get(name, usual)  # the side, or since 2022 a dict
    height, width = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if not isinstance(height, int) or height != width or height < 1:
        raise UserError(f"preprocessor_config.json has {name}={size!r}; it must be the side of a square")
    return height


def _text_adapter(folder: Path, config: dict[str, Any], image_size: int | None) -> PretrainedTextAdapter:
    if image_size is not None:
        raise UserError(f"image_size={image_size} has no effect on a model that reads texts")
    values = _read_json(folder / "tokenizer_config.json", optional=True)
    symbols = [values.get(f"{usual[1:-1].lower()}_token", usual) for usual in SYMBOLS]
    symbols = [symbol.get("content") if isinstance(symbol, dict) else symbol for symbol in symbols]
    if not _are(symbols, str) or len(set(symbols)) < len(symbols) or "" in symbols:
        raise UserError(f"tokenizer_config.json: the special symbols must be six different words, not {symbols}")
    longest = config["max_position_embeddings"]
    given = values.get("model_max_length", longest)
    if not _are([given, longest], (int, float)) or min(given, longest) < 2:
        raise UserError(f"the longest text must be a number of 2 or more, not {given!r} and {longest!r}")
    return PretrainedTextAdapter(int(min(given, longest)), symbols=symbols)


def _are(values: Iterable[Any], kind: type | tuple[type, ...]) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _check_values(given: dict[str, Any], **needed: Any) -> None:
    for name, value in needed.items():
        if given[name] != value:
            raise UserError(f"{name}={given[name]!r} is not read here, only {value!r}")


# --- Weights ---------------------------------------------------------------------------------------------------------

NAMES = {  # of parts of the model: transformers' names by ours. The decoder stands elsewhere in a language model
    "encoder.latents": "perceiver.embeddings.latents",
    "encoder.cross_attention.0": "perceiver.encoder.cross_attention",
    "encoder.self_attention.0": "perceiver.encoder.self_attends",
    "modalities.text.embedding": "perceiver.input_preprocessor.embeddings",
    "modalities.text.positions.table": "perceiver.input_preprocessor.position_embeddings.weight",
    "modalities.image.positions.table": "perceiver.input_preprocessor.position_embeddings.position_embeddings",
    "modalities.image.positions.projection": "perceiver.input_preprocessor.positions_projection",
    "modalities.image.stem.convolution": "perceiver.input_preprocessor.convnet.conv",
    "modalities.image.stem.norm": "perceiver.input_preprocessor.convnet.batchnorm",
    "modalities.image.stem": "perceiver.input_preprocessor.convnet_1x1",
    "output.queries": "perceiver.decoder.decoder.output_position_encodings.position_embeddings",
    "output.decoder.cross_attention": "perceiver.decoder.decoder.decoding_cross_attention",
    "output.decoder.output": "perceiver.decoder.decoder.final_layer",
    "output_bias": "embedding_decoder.bias",
}
BLOCK_NAMES = {  # of parts of a block
    "attention_norm": "attention.self.layernorm1",
    "latent_norm": "attention.self.layernorm1",
    "input_norm": "attention.self.layernorm2",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "mlp_norm": "layernorm",
    "mlp.0": "mlp.dense1",
    "mlp.2": "mlp.dense2",
}
NAMED = 10  # weights that do not fit and are named; of more the number is given


def published_name(name: str, language_model: bool = False) -> str:
    """The name that transformers gives to one of our weights."""
    part = next(part for part in NAMES if name == part or name.startswith(f"{part}."))
    prefix, rest = NAMES[part], name[len(part) :]  # such as ".3.attention.query.weight"
    if language_model:
        prefix = prefix.replace("decoder.decoder", "decoder")
    for ours, theirs in BLOCK_NAMES.items():
        if f".{ours}." in rest:
            return prefix + rest.replace(f".{ours}.", f".{theirs}.")
    return prefix + rest


def _converted(weights: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights by our names, with the biases of keys and values folded (see the top of this file)."""
    names = {name: published_name(name, "output_bias" in expected) for name in expected}
    shapes = {names[name]: like.shape for name, like in expected.items()}
    if (one_by_one := "perceiver.input_preprocessor.convnet_1x1.weight") in shapes:
        shapes[one_by_one] = (*shapes[one_by_one], 1, 1)  # our linear layer is their convolution
    attentions = [name.removesuffix("query.bias") for name in shapes if name.endswith("attention.self.query.bias")]
    for attention in attentions:
        shapes |= {f"{attention}{part}.bias": shapes[f"{attention}{part}.weight"][:1] for part in ("key", "value")}
    problems = [f"missing {name}" for name in shapes.keys() - weights.keys()]
    problems += [f"unexpected {name}" for name in weights.keys() - shapes.keys()]
    problems += [
        f"{name} is {tuple(weights[name].shape)} where config.json asks for {tuple(shapes[name])}"
        for name in shapes.keys() & weights.keys()
        if weights[name].shape != shapes[name]
    ]
    whole = {names[name] for name, like in expected.items() if not like.is_floating_point()}  # a batch norm's counter
    problems += [
        f"{name} holds {'NaN or infinity' if weights[name].is_floating_point() else 'no real numbers'}"
        for name in (shapes.keys() & weights.keys()) - whole
        if not (weights[name].is_floating_point() and weights[name].isfinite().all())
    ]
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise UserError(f"{folder}: the weights do not fit: {', '.join(sorted(problems)[:NAMED])}{more}")
    folded = dict(weights)
    for attention in attentions:
        output = attention.replace(".self.", ".output.dense.")
        of_values = weights[attention + "value.bias"].double()
        folded[output + "bias"] = weights[output + "bias"] + weights[output + "weight"].double() @ of_values
    return {name: folded[names[name]].to(like.dtype).reshape(like.shape) for name, like in expected.items()}


# --- Files -----------------------------------------------------------------------------------------------------------

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
OTHERS = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
BY_HAND = f"put {', '.join(OTHERS)} (as many as it has) and {' or '.join(WEIGHTS)} into a folder and name that"


def find_folder(source: str | Path) -> Path:
    """The folder with the files of a model. For a name on the hub, they are downloaded into its package's cache."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise UserError(f"{source} is no folder; {BY_HAND}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"there is no folder {source}; to download the model of this name from the Hugging Face hub, "
            f"pip install huggingface_hub, or {BY_HAND}"
        ) from error
    for weights in WEIGHTS if _has_safetensors() else WEIGHTS[1:]:
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=[*OTHERS, weights]))
        except Exception as error:  # network, hub and name have their own kinds each
            cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"there is no folder {source}, and no model of this name could be downloaded ({cause}); {BY_HAND}"
            ) from error
        if (folder / weights).exists():
            break
    return folder


def _has_safetensors() -> bool:
    return importlib.util.find_spec("safetensors") is not None


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        contents = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} must hold an object, not {type(contents).__name__}")
    return contents


def weights_file(folder: Path) -> Path:
    """The format that can be read here; both hold the same weights."""
    there = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not there:
        raise UserError(f"{folder} has no weights; put {' or '.join(WEIGHTS)} there")
    path = there[0] if _has_safetensors() else there[-1]
    if path.suffix == ".safetensors" and not _has_safetensors():
        raise UserError(f"{path} is read by safetensors: pip install safetensors, or put {WEIGHTS[1]} beside it")
    return path


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = weights_file(folder)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            # Copies: what safetensors gives is the file itself, mapped, and whoever changed it would crash the process
            return {name: value.clone() for name, value in load_file(path).items()}
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(f"{path} is damaged or holds other objects than tensors; refused, none was run") from error
    except Exception as error:  # what damaged bytes make both packages raise has no common class
        raise UserError(f"{path} is truncated or damaged ({error})".splitlines()[0]) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds something other than weights by name")
    return weights
