"""Users' images: folders of them into raw items, files into pixels.

    find_splits    a folder of class folders, or of train, val and test folders (or the like) above those
    read_images    a folder of class folders, of images at any depth, or one image  ->  Items of Paths
    open_image     a file  ->  an image, upright
    to_rgb         an image of any mode  ->  8-bit RGB

Every format that Pillow reads, and HEIC photos if the package pillow-heif is installed. Mistakes raise UserError with
the file and the remedy.
"""

import os
import re
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from data_files import Items
from messages import UserError, as_utf8, printable
from tables import listed

Image.init()
with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
# EPS would run another program, Ghostscript; Pillow recognises the others but needs more software to read them.
# They are tried in this order, the usual ones first.
FORMATS = sorted(set(Image.OPEN) - {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"})
FORMATS.sort(key=lambda name: name not in ("JPEG", "PNG"))
EXTENSIONS = {extension for extension, format in Image.registered_extensions().items() if format in FORMATS}
# Photos that not every installation reads: their extensions, the possible bytes 8 to 11 of the file, the remedy
PHOTOS = {
    "HEIC": (
        {".heic", ".heif", ".hif"},
        {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"},
        "pip install pillow-heif",
    ),
    "AVIF": ({".avif"}, {b"avif", b"avis"}, "pip install --upgrade pillow"),
}
PHOTOS = {kind: known for kind, known in PHOTOS.items() if not known[0] <= EXTENSIONS}
EXTENSIONS = EXTENSIONS.union(*(extensions for extensions, _, _ in PHOTOS.values()))

# Words in the names of folders that hold a split
SPLITS = {
    "train": "train", "training": "train", "trainval": "train", "학습": "train", "훈련": "train",
    "val": "val", "valid": "val", "validation": "val", "validate": "val", "dev": "val", "검증": "val",
    "test": "test", "testing": "test", "시험": "test", "테스트": "test",
}  # fmt: skip
PURPOSES = {"train": "training", "val": "validation", "test": "the test"}


# --- Folders ---------------------------------------------------------------------------------------------------------


def _error(path: str | Path, what: str) -> UserError:
    return UserError(f"{printable(str(path))}: {printable(what)}")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def _entries(folder: Path, folders_only: bool = False) -> list[Path]:
    """The contents of a folder by name, without hidden entries and the folder that macOS adds to archives."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not folders_only or _is_folder(entry)]
    except OSError as error:
        raise _error(folder, f"cannot be read: {error.strerror}; correct the path or its permissions") from error
    return [folder / name for name in sorted(names) if not name.startswith(".") and name != "__MACOSX"]


def _is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # a link may point to itself


def _folders(folder: Path) -> list[Path]:
    return _entries(folder, folders_only=True)


def _holds_images(folder: Path) -> bool:
    """Whether images lie in the folder itself."""
    return any(_is_image(entry) and not entry.is_dir() for entry in _entries(folder))


def _names(folders: list[Path]) -> str:
    return listed(folder.name for folder in folders)


class _Walk:
    """The files below class folders, each of them once, whatever links there are.

    A link that leads back into the data, or to a folder above them, would put images of one class into another: it is
    left out. A link to somewhere else is followed. `notes` mentions both.
    """

    def __init__(self, root: Path):
        self.root = root
        self.reached: dict[str, tuple[Path, Path]] = {}  # (class folder, path) of each file that a link led to
        self.followed: list[Path] = []
        self.left_out: list[Path] = []

    def files(self, folder: Path) -> list[Path]:
        """The files of a class folder at any depth, in the order of their names.

        Raises:
            UserError: a link puts a file into two classes, or the folder cannot be read.
        """
        linked = folder.is_symlink()
        if linked and folder != self.root:
            if self._leads_back(folder):
                raise _error(folder, f"a link to {os.path.realpath(folder)}, which is read anyway; remove it")
            self.followed.append(folder)
        files, entered = [], {os.path.realpath(folder)}
        pending = [(entry, linked) for entry in reversed(_entries(folder))]
        while pending:
            path, linked = pending.pop()  # linked: reached through a link
            is_link = path.is_symlink() and path.exists()  # a broken link counts as an unreadable image
            linked = linked or is_link
            if (is_link and self._leads_back(path)) or (linked and not self._is_new(path, folder, entered)):
                self.left_out.append(path)
                continue
            if is_link:
                self.followed.append(path)
            if path.is_dir():
                pending += [(entry, linked) for entry in reversed(_entries(path))]
            else:
                files.append(path)
        return files

    def _leads_back(self, link: Path) -> bool:
        target, root = Path(os.path.realpath(link)), Path(os.path.realpath(self.root))
        return target.is_relative_to(root) or root.is_relative_to(target)

    def _is_new(self, path: Path, folder: Path, entered: set[str]) -> bool:
        """Whether the target of a link has not been read yet.

        Raises:
            UserError: the file was read in another class.
        """
        real = os.path.realpath(path)
        if path.is_dir():
            new = real not in entered
            entered.add(real)
            return new
        first_folder, first = self.reached.setdefault(real, (folder, path))
        if first_folder != folder:
            raise _error(path, f"the same file as {first}, of another class; remove one of them")
        return first == path

    def notes(self) -> list[str]:
        parts = (
            (self.followed, "lead to other places and were followed"),
            (self.left_out, "lead to files that are read anyway and were left out"),
        )
        return [
            f"{self.root}: links that {what}: {len(links)}, first {links[0]} -> {os.path.realpath(links[0])}"
            for links, what in parts
            if links
        ]


def read_images(path: str | Path, labelled: bool = True) -> Items:
    """Paths of images, in the order of their names: of a folder with a sub-folder (of any depth) for each class or,
    without labels, of any folder or one image file.

    Their ids are the paths within the folder, with bytes that are not UTF-8 escaped. Hidden files and folders are
    skipped. Files whose extension is not an image's, and links, are counted in `notes`. The images are not opened here.

    Raises:
        UserError: a class has no image, an image lies outside the classes, or the sub-folders are splits and not
            classes (see `find_splits`).
    """
    path = Path(path)
    if not labelled and path.is_file():
        if not _is_image(path):
            raise _error(path, f"{path.suffix!r} is not an image's extension; use .png, .jpg or another Pillow reads")
        return Items([as_utf8(path.name)], [printable(str(path))], [path], None)
    folders = _folders(path) if labelled else [path]
    if not folders:
        raise _error(path, "no class folder in it; put the images of each class into a folder of its own")
    if labelled:
        _refuse_splits(path, folders)
    walk = _Walk(path)
    found = {folder: walk.files(folder) for folder in folders}
    images = {folder: [file for file in files if _is_image(file)] for folder, files in found.items()}
    empty = [folder for folder in folders if not images[folder]]
    if empty:
        raise _error(empty[0], "there is no image in it; add some, or remove the folder")
    beside = [entry for entry in _entries(path) if labelled and entry not in images]
    stray = [file for file in beside if _is_image(file)]
    if stray:
        raise _error(stray[0], "the image is in no class folder; move it into that of its class")
    others = beside + [file for files in found.values() for file in files if not _is_image(file)]
    kinds = Counter(file.suffix.lower() or "without extension" for file in others)
    shown = listed(f"{count} {kind}" for kind, count in kinds.most_common())
    notes = [f"{path}: left out as no images: {shown}; the first is {file}" for file in others[:1]]
    values = [file for files in images.values() for file in files]
    labels = [as_utf8(folder.name) for folder, files in images.items() for _ in files] if labelled else None
    root = os.path.join(path, "")
    ids = [as_utf8(str(file).removeprefix(root).replace(os.sep, "/")) for file in values]
    return Items(ids, [printable(str(file)) for file in values], values, labels, notes=notes + walk.notes())


# --- Splits ----------------------------------------------------------------------------------------------------------


def find_splits(path: str | Path) -> tuple[dict[str, Path], list[str]]:
    """({'train': ..., 'val': ..., 'test': ...}, notes): the folders of class folders, the last two if they exist.

    `path` holds class folders, or folders of these called train, val and test or the like (Training, valid, seg_test).
    Folders around them, each with nothing else in it, are looked into. Guesses are mentioned in the notes.

    Raises:
        UserError: a folder beside train has no such name, or two mean the same split.
    """
    path = Path(path)
    top = _without_wrappers(path)
    called = {folder: _split_of(folder) for folder in _folders(top)}
    train = [folder for folder, split in called.items() if split == "train"]
    if not any(map(_folders, train)):  # a class may be called "train"
        return {"train": top}, [f"{path}: the classes are the folders in {top}"] if top != path else []
    splits: dict[str, Path] = {}
    for folder, split in called.items():
        if split is None or split in splits:
            known = splits.get(split, train[0])
            raise _error(folder, f"beside {known}, it is not clear what it is; keep one each of train, val and test, "
                                 "or only class folders")  # fmt: skip
        splits[split] = folder
    usual = top == path and all(folder.name in (split, "validation") for split, folder in splits.items())
    splits = {split: _without_wrappers(splits[split]) for split in PURPOSES if split in splits}
    shown = ", ".join(f"{folder} for {PURPOSES[split]}" for split, folder in splits.items())
    return splits, [] if usual else [f"{path}: the splits are {shown}"]


def _split_of(folder: Path) -> str | None:
    """'train', 'val' or 'test' for a folder with such a word in its name: "Testing", "seg_train", "validation_set"."""
    words = re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", folder.name).lower())
    splits = {SPLITS.get(re.sub("(set|data|images)$", "", word)) for word in words} - {None}
    return splits.pop() if len(splits) == 1 else None


def _without_wrappers(path: Path) -> Path:
    """The folder itself or, while it holds nothing but one folder of folders, that folder."""
    while len(inner := _folders(path)) == 1 and not _holds_images(path):
        if _holds_images(inner[0]) or not _folders(inner[0]):  # the only class
            break
        path = inner[0]
    return path


def _refuse_splits(path: Path, folders: list[Path]) -> None:
    """Check that the folders in `path` are classes.

    Raises:
        UserError: they seem to be splits, or other parts of the data.
    """
    called = {folder: _split_of(folder) for folder in folders}
    splits = set(called.values()) - {None}
    if "train" in splits and any(_folders(folder) for folder in folders if called[folder] == "train"):
        raise _error(path, f"holds the splits {_names(folders)}; name the one that is meant")
    if len(splits) > 1 and None not in called.values():
        raise _error(path, f"{_names(folders)} seem to be splits, but there is no train folder with a folder for each "
                           "class in it; make one, or rename them if they are classes")  # fmt: skip
    counts = Counter()  # how often each name of an inner folder occurs
    for folder in folders:
        inner = {each.name.lower() for each in _folders(folder)}
        if not inner or _holds_images(folder):
            return
        counts.update(inner)
    shared = sorted(name for name, count in counts.items() if count > len(folders) / 2)
    if len(folders) > 1 and len(counts) > 1 and shared:
        remedy = "call them train, val and test if they are splits"
        if not SPLITS.keys().isdisjoint(shared):
            remedy = "put the splits above the classes"
        raise _error(path, f"{_names(folders)} hold folders of the same names ({listed(shared)}), so it is not clear "
                           f"which are the classes; {remedy}, or list files and labels in a table, see --dataset "
                           "multimodal")  # fmt: skip


# --- Pixels ----------------------------------------------------------------------------------------------------------

_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def open_image(path: str | Path) -> Image.Image:
    """The image (the first of several frames), decoded and upright.

    Raises:
        UserError: the file is missing or damaged, or has more pixels than Pillow's limit
            (`PIL.Image.MAX_IMAGE_PIXELS`, 89 million), which is checked before decoding.
    """
    if not os.path.isfile(path):  # reading a pipe would wait forever
        what = "no regular file" if os.path.exists(path) else "there is no such file"
        raise _error(path, f"{what}; correct the path, or remove it")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or np.inf):
                raise Image.DecompressionBombError
            return upright(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _error(path, f"more than {Image.MAX_IMAGE_PIXELS} pixels; make the image smaller") from error
    except Exception as error:  # damaged bytes raise a dozen kinds of exception
        what = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        what = _remedy(path) or f"not an image that can be read ({what}); replace or remove it"
        raise _error(path, what) from error


def _remedy(path: str | Path) -> str | None:
    """The remedy for a photo in a format that is not read here, whatever its extension says; None for other files."""
    start = b""
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(12)
    for kind, (extensions, brands, remedy) in PHOTOS.items():
        if Path(path).suffix.lower() in extensions or (start[4:8] == b"ftyp" and start[8:] in brands):
            return f"a photo in {kind}; {remedy}, or save it as JPEG or PNG"
    return None


def upright(image: Image.Image) -> Image.Image:
    """The image, decoded and turned as its EXIF says; as it is stored if the EXIF cannot be read."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # damaged EXIF raises many kinds of exception, depending on the version of Pillow
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, name: str = "the image", bits: int = 16) -> Image.Image:
    """The image as 8-bit RGB, whatever its mode; transparent parts are put on white.

    Grey of more than 8 bits is scaled so that 2**bits - 1 is white, floating-point grey so that 1 is white.

    Raises:
        UserError: values outside that range; `name` is the image's in the message.
    """
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow itself would clip at 255
        values = np.asarray(image)
        grey = to_bytes(values, 1 if image.mode == "F" else 2**bits - 1, f"{name}: mode {image.mode}")
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    try:
        return image.convert("RGB")
    except ValueError as error:  # LAB in older Pillows
        raise UserError(f"{name}: mode {image.mode} cannot be converted to RGB; save it as RGB") from error


def to_bytes(values: np.ndarray, white: int, name: str) -> np.ndarray:
    """Values 0..white as uint8 0..255, rounded.

    Raises:
        UserError: values outside that range; `name` is the image's in the message.
    """
    if not ((values >= 0) & (values <= white)).all():
        more = f", the {white.bit_length()} bits of the training images (--image_bits)" if white > 1 else ""
        raise UserError(f"{name} with values {values.min()} to {values.max()}; they must be in 0..{white}{more}: "
                        "scale them, or save as 8 bit")  # fmt: skip
    return np.round(values * (255 / white)).astype(np.uint8)


def depth(path: str | Path) -> tuple[str, int] | None:
    """('grey' or 'colour', bits that the largest value needs) for a 16-bit file; None for an 8-bit or damaged one.

    Of 16-bit colours, Pillow gives only the upper 8 bits.
    """
    with suppress(Exception):
        with Image.open(path, formats=FORMATS) as image:
            kind = "grey" if image.mode.startswith("I") else "colour"
            if kind == "colour" and not any(";16" in str(tile[3]) for tile in image.tile):
                return None
        pixels = np.asarray(open_image(path))
        return kind, int(pixels.max()).bit_length() + (8 if kind == "colour" else 0)
    return None
