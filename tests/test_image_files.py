"""Users' images: folders of classes and of splits, links, what cannot be read; pixels of every mode and depth."""

import os
import string
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from user_files import image_file, message, quick, write

import image_files
from adapters import square_pixels
from image_files import depth, find_splits, open_image, read_images, to_rgb
from messages import UserError

ROOT = Path(image_files.__file__).parent


def make(root, *files):
    """Files by their paths in `root`, images where they are called so."""
    for name in files:
        (image_file if name.endswith((".png", ".jpg")) else lambda path: write(path, "x"))(root / name)
    return root


# --- Class folders ---------------------------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    for name in ("dogs/b.png", "dogs/a.JPG", "cats/deep/er/9.png", "cats/10.png", ".hidden/x.png", "dogs/.x.png",
                 "__MACOSX/cats/9.png"):  # fmt: skip
        image_file(tmp_path / name)
    make(tmp_path, "dogs/notes.txt", "about.md", "dogs/Thumbs.DB", "dogs/more.txt", "cats/LICENSE")
    items = read_images(tmp_path)
    assert items.ids == ["cats/10.png", "cats/deep/er/9.png", "dogs/a.JPG", "dogs/b.png"]
    assert items.labels == ["cats", "cats", "dogs", "dogs"]
    assert items.values == [tmp_path / id for id in items.ids] and items.places[0] == str(tmp_path / "cats/10.png")
    (note,) = items.notes
    assert note.startswith(f"{tmp_path}: left out as no images: 2 .txt, ") and note.endswith(f"{tmp_path}/about.md")
    assert {"1 .md", "1 .db", "1 without extension"} <= set(note[note.index("2 .txt") :].partition(";")[0].split(", "))
    flat = read_images(tmp_path, labelled=False)
    assert flat.ids == items.ids and flat.labels is None and len(flat.notes) == 1
    clean = read_images(tmp_path / "cats/deep", labelled=False)
    assert (clean.ids, clean.notes) == (["er/9.png"], [])
    one = read_images(tmp_path / "dogs/b.png", labelled=False)
    assert (one.ids, one.values, one.notes) == (["b.png"], [tmp_path / "dogs/b.png"], [])


def test_folder_mistakes(tmp_path):
    assert "no class folder in it" in message(read_images, tmp_path)
    assert "there is no image in it" in message(read_images, tmp_path, labelled=False)
    assert "cannot be read: No such file or directory" in message(read_images, tmp_path / "nowhere")
    image_file(tmp_path / "cats/1.png")
    (tmp_path / "dogs").mkdir()
    assert f"{tmp_path}/dogs: there is no image in it" in message(read_images, tmp_path)
    image_file(tmp_path / "dogs/1.png")
    image_file(tmp_path / "stray.png")
    assert f"{tmp_path}/stray.png: the image is in no class folder" in message(read_images, tmp_path)
    path = write(tmp_path / "a.txt", "")
    assert "'.txt' is not an image's extension" in message(read_images, path, labelled=False)
    assert "Not a directory" in message(read_images, path)


def test_names_of_several_lines_stay_in_one_line(tmp_path):
    make(tmp_path, "cats/1.png", "new\nclass/readme.txt")
    assert "new\\nclass: there is no image in it" in message(read_images, tmp_path)
    link(tmp_path / "new\nclass/up", tmp_path)
    make(tmp_path, "new\nclass/1.png")
    assert read_images(tmp_path).places[1] == f"{tmp_path}/new\\nclass/1.png"
    make(tmp_path / "more", "tra\nin/cat/1.png", "train/cat/1.png")
    assert "tra\\nin: beside" in message(find_splits, tmp_path / "more")


