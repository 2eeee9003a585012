"""Take a model away: a checkpoint as an ONNX file or a program of torch.export, run and compared before it is kept.

    python export.py --model_path checkpoints/best_model.pth --output model.onnx
    python export.py --model_path checkpoints/best_model.pth --output model.pt2 --attention
    python export.py --model_path checkpoints/best_model.pth --output model_int8.onnx --quantize int8

The file takes batches of any size and sequences of any length, with a mask, and holds what prepares raw items and what
the outputs mean. It is run on random inputs, and where its outputs differ from the model's by more than 1e-4 no file is
left. An .onnx file needs the packages onnx, onnxscript and onnxruntime, a .pt2 file torch alone.

docs/export.md describes inputs and outputs, and has a script that predicts with onnxruntime and NumPy alone.
"""

import io
import json
import logging
import math
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils.data import DataLoader
from tqdm import tqdm

import adapters
import evaluation
import tasks
from batches import create_dataloader
from config import Parser, check_folder, resolve, unused_settings
from data_utils import CIFAR10_FILES, load_splits
from distributed import refuse_processes
from ensemble import Ensemble
from files import make_folder, written_whole
from inference import READING_REMEDIES, check_answers, load_model
from messages import UserError, exit_on_user_error, memory_advice, print_note, printable
from perceiver_model import PerceiverModel
from token_features import SequenceStem

PACKAGES = {"onnx": "1.19.1", "onnxscript": "0.6.2", "onnxruntime": "1.23.2"}  # for .onnx, from these versions on
OPSET = 18  # of ONNX: the one that torch translates into
LARGEST = 2**31  # bytes of an ONNX file, a limit of its format
LIMIT = 1e-4  # largest difference between the outputs of the file and of the model
CASES = ((1, 1), (1, 300), (2, 7), (5, 50))  # (samples, tokens) of the inputs on which they are compared
KEY = "perceiver"  # of the description in the metadata
DATA = ("data_path", "test_path", "data_dir", "batch_size")  # settings for the test data of --quantize
MEMORY_REMEDIES = ("closing other programs", "a smaller --batch_size")

Inputs = tuple[dict[str, Tensor], dict[str, Tensor]]  # tokens and mask, of each modality


# --- Inputs -----------------------------------------------------------------------------------------------------------


def random_inputs(model: PerceiverModel, samples: int, tokens: int, padded: bool, random: torch.Generator) -> Inputs:
    """Tokens float32 (B, L, C) and masks bool (B, L) of each modality.

    Lengths differ between modalities. Padded, a share of the tokens is hidden at random, and holds NaN; so are all of
    the first sample, and of the next ones all of one modality each.
    """
    inputs, masks = {}, {}
    for number, (name, features) in enumerate(model.modalities.items()):
        length = max(shortest(model, name), min(tokens + number, longest(model, name)))
        shape = (samples, math.prod(features.grid_shape) if features.grid_shape else length)
        real = torch.ones(shape, dtype=torch.bool)
        if features.embedding is None:
            values = torch.randn(*shape, features.input_dim, generator=random)
        else:
            values = torch.randint(features.embedding.num_embeddings, (*shape, 1), generator=random).float()
        if padded:
            real = torch.rand(shape, generator=random) < 0.7
            real[0] = False
            if len(model.modalities) > 1:
                real[1 + number : 2 + number] = False
            values[~real] = math.nan
        inputs[name], masks[name] = values, real
    return inputs, masks


def shortest(model: PerceiverModel, name: str) -> int:
    """Tokens of the shortest sequence of a modality that a program of torch.export takes: where a stem joins them it
    must be left two, since the program takes one for a fixed number."""
    stem = model.modalities[name].stem
    return stem.window + 1 if isinstance(stem, SequenceStem) and stem.window > 1 else 1


def longest(model: PerceiverModel, name: str) -> float:
    """Tokens of the longest sequence that the model takes of a modality."""
    limits = [model.modalities[name].max_length]
    if model.head == "positions":
        limits.append(model.output.queries.size(0))
    return min(filter(None, limits), default=math.inf)


def by_modality(modalities: nn.ModuleDict, x: Any, mask: Any) -> Inputs:
    """A model's inputs with all modalities and masks: what is missing is hidden, as the model itself does it."""
    if not isinstance(x, dict):
        (only,) = modalities
        x, mask = {only: x}, {only: mask}
    samples, inputs, masks = next(iter(x.values())).size(0), {}, {}
    for name, features in modalities.items():
        there = name in x
        inputs[name] = x[name] if there else torch.zeros(samples, features.missing_length, features.input_dim)
        known = (mask or {}).get(name)
        masks[name] = torch.full(inputs[name].shape[:2], there) if known is None else known
    return inputs, masks


