"""The published Perceivers at their full size, here and in transformers: the greatest difference, layer by layer.

    python benchmarks/parity.py                                          # all four, with random weights
    python benchmarks/parity.py --models fourier language --dtypes float32
    python benchmarks/parity.py path/to/vision-perceiver-fourier/        # the published files, if you have them
    python benchmarks/parity.py path/to/vision-perceiver-conv/ --image cat.jpg

Both read the same folder. Differences are divided by the largest number that transformers has there, if it is above 1.
They may be 1e-5 in float32 and 1e-10 in float64, otherwise the exit status is 1. transformers computes the angles of
positions in float32; for the comparison they are exact in its models, too. "As it is" has its logits without that.

Of files that are named, the classes of an image (--image), or the end of a sentence that is masked, are shown as well.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.perceiver import modeling_perceiver

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import print_row

from perceiver_model import CrossAttentionBlock, PerceiverModel, SelfAttentionBlock
from pretrained import PretrainedTextAdapter, fill_masks, load_pretrained

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VISION = {
    "num_latents": 512,
    "d_latents": 1024,
    "num_blocks": 8,
    "num_self_attends_per_block": 6,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 1,
    "qk_channels": None,
    "v_channels": None,
    "num_labels": 1000,
}
LANGUAGE = {"num_latents": 256, "d_latents": 1280, "d_model": 768, "num_blocks": 1, "num_self_attends_per_block": 26}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {  # transformers' class, and config.json
    "fourier": ("PerceiverForImageClassificationFourier", VISION | {"d_model": 261}),
    "learned": ("PerceiverForImageClassificationLearned", VISION | {"d_model": 512, "image_size": 224}),
    "conv": ("PerceiverForImageClassificationConvProcessing", VISION | {"d_model": 322}),
    "language": ("PerceiverForMaskedLM", LANGUAGE | {"qk_channels": 256, "v_channels": 1280}),
}
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}
SENTENCE = "This is an incomplete sentence where some words are missing."


def write_published(name: str, folder: str | Path, **changes: Any) -> None:
    """A folder as transformers writes it, of the published size, with random weights; changes are to config.json."""
    torch.manual_seed(0)
    architecture, config = PUBLISHED[name]
    model = getattr(modeling_perceiver, architecture)(transformers.PerceiverConfig(**config | changes))
    for parameter in model.parameters():  # as transformers makes them, they are so small that logits are hardly any
        nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3)
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1, 0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    model.save_pretrained(folder)


def load_peer(folder: str | Path) -> Any:
    (architecture,) = transformers.PerceiverConfig.from_pretrained(folder).architectures
    return getattr(modeling_perceiver, architecture).from_pretrained(folder, attn_implementation="eager").eval()


@contextlib.contextmanager
def exact_positions() -> Iterator[None]:
    """Positions that transformers' models compute are exact, and rounded to float32 only in the end, as ours are."""
    encoding, linear = modeling_perceiver.PerceiverFourierPositionEncoding, modeling_perceiver.build_linear_positions
    forward = encoding.forward

    def positions(index_dims: Any, device: Any = None) -> Tensor:
        axes = [torch.linspace(-1, 1, size, dtype=torch.float64, device=device) for size in index_dims]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)

    def exact(self: Any, *args: Any, dtype: torch.dtype, **kwargs: Any) -> Tensor:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return forward(self, *args, dtype=torch.float64, **kwargs).float().to(dtype)
        finally:
            torch.set_default_dtype(default)

    modeling_perceiver.build_linear_positions, encoding.forward = positions, exact
    try:
        yield
    finally:
        modeling_perceiver.build_linear_positions, encoding.forward = linear, forward


def layers_and_logits(model: nn.Module, kinds: Any, run: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """What the layers of these kinds give, in the order in which they run, and what `run` gives."""
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, args: Any, result: Any) -> None:
        outputs.append(result[0] if isinstance(result, tuple) else result)

    hooks = [layer.register_forward_hook(keep) for layer in model.modules() if isinstance(layer, kinds)]
    with torch.inference_mode():
        logits = run()
    for hook in hooks:
        hook.remove()
    return outputs, logits