def test_folders_as_deep_as_the_system_allows(tmp_path):
    """Deeper than Python's own calls may be nested."""
    (tmp_path / "cats").mkdir()
    here = os.getcwd()
    try:
        os.chdir(tmp_path / "cats")
        for _ in range(1200):
            os.mkdir("a")
            os.chdir("a")
        Image.new("RGB", (2, 2)).save("1.png")
        os.chdir(tmp_path)
        assert read_images(".", labelled=False).ids == ["cats/" + "a/" * 1200 + "1.png"]
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-r", tmp_path / "cats"], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_names_that_are_not_utf_8_are_escaped(tmp_path):
    """As an archive of a Korean Windows leaves them; they cost nothing."""
    image_file(tmp_path / "cats/1.png").rename(tmp_path / "cats" / os.fsdecode(b"\xb0\xa1.png"))
    image_file(tmp_path / "dogs/1.png")
    write(tmp_path / "dogs" / os.fsdecode(b"\xb0.txt"), "x")
    (tmp_path / "dogs").rename(tmp_path / os.fsdecode(b"dogs\xb3"))
    items = read_images(tmp_path)
    assert items.ids == ["cats/\\xb0\\xa1.png", "dogs\\xb3/1.png"] and items.labels == ["cats", "dogs\\xb3"]
    assert items.places[0] == f"{tmp_path}/cats/\\xb0\\xa1.png"
    assert open_image(items.values[0]).size == (3, 2)
    (tmp_path / "cats" / os.fsdecode(b"\xb1.png")).write_bytes(b"no image")
    assert "cats/\\xb1.png: not an image" in message(open_image, tmp_path / "cats" / os.fsdecode(b"\xb1.png"))


# --- Links -----------------------------------------------------------------------------------------------------------


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_a_link_to_a_folder_above_puts_nothing_into_another_class(tmp_path):
    make(tmp_path, "data/a/1.png", "data/a/in/3.png", "data/b/2.png", "more.png")
    for name, target in {"up": "..", "higher": "../..", "sibling": "../b", "self": ".", "in/again": "../in",
                         "file.png": "../b/2.png", "own.png": "1.png"}.items():  # fmt: skip
        link(tmp_path / "data/a" / name, target)
    items = read_images(tmp_path / "data")
    assert list(zip(items.ids, items.labels, strict=True)) == [
        ("a/1.png", "a"), ("a/in/3.png", "a"), ("b/2.png", "b")
    ]  # fmt: skip
    (note,) = items.notes
    assert note.startswith(f"{tmp_path}/data: links that lead to files that are read anyway and were left out: 7, ")
    assert note.endswith(f"{tmp_path}/data/a/file.png -> {tmp_path}/data/b/2.png")
    assert read_images(tmp_path / "data", labelled=False).ids == items.ids
    link(tmp_path / "data/all", ".")
    assert "data/all: a link to" in message(read_images, tmp_path / "data")


def test_links_to_other_places_are_followed_and_noted(tmp_path):
    make(tmp_path, "store/1.png", "store/2.png", "store/deep/3.png", "photos/4.png")
    make(tmp_path, "data/cats/0.png")
    link(tmp_path / "data/cats/one.png", tmp_path / "store/1.png")
    link(tmp_path / "data/cats/same.png", tmp_path / "store/1.png")
    link(tmp_path / "data/cats/set", tmp_path / "store/deep")
    link(tmp_path / "data/dogs", tmp_path / "photos")
    link(tmp_path / "photos/loop", tmp_path / "photos")
    items = read_images(tmp_path / "data")
    assert items.ids == ["cats/0.png", "cats/one.png", "cats/set/3.png", "dogs/4.png"]
    followed, left_out = items.notes
    assert f"and were followed: 3, first {tmp_path}/data/cats/one.png -> {tmp_path}/store/1.png" in followed
    assert f"were left out: 2, first {tmp_path}/data/cats/same.png -> {tmp_path}/store/1.png" in left_out
    link(tmp_path / "data/dogs/5.png", tmp_path / "store/1.png")
    assert "the same file as" in (text := message(read_images, tmp_path / "data")) and "of another class" in text


def test_broken_links_are_named_and_the_folder_itself_may_be_a_link(tmp_path):
    make(tmp_path, "data/cats/1.png", "data/dogs/1.png")
    link(tmp_path / "data/cats/gone.png", "/nowhere/x.png")
    link(tmp_path / "data/cats/loop", "loop")
    link(tmp_path / "here", "data")
    items = read_images(tmp_path / "here")
    assert items.ids == ["cats/1.png", "cats/gone.png", "dogs/1.png"]
    assert "cats/gone.png: there is no such file" in message(open_image, items.values[1])
    assert read_images(tmp_path / "here", labelled=False).ids == items.ids


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such files")
def test_devices_and_pipes_are_refused_at_once(tmp_path):
    make(tmp_path, "cats/1.png", "dogs/1.png")
    os.mkfifo(tmp_path / "cats/pipe.png")
    link(tmp_path / "cats/zero.png", "/dev/zero")
    items = read_images(tmp_path)
    assert items.ids == ["cats/1.png", "cats/pipe.png", "cats/zero.png", "dogs/1.png"]
    for path in items.values[1:3]:
        assert f"{path}: no regular file" in message(open_image, path)
    for path in (tmp_path / "cats/pipe.png", "/dev/zero"):
        assert "cannot be read" in message(read_images, path, labelled=False)