def unwrapped(values: dict[str, Any]) -> Any:
    """Of one modality its value, as the model takes it; of several the dict."""
    return values if len(values) > 1 else next(iter(values.values()))


# --- The two formats --------------------------------------------------------------------------------------------------


class _WithAttention(nn.Module):
    """The model, whose attention maps are always asked for."""

    def __init__(self, model: PerceiverModel):
        super().__init__()
        self.model = model

    def forward(self, x: Any, mask: Any) -> tuple[Tensor, list[Tensor]]:
        return self.model(x, mask, return_attention=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx and onnxruntime have to say about their own work."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def axes(model: PerceiverModel, of: Callable[[str], Any]) -> Any:
    """`of` the name of each open axis, for each modality, in the form of the model's inputs."""
    several, named = len(model.modalities) > 1, {}
    for name, features in model.modalities.items():
        named[name] = {0: of("batch")}
        if not features.grid_shape and longest(model, name) > 1:
            named[name][1] = of(f"length_{name}" if several else "length")
    return unwrapped(named)


def trace(model: PerceiverModel, attention: bool) -> ExportedProgram:
    """The model as a program of torch.export. It is called as the model is, with input and mask; both are needed.

    Args:
        attention: whether it returns (outputs, attention maps), as the model does with ``return_attention``.
    """
    inputs = tuple(map(unwrapped, random_inputs(model, 2, 11, False, torch.Generator().manual_seed(0))))
    with _quiet():
        return torch.export.export(
            _WithAttention(model) if attention else model,
            inputs,
            dynamic_shapes=(axes(model, lambda name: Dim.DYNAMIC),) * 2,
            strict=False,
        )


def input_names(modalities: nn.ModuleDict) -> list[str]:
    names = [""] if len(modalities) == 1 else [f"_{name}" for name in modalities]
    return [f"{what}{name}" for what in ("input", "mask") for name in names]


def output_names(model: PerceiverModel, attention: bool) -> list[str]:
    one = model.members[0] if isinstance(model, Ensemble) else model
    maps = range(1, 1 + len(one.encoder.depths)) if attention else []
    return ["output", *(f"attention_{number}" for number in maps)]


def to_onnx(model: PerceiverModel, program: ExportedProgram, attention: bool, description: str) -> bytes:
    """The bytes of the ONNX file of a traced model."""
    import onnxscript.optimizer

    with _quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes=(axes(model, str),) * 2,
            input_names=input_names(model.modalities),
            output_names=output_names(model, attention),
            opset_version=OPSET,
            verbose=False,
        )
        # What depends on the weights alone is computed now, whatever its size: int8 is for constants
        onnxscript.optimizer.optimize(made.model, input_size_limit=LARGEST, output_size_limit=LARGEST)
        made.model.metadata_props[KEY] = description
        return made.model_proto.SerializeToString()


