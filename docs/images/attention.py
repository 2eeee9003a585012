"""Draw docs/images/attention.png, the picture of the README: what trained models look at in a digit and in a sentence.

    python train.py --dataset digits --checkpoint_dir digits
    python train.py --dataset text --data_path tests/data/languages.csv --checkpoint_dir languages
    python docs/images/attention.py digits/best_model.pth languages/best_model.pth
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_digits

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from batches import collate  # noqa: E402
from evaluation import collect_attention  # noqa: E402
from inference import load_model, predict  # noqa: E402

DIGIT = 4  # its number in the data set
SENTENCE = "Könnten Sie mir bitte sagen, wo der Bahnhof ist?"


def draw(checkpoint: str, item: Any, path: Path) -> None:
    """The figure that `inference.py --analyze` draws, here of one raw item."""
    model, _ = load_model(checkpoint)
    ((modality, adapter),) = model.adapters.items()
    batch = collate([{"input": {modality: adapter(item)}}])
    (answer,) = predict(model, [item])
    caption = f"predicted {answer['class']} ({answer['confidence']:.0%})"
    mask = batch["mask"][modality].numpy()
    adapter.draw_attention(batch["input"][modality], mask, collect_attention(model, batch), [caption], path)


def main(digits: str, languages: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / "digit.png", Path(folder) / "sentence.png"]
        draw(digits, load_digits().images[DIGIT], parts[0])
        draw(languages, SENTENCE, parts[1])
        pictures = [Image.open(part).convert("RGB") for part in parts]
    width = max(picture.width for picture in pictures)
    page = Image.new("RGB", (width, sum(picture.height for picture in pictures)), "white")
    top = 0
    for picture in pictures:
        page.paste(picture, ((width - picture.width) // 2, top))
        top += picture.height
    page.save(HERE / "attention.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