# --- Splits ----------------------------------------------------------------------------------------------------------


def classes(*folders):
    return [f"{folder}/{name}/{number}.png" for folder in folders for name in ("cat", "dog") for number in (1, 2)]


@pytest.mark.parametrize("files, expected", [
    (classes("train", "val", "test"), {"train": "train", "val": "val", "test": "test"}),
    (classes("train", "validation"), {"train": "train", "val": "validation"}),
    (classes("Training", "Testing"), {"train": "Training", "test": "Testing"}),
    (classes("Training", "Test"), {"train": "Training", "test": "Test"}),
    (classes("train", "valid", "test"), {"train": "train", "val": "valid", "test": "test"}),
    (classes("TRAIN", "DEV", "TEST"), {"train": "TRAIN", "val": "DEV", "test": "TEST"}),
    (classes("seg_train", "seg_test"), {"train": "seg_train", "test": "seg_test"}),
    (classes("1.Training", "2.Validation"), {"train": "1.Training", "val": "2.Validation"}),
    (classes("training_set/training_set", "test_set/test_set"),
     {"train": "training_set/training_set", "test": "test_set/test_set"}),
    (classes("TrainSet", "ValSet"), {"train": "TrainSet", "val": "ValSet"}),
    (classes("train2017", "val2017"), {"train": "train2017", "val": "val2017"}),
    (classes("학습", "검증", "시험"), {"train": "학습", "val": "검증", "test": "시험"}),
    (classes("brain/Training", "brain/Testing"), {"train": "brain/Training", "test": "brain/Testing"}),
    (classes("a/b/c"), {"train": "a/b/c"}),
    (classes("train"), {"train": "train"}),
    (["cat/1.png", "dog/1.png", "train/1.png"], {"train": "."}),  # a class of vehicles
    (["cat/1.png", "valid/1.png", "invalid/1.png"], {"train": "."}),
    (["cat/images/1.png", "dog/images/1.png"], {"train": "."}),
    (["cat/old/1.png", "cat/new/1.png", "dog/big/1.png", "dog/small/1.png"], {"train": "."}),
    (["cat/1.png", "cat/old/2.png", "dog/1.png", "dog/old/2.png", "dog/new/2.png"], {"train": "."}),
    (["photos/1.png"], {"train": "."}),  # one class
    ([*classes("train", "test"), "__MACOSX/train/cat/._1.png", ".git/x", "readme.txt"],
     {"train": "train", "test": "test"}),
])  # fmt: skip
def test_splits_are_found(tmp_path, files, expected):
    make(tmp_path, *files)
    splits, notes = find_splits(tmp_path)
    assert splits == {split: tmp_path / folder for split, folder in expected.items()}
    plain = {split: folder for split, folder in expected.items() if folder not in (split, ".", "validation")}
    assert len(notes) == (len(plain) > 0 or "train" in files[0] and len(expected) == 1 and expected["train"] != ".")
    for folder in splits.values():
        labels = set(read_images(folder).labels)
        assert labels == {"cat", "dog"} or expected == {"train": "."}
        assert not labels & {"Training", "Testing", "Test", "test", "val", "seg_train"}


@pytest.mark.parametrize("files, part", [
    (["train/1.png", "test/1.png"], "test, train seem to be splits"),
    (["train/cat.1.jpg", "train/dog.1.jpg", "test/1.jpg", "val/1.jpg"], "seem to be splits"),
    (classes("val", "test"), "seem to be splits"),
    (classes("cat/train", "dog/train", "cat/test", "dog/test"), "put the splits above the classes"),
    (classes("fold1", "fold2", "fold3"), "call them train, val and test if they are splits"),
    (["part1/cat/1.png", "part1/dog/1.png", "part2/cat/1.png"], "hold folders of the same names"),
    (["a/cat/1.png", "a/dog/1.png", "b/cat/1.png", "b/fox/1.png", "c/dog/1.png", "c/fox/1.png"], "the same names"),
    (["covid/images/1.png", "covid/masks/1.png", "normal/images/1.png", "normal/masks/1.png"], "the same names"),
])  # fmt: skip
def test_splits_are_never_taken_for_classes(tmp_path, files, part):
    make(tmp_path, *files)
    splits, _ = find_splits(tmp_path)
    assert splits == {"train": tmp_path}
    assert part in message(read_images, tmp_path)