def to_int8(data: bytes) -> bytes:
    """The ONNX file with the weights of matrix products and embeddings in int8, activations quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(data)
        quantize_dynamic(source, target, weight_type=QuantType.QInt8)
        return target.read_bytes()


class ProgramModel(nn.Module):
    """A .pt2 file, which answers as the model that it was made of.

    Args:
        file: its path.
        model: that model, whose modalities tell what the inputs are.
    """

    def __init__(self, file: str, model: PerceiverModel):
        super().__init__()
        with open(file, "rb") as opened, _quiet():
            self.program = torch.export.load(opened).module()
        self.modalities = model.modalities

    def outputs(self, x: Any, mask: Any) -> list[Tensor]:
        return flat(self.program(*map(unwrapped, by_modality(self.modalities, x, mask))))


class OnnxModel(nn.Module):
    """An .onnx file in onnxruntime on the CPU, which answers as the model that it was made of.

    Args:
        file: its path.
        model: that model, whose modalities tell what the inputs are.
    """

    def __init__(self, file: str, model: PerceiverModel):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.modalities = model.modalities

    def outputs(self, x: Any, mask: Any) -> list[Tensor]:
        """All outputs of the file. A modality that x lacks is missing in every sample."""
        inputs, masks = by_modality(self.modalities, x, mask)
        arrays = [tensor.numpy() for tensor in (*inputs.values(), *masks.values())]
        found = self.session.run(None, dict(zip(input_names(self.modalities), arrays, strict=True)))
        return list(map(torch.from_numpy, found))

    def forward(self, x: Any, mask: Any = None) -> Tensor:
        return self.outputs(x, mask)[0]


# --- Checks -----------------------------------------------------------------------------------------------------------


def largest_difference(model: PerceiverModel, runner: ProgramModel | OnnxModel, attention: bool) -> float:
    """Between the outputs of a file and of its model, over all CASES, padded and not; NaN for NaN and wrong shapes."""
    random, differences = torch.Generator().manual_seed(1), []
    for samples, tokens, padded in [(*case, padded) for case in CASES for padded in (False, True)]:
        x, mask = map(unwrapped, random_inputs(model, samples, tokens, padded, random))
        with torch.inference_mode():
            expected, found = flat(model(x, mask, return_attention=attention)), runner.outputs(x, mask)
        if [each.shape for each in expected] != [each.shape for each in found]:
            return math.nan
        differences += [(a - b).abs().max() for a, b in zip(expected, found, strict=True)]
    return float(torch.stack(differences).max())


def flat(answered: Any) -> list[Tensor]:
    """[output] or [output, attention maps ...] of what a model returns."""
    return [answered] if isinstance(answered, Tensor) else [answered[0], *answered[1]]


def headline(model: PerceiverModel, runner: OnnxModel, loader: DataLoader) -> float | None:
    """The task's most telling metric of a file, over a data set."""
    rows = evaluation.collect(runner, tqdm(loader, "test data", leave=False, disable=None), model.task)
    return model.task.metrics(rows)[model.task.headline] if rows["finite"].all() else math.nan


def read_test_data(model: PerceiverModel, stored: dict[str, Any], flags: dict[str, Any]) -> DataLoader:
    """The test split of the training run's data; `flags` say where the data are now."""
    settings, sources = resolve(base={**stored, "device": "cpu", "augment": False}, flags=flags)
    for note in unused_settings(settings, sources):
        print_note(note)
    check_folder("data_dir", settings, sources, *CIFAR10_FILES)
    with memory_advice("while reading the data", READING_REMEDIES):
        splits, data = load_splits(settings, model.data_info, "test")
    known, found = (info.get("fingerprints", {}).get("test") for info in (model.data_info, data))
    for note in data["notes"]:
        print_note(note)
    if known != found:
        print_note("these are not the samples of training's test split (other data, or in another order)")
    return create_dataloader(splits["test"], settings.batch_size, targets=model.task)


# --- Command line -----------------------------------------------------------------------------------------------------


def describe(model: PerceiverModel, quantize: str | None, packages: Sequence[str]) -> str:
    """What an export tells of itself, as JSON: the task, the adapters, and the versions that it was made with."""
    return json.dumps(
        {
            "task": tasks.describe(model.task),
            "adapters": {name: adapters.describe(adapter) for name, adapter in model.adapters.items()},
            "quantized": quantize,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        }
    )


def check_arguments(path: Path, model_path: str, quantize: str | None, overwrite: bool) -> None:
    """Raise UserError for what cannot be done, before anything is."""
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"--output: {path} must end in .onnx, or in .pt2 for a program of torch.export")
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; name a file in it")
    if path.exists() and Path(model_path).exists() and path.samefile(model_path):
        raise UserError(f"--output: {path} is the checkpoint itself; choose another name")
    if path.exists() and not overwrite:
        raise UserError(f"--output: {path} is there already; choose another name, or say --overwrite")
    if path.suffix == ".onnx":
        check_packages()
    elif quantize:
        raise UserError(f"--quantize: {quantize} is for .onnx files, not for {path}")


def check_packages() -> None:
    """Raise UserError, with the command that installs them, where packages for .onnx files are missing or too old."""
    wanted = []
    for name, lowest in PACKAGES.items():
        try:
            if Version(version(name)) >= Version(lowest):
                continue
        except PackageNotFoundError:
            pass
        wanted.append(f'"{name}>={lowest}"')
    if wanted:
        raise UserError(f"--output: an .onnx file needs pip install {' '.join(wanted)}; a .pt2 file needs torch alone")