def difference(one: Tensor, other: Tensor) -> float:
    other = other[:, : one.size(1)]  # transformers' language model answers all queries, however long the text is
    return (one - other).abs().max().item() / max(1.0, other.abs().max().item())


def random_input(ours: PerceiverModel, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """x and mask for our model, and what transformers' is called with."""
    generator = torch.Generator().manual_seed(1)
    if "image" in ours.adapters:
        pixels = torch.randn(1, 3, *ours.adapters["image"].image_shape[:2], generator=generator).to(dtype)
        return pixels.flatten(2).mT, None, {"inputs": pixels}
    longest = ours.adapters["text"].max_seq_len
    numbers = torch.randint(ours.adapters["text"].features["vocab_size"], (1, longest), generator=generator)
    mask = torch.arange(longest)[None] < longest * 3 // 4
    return numbers[..., None].to(dtype), mask, {"inputs": numbers, "attention_mask": mask.long()}


def compare(folder: str | Path, dtype: torch.dtype) -> tuple[float, float, float, int]:
    """Differences of layers, of logits and of logits with positions as they are; and how many layers there are."""
    torch.set_default_dtype(dtype)
    ours = load_pretrained(folder)
    x, mask, theirs = random_input(ours, dtype)
    found, logits = layers_and_logits(ours, (CrossAttentionBlock, SelfAttentionBlock), lambda: ours(x, mask))
    peer = load_peer(folder).to(dtype)
    with exact_positions():
        wanted, expected = layers_and_logits(peer, modeling_perceiver.PerceiverLayer, lambda: peer(**theirs).logits)
    with torch.inference_mode():
        as_it_is = peer(**theirs).logits
    torch.set_default_dtype(torch.float32)
    layers = [difference(one, other) for one, other in zip(found, wanted, strict=True)]
    return max(layers), difference(logits, expected), difference(logits, as_it_is), len(layers)


def show_predictions(folder: str, image: str | None) -> None:
    ours, peer = load_pretrained(folder), load_peer(folder)
    if isinstance(ours.adapters.get("text"), PretrainedTextAdapter):
        text = SENTENCE[:51] + len(SENTENCE[51:]) * "[MASK]"
        print(f"{text.replace('[MASK]', '_')} -> {fill_masks(ours, text)}")
    elif image is not None:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        from PIL import Image

        with torch.inference_mode():
            expected = peer(**processor(Image.open(image).convert("RGB"), return_tensors="pt")).logits[0].softmax(0)
            found = ours(ours.adapters["image"](image)[None])[0].softmax(0)
        for label in found.argsort(descending=True)[:5].tolist():
            name = ours.data_info["class_names"][label]
            print(f"{found[label]:.4f} here, {expected[label]:.4f} in transformers: {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="published files (default: random weights)")
    parser.add_argument("--models", nargs="+", choices=PUBLISHED, default=list(PUBLISHED), metavar="MODEL",
                        help=f"with random weights, of {', '.join(PUBLISHED)} (default: all)")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float64"], default=["float32", "float64"],
                        metavar="DTYPE", help="float32, float64 (default: both)")  # fmt: skip
    parser.add_argument("--image", help="a picture to classify with the files of FOLDER")
    args = parser.parse_args()
    widths, worst = (34, 7, 6, 10, 10, 10, 6), 0.0
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    print_row(("", "", "layers", "of layers", "of logits", "as it is", ""), widths)
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.folders or args.models:
            folder = Path(name) if args.folders else Path(scratch, name)
            if not args.folders:
                write_published(name, folder)
            for dtype in (getattr(torch, each) for each in args.dtypes):
                of_layers, of_logits, as_it_is, layers = compare(folder, dtype)
                excess = max(of_layers, of_logits) / BOUNDS[dtype]
                worst = max(worst, excess)
                differences = [f"{each:.1e}" for each in (of_layers, of_logits, as_it_is)]
                verdict = "ok" if excess <= 1 else "FAILS"
                print_row((name[-34:], str(dtype).removeprefix("torch."), layers, *differences, verdict), widths)
            if args.folders:
                show_predictions(name, args.image)
            else:
                (folder / "model.safetensors").unlink()
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