def test_what_lies_beside_the_splits_must_be_clear(tmp_path):
    make(tmp_path, *classes("train", "test", "extra"))
    assert "extra: beside" in message(find_splits, tmp_path)
    make(tmp_path / "two", *classes("val", "validation", "train"))
    assert "two/validation: beside" in message(find_splits, tmp_path / "two")
    assert "holds the splits" in message(read_images, make(tmp_path / "three", *classes("Train", "test")))


# --- What cannot be read ---------------------------------------------------------------------------------------------


def test_images_that_cannot_be_used(tmp_path, monkeypatch):
    path = image_file(tmp_path / "a.png", size=(50, 50))
    for most in (2000, 20):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        assert f"a.png: more than {most} pixels; make the image smaller" in message(open_image, path)
    monkeypatch.undo()
    write(path, path.read_bytes()[:-30])
    assert "a.png: not an image that can be read" in message(open_image, path)
    assert "not an image that can be read" in message(open_image, write(path, "%!PS-Adobe-3.0 EPSF-3.0\n"))
    assert "there is no such file" in message(open_image, tmp_path / "b.png")
    assert "c\\x1b[31m.png: there is no such file" in message(open_image, tmp_path / "c\x1b[31m.png")


@settings(quick, max_examples=30)
@given(st.binary(max_size=200), st.sampled_from(["", "png", "jpg", "tif", "gif"]))
def test_garbage_is_a_users_mistake(tmp_path, garbage, start):
    if start:
        garbage = image_file(tmp_path / f"good.{start}").read_bytes()[: 10 * len(garbage)] + garbage
    for extension in ("png", "jpg", "tif"):
        path = write(tmp_path / f"a.{extension}", garbage)
        try:
            open_image(path)
        except UserError as error:
            assert str(path) in str(error)
        assert depth(path) is None


def png_of(width, height, bits=8, colour=2, pixels=bytes(1000), more=()):
    """A PNG file of the bytes that its rows hold; more: chunks before them."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    rest = b"".join(chunk(*each) for each in (*more, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + header + rest


def bmp_of(width, height):
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


@pytest.mark.parametrize("name, data", [
    ("a.png", png_of(2**31 - 1, 2**31 - 1)),
    ("a.png", png_of(2**31 - 1, 1)),
    ("a.png", png_of(60_000, 60_000)),
    ("a.png", png_of(10_000, 10_000)),  # between Pillow's warning and its error
    ("a.bmp", bmp_of(2**31 - 1, 2**31 - 1)),
    ("a.ppm", b"P6 2147483647 2147483647 255\n"),
    ("a.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;"),
])  # fmt: skip
def test_huge_images_are_refused_before_they_are_decoded(tmp_path, name, data):
    assert f"{name}: more than 89478485 pixels" in message(open_image, write(tmp_path / name, data))


HEIC = b"\0\0\0\x18ftypheic" + bytes(100)


def test_heic_photos_are_images_that_need_a_package(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "PHOTOS", {"HEIC": ({".heic"}, {b"heic"}, "pip install pillow-heif")})
    make(tmp_path, "cat/1.png")
    write(tmp_path / "cat/IMG_1.HEIC", HEIC)
    write(tmp_path / "cat/IMG_2.jpg", HEIC)
    write(tmp_path / "cat/IMG_3.heic", b"cut")
    items = read_images(tmp_path)
    assert len(items.ids) == 4 and not items.notes
    for path in items.values[1:]:
        assert f"{path}: a photo in HEIC; pip install pillow-heif, or save it as JPEG" in message(open_image, path)


def test_heic_photos_are_read_where_the_package_is_there(tmp_path):
    """A stand-in for pillow-heif: it registers a format for the extension as the package does."""
    write(tmp_path / "pillow_heif.py", """
from PIL import Image, ImageFile