def export(
    model: PerceiverModel,
    path: Path,
    attention: bool = False,
    quantize: str | None = None,
    test_data: DataLoader | None = None,
) -> dict[str, dict[str, float | None]]:
    """Write a model from :func:`inference.load_model`, which must be float32 and on the CPU.

    Args:
        attention: add the attention maps to the outputs.
        quantize: 'int8' or None.
        test_data: data on which the task's headline is computed before and after quantising.

    Returns:
        of 'float32' and, if asked for, of 'int8' the `bytes` of the file, the largest `difference` between its outputs
        and the model's, and with test_data the `headline`.

    Raises:
        UserError: the outputs of the file are not those of the model, which is allowed for int8 as long as they are
            finite; the model is too large for the format; the file cannot be written. No file is left then, or the
            one that was there before.
    """
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    if path.suffix == ".onnx" and weights > 0.9 * LARGEST:
        raise UserError(f"an .onnx file holds 2 GiB at most, and the weights take {weights / 2**30:.1f}; export a .pt2")
    description = describe(model, quantize, ["torch", *(PACKAGES if path.suffix == ".onnx" else ())])

    def checked(kind: str, file: IO, limit: float = LIMIT) -> dict[str, float | None]:
        file.flush()
        bar.set_description(f"comparing {kind}")
        runner = (ProgramModel if path.suffix == ".pt2" else OnnxModel)(file.name, model)
        difference = largest_difference(model, runner, attention)
        bar.update()
        if not difference <= limit:
            raise UserError(f"the {kind} outputs of {path} differ from the model's by up to {difference:.2g}, so it is "
                            "not kept; try other versions of the packages, or the other format")
        known = {} if test_data is None else {"headline": headline(model, runner, test_data)}
        return {"bytes": Path(file.name).stat().st_size, "difference": difference, **known}

    stages = 2 + (path.suffix == ".onnx") + bool(quantize)
    bar = tqdm(total=stages, desc="tracing", leave=False, disable=None)
    try:
        with bar, written_whole(path) as file:
            program = trace(model, attention)
            bar.update()
            if path.suffix == ".pt2":
                whole = io.BytesIO()  # errors of writing into it pass through C++ and lose their kind
                torch.export.save(program, whole, extra_files={f"{KEY}.json": description})
                file.write(whole.getbuffer())
                return {"float32": checked("float32", file)}
            bar.set_description("translating")
            data = to_onnx(model, program, attention, description)
            bar.update()
            file.write(data)
            figures = {"float32": checked("float32", file)}
            if quantize:
                file.seek(0)
                file.truncate()
                file.write(to_int8(data))
                figures[quantize] = checked(quantize, file, limit=sys.float_info.max)
            return figures
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --output") from error


@exit_on_user_error
@memory_advice("in export", MEMORY_REMEDIES)
def main(argv: list[str] | None = None) -> int:
    usage = "%(prog)s --model_path FILE --output FILE [--attention] [--quantize int8] [--overwrite]"
    parser = Parser(description=__doc__, usage=usage)
    parser.add_argument("--model_path", metavar="FILE", required=True, help="the checkpoint")
    parser.add_argument("--output", metavar="FILE", required=True, help="to write: .onnx, or .pt2 for torch.export")
    parser.add_argument("--attention", action="store_true", help="add the attention maps to the outputs")
    parser.add_argument("--quantize", choices=("int8",), metavar="{int8}",
                        help="weights of 8 bits: a smaller .onnx, tried on the checkpoint's test split")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the file if there is one")
    parser.add_settings(DATA, default="as in training")
    args = parser.parse_args(argv)
    refuse_processes("export.py runs in one, start it with python")
    path = Path(args.output)
    check_arguments(path, args.model_path, args.quantize, args.overwrite)
    if not args.quantize:
        for name in args.flags:
            print_note(f"{name} has no effect without --quantize")
    model, stored = load_model(args.model_path)
    check_answers(model)
    test_data = read_test_data(model, stored, args.flags) if args.quantize else None
    make_folder(path.parent)
    weights = sum(weights.numel() for weights in model.parameters())
    print(f"{printable(args.model_path)}: {model.task.about()}, {weights:,} parameters", flush=True)
    found = export(model, path, args.attention, args.quantize, test_data)
    print(f"compared with the model in {2 * len(CASES)} random batches, padded and not (limit {LIMIT:g} in float32):")
    for kind, figures in found.items():
        line = f"  {kind:<8}{figures['bytes'] / 1e6:>7.1f} MB  largest difference {figures['difference']:.1e}"
        if "headline" in figures:
            value = "-" if figures["headline"] is None else f"{figures['headline']:.4f}"
            line += f"  test {model.task.headline} {value}"
        print(line)
    if path.suffix == ".pt2":
        for name in model.modalities:
            if (least := shortest(model, name)) > 1:
                print_note(f"it takes {name} of {least} tokens or more; pad shorter ones, and their mask with False")
    print(f"wrote {printable(str(path))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