class HeifImageFile(ImageFile.ImageFile):
    format = "HEIF"
    def _open(self):
        assert self.fp.read(12)[4:] == b"ftypheic"
        self._size, self._mode, self.tile = (2, 1), "RGB", [("raw", (0, 0, 2, 1), 12, ("RGB", 0, 1))]

def register_heif_opener():
    Image.register_open("HEIF", HeifImageFile, lambda start: start[4:12] == b"ftypheic")
    Image.register_extensions("HEIF", [".heic", ".heif", ".hif"])
""")  # fmt: skip
    write(tmp_path / "in/a.HEIC", HEIC[:12] + bytes([1, 2, 3, 4, 5, 6]))
    code = "import sys; import image_files as f; i = f.read_images(sys.argv[1], labelled=False); " \
           "print(i.ids, list(f.open_image(i.values[0]).getdata()), list(f.PHOTOS))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "in"], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=120)  # fmt: skip
    assert done.stdout.startswith("['a.HEIC'] [(1, 2, 3), (4, 5, 6)]") and "HEIC" not in done.stdout[30:], done.stderr


# --- EXIF ------------------------------------------------------------------------------------------------------------

TOP = np.zeros((48, 64, 3), np.uint8)
TOP[:24] = 200  # bright above


def tiff(*entries, more=b""):
    """EXIF of entries (tag, type, count, four bytes)."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0) + more


def short(value):
    return struct.pack("<HH", value, 0)


SIX = (0x0112, 3, 1, short(6))  # stored turned by 90 degrees
WELL = tiff(SIX)
GPS = struct.pack("<H", 1) + struct.pack("<HHI", 2, 5, 3) + struct.pack("<II", 46, 0) + bytes(24)
DAMAGED = {  # what photo viewers show upright or as it is stored
    "plain": WELL,
    "prefix twice": b"Exif\0\0" + WELL,
    "no TIFF": b"Exif\0\0nothing at all",
    "empty": b"Exif\0\0",
    "garbage type": tiff((0x010F, 2, 1, b"X\0\0\0"), SIX, (0x011A, 3, 2, short(72)), (0x0128, 5, 1, short(9999))),
    "GPS of 0 / 0": tiff(SIX, (0x8825, 4, 1, struct.pack("<I", 38)), more=GPS),
    "GPS as a fraction": tiff(SIX, (0x8825, 5, 1, struct.pack("<I", 8))),
    "cut": b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 40, 0x0112, 3, 1) + short(6),
    "orientation as text": tiff((0x0112, 2, 2, b"6\0\0\0")),
    "orientation of three": tiff((0x0112, 3, 3, struct.pack("<I", 8))),
    "orientation 0": tiff((0x0112, 3, 1, short(0))),
    "orientation 99": tiff((0x0112, 3, 1, short(99))),
    "pointer to nothing": tiff(SIX, (0x8769, 4, 1, struct.pack("<I", 60000))),
    "short pointer": tiff(SIX, (0x8769, 3, 1, short(60))),
    "pointer to itself": tiff(SIX, (0x8769, 4, 1, struct.pack("<I", 8))),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_exif_costs_no_picture(tmp_path, kind):
    stored = np.rot90(TOP)  # as a camera held upright stores it
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=DAMAGED[kind], quality=95)
    found = np.asarray(to_rgb(open_image(tmp_path / "a.jpg"))).astype(int)
    either = [picture for picture in (stored, TOP) if picture.shape == found.shape]
    assert len(either) == 1 and np.abs(found - either[0]).mean() < 2
    if kind in ("plain", "garbage type", "GPS of 0 / 0", "GPS as a fraction", "pointer to nothing", "short pointer"):
        assert found.shape == TOP.shape, "the orientation can be read"
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(square_pixels(image, 8), square_pixels(tmp_path / "a.jpg", 8))


def test_exif_that_raises_anything_costs_no_picture(tmp_path, monkeypatch):
    path = image_file(tmp_path / "a.png")
    for error in (SyntaxError("not a TIFF file"), struct.error(), KeyError(1), OSError(), ZeroDivisionError()):
        def fail(_, error=error):
            raise error

        monkeypatch.setattr(Image.Image, "getexif", fail)
        assert open_image(path).size == (3, 2) and square_pixels(Image.new("RGB", (4, 4)), 2).shape == (2, 2, 3)


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_once(tmp_path, extension, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(TOP).save(tmp_path / f"a.{extension}", exif=exif)
    image = open_image(tmp_path / f"a.{extension}")
    bright = np.asarray(to_rgb(image))[..., 0] > 100
    assert bright.shape == ((64, 48) if orientation > 4 else (48, 64))
    rows, columns = np.flatnonzero(bright.all(1)), np.flatnonzero(bright.all(0))
    expected = {1: "top", 2: "top", 3: "bottom", 4: "bottom", 5: "left", 6: "right", 7: "right", 8: "left"}[orientation]
    lines = rows if expected in ("top", "bottom") else columns
    assert abs(len(lines) - 24) <= 1 and (lines.min() < 2) == (expected in ("top", "left"))


# --- Pixels ----------------------------------------------------------------------------------------------------------


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


def test_open_image_turns_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    image.save(tmp_path / "a.png", exif=exif)
    opened = open_image(tmp_path / "a.png")
    assert opened.size == (1, 2) and pixels(opened) == [[255, 0, 0], [0, 0, 255]]
    assert open_image(image_file(tmp_path / "b.png")).size == (3, 2)


@pytest.mark.parametrize("mode, colour, expected", [
    ("RGB", (1, 2, 3), [1, 2, 3]),
    ("L", 7, [7, 7, 7]),
    ("1", 1, [255, 255, 255]),
    ("LA", (100, 255), [100, 100, 100]),
    ("LA", (100, 0), [255, 255, 255]),
    ("RGBA", (255, 0, 0, 255), [255, 0, 0]),
    ("RGBA", (0, 0, 0, 51), [204, 204, 204]),
    ("RGBa", (0, 0, 0, 51), [204, 204, 204]),
    ("La", (0, 51), [204, 204, 204]),
    ("RGBX", (1, 2, 3, 0), [1, 2, 3]),
    ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
    ("CMYK", (0, 0, 0, 255), [0, 0, 0]),
    ("YCbCr", (77, 128, 128), [77, 77, 77]),
    ("HSV", (0, 0, 9), [9, 9, 9]),
    ("I;16", 257 * 40, [40, 40, 40]),
    ("I;16B", 257 * 40 + 129, [41, 41, 41]),
    ("I;16", 65535, [255, 255, 255]),
    ("I", 65535, [255, 255, 255]),
    ("I", 257, [1, 1, 1]),
    ("F", 1.0, [255, 255, 255]),
    ("F", 0.5, [128, 128, 128]),
])
def test_to_rgb(mode, colour, expected):
    assert pixels(to_rgb(Image.new(mode, (2, 1), colour))) == [expected, expected]


def test_to_rgb_of_a_palette():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([2, 0, 1])
    assert pixels(to_rgb(image)) == [[70, 80, 90], [10, 20, 30], [40, 50, 60]]
    image.info["transparency"] = 0
    assert pixels(to_rgb(image)) == [[70, 80, 90], [255, 255, 255], [40, 50, 60]]
    image.info["transparency"] = b"\xff\xff\x00"
    assert pixels(to_rgb(image)) == [[255, 255, 255], [10, 20, 30], [40, 50, 60]]


def test_transparent_colour(tmp_path):
    for mode, colour in (("L", 3), ("RGB", (1, 2, 3))):
        Image.new(mode, (1, 1), colour).save(tmp_path / "a.png", transparency=colour)
        assert pixels(to_rgb(open_image(tmp_path / "a.png"))) == [[255, 255, 255]], mode
    deep = b"\0" + struct.pack(">HH", 3000, 257 * 7)
    write(tmp_path / "a.png", png_of(2, 1, 16, 0, deep, [(b"tRNS", struct.pack(">H", 3000))]))
    assert pixels(to_rgb(open_image(tmp_path / "a.png"))) == [[255] * 3, [7] * 3]


def test_every_mode_of_pillow_can_be_used():
    for mode in set(Image.MODES) - {"LAB"}:  # older Pillows cannot convert it
        assert to_rgb(Image.new(mode, (2, 3))).mode == "RGB"
    lab = Image.new("LAB", (2, 3))
    try:
        assert to_rgb(lab).mode == "RGB"
    except UserError as error:
        assert "mode LAB" in str(error)


@pytest.mark.parametrize("bits, colour, expected", [
    (12, 4095, 255), (12, 2048, 128), (12, 0, 0), (10, 1023, 255), (10, 4, 1), (8, 200, 200), (14, 8192, 128),
    (16, 65535, 255), (16, 32768, 128),
])  # fmt: skip
def test_grey_of_so_many_bits(bits, colour, expected):
    for mode in ("I;16", "I"):
        image = Image.fromarray(np.full((1, 2), colour, np.uint16 if mode == "I;16" else np.int32))
        assert image.mode == mode and pixels(to_rgb(image, bits=bits)) == [[expected] * 3] * 2


def test_values_above_the_bits_of_training_are_refused():
    image = Image.fromarray(np.array([[7, 5000]], np.uint16))
    text = message(to_rgb, image, "a.png", 12)
    assert text.startswith("a.png: mode I;16 with values 7 to 5000; they must be in 0..4095, the 12 bits of the ")


def save_tiff_16(path, array):
    """Colours of 16 bits, which Pillow reads and does not write: an uncompressed TIFF."""
    height, width, channels = array.shape
    data = array.astype("<u2").tobytes()
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 0), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 0),
               (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data))]  # fmt: skip
    end = 8 + 2 + 12 * len(entries) + 4
    values = {258: end, 273: end + 6}
    body = b"".join(struct.pack("<HHII", tag, kind, n, values.get(tag, value)) for tag, kind, n, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0)
    path.write_bytes(head + struct.pack("<3H", 16, 16, 16) + data)
    return path


def test_how_many_bits_a_file_uses(tmp_path):
    for most, bits in ((0, 0), (255, 8), (256, 9), (1023, 10), (4095, 12), (4096, 13), (65535, 16)):
        Image.fromarray(np.array([[0, most]], np.uint16)).save(tmp_path / "a.png")
        Image.fromarray(np.array([[0, most]], np.uint16)).save(tmp_path / "a.tif")
        assert depth(tmp_path / "a.png") == depth(tmp_path / "a.tif") == ("grey", bits)
    for most, bits in ((4095, 12), (16383, 14), (65535, 16)):
        path = save_tiff_16(tmp_path / "b.tif", np.full((2, 2, 3), most))
        assert open_image(path).mode == "RGB" and depth(path) == ("colour", bits)
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA"):
        Image.new(mode, (2, 2)).save(tmp_path / "a.png")
        assert depth(tmp_path / "a.png") is None
    Image.new("CMYK", (2, 2)).save(tmp_path / "a.jpg")
    assert depth(tmp_path / "a.jpg") is None and depth(write(tmp_path / "c.png", "no image")) is None
    assert depth(tmp_path / "nowhere.png") is None


@pytest.mark.parametrize("mode, colour, expected", [
    ("I", 65536, "cats/1.png: mode I with values 65536 to 65536; they must be in 0..65535, the 16 bits of"),
    ("I", -1, "mode I with values -1"),
    ("F", 1.5, "mode F with values 1.5 to 1.5; they must be in 0..1"),
    ("F", float("nan"), "mode F with values nan"),
])
def test_pixels_without_a_meaning(mode, colour, expected):
    assert expected in message(to_rgb, Image.new(mode, (1, 1), colour), "cats/1.png")


@quick
@given(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]), st.binary(min_size=48, max_size=48),
       st.sampled_from(["png", "tif", "bmp", "gif", "webp"]))
def test_random_images(tmp_path, mode, data, extension):
    image = Image.frombytes(mode, (4, 3), data[: len(Image.new(mode, (4, 3)).tobytes())])
    if mode == "P":
        image.putpalette(data * 16)
    try:
        image.save(tmp_path / f"a.{extension}", **({"lossless": True} if extension == "webp" else {}))
    except (OSError, ValueError):
        assume(False)  # a format that does not know the mode
    opened = to_rgb(open_image(tmp_path / f"a.{extension}"))
    assert opened.mode == "RGB" and opened.size == (4, 3)
    if mode == "RGB" and extension != "gif":
        assert opened.tobytes() == image.tobytes()
    if extension in ("png", "tif") and mode != "P":
        assert opened.tobytes() == to_rgb(image).tobytes()


def test_every_extension_is_lower_case_text():
    """A folder of images named in capitals is found as one in small letters is."""
    assert all(set(e[1:]) <= set(string.ascii_lowercase + string.digits) for e in Image.registered_extensions())
