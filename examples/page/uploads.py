"""What is uploaded to the page: images and their classes, from files or from a zip. Knows nothing of gradio."""

import zipfile
from pathlib import PurePath

from PIL import Image


class RefusedError(ValueError):
    """Something that the user can set right; its sentence is shown on the page."""


def open_image(file, name):
    try:
        return Image.open(file).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise RefusedError(f"{name} is no image that can be read. Nothing was added.") from error


def read_files(paths, label):
    """Images of one class, as (image, label)."""
    if not paths or not (label or "").strip():
        raise RefusedError("Choose images and write the name of their class, or choose a zip.")
    return [(open_image(path, PurePath(path).name), label.strip()) for path in paths]


def read_zip(path):
    """Images of all classes; the folder of an image is its class."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
            images = [(open_image(archive.open(name), name), PurePath(name).parent.name) for name in names]
    except zipfile.BadZipFile as error:
        raise RefusedError(f"{PurePath(path).name} is no zip.") from error
    if not images or not all(label for _, label in images):
        raise RefusedError("The zip must hold images in one folder for each class, such as cat/1.png.")
    return images


def split(images):
    """Names of the classes, and which images train and which test: every fourth of a class."""
    names, seen, test = sorted({label for _, label in images}), {}, []
    for index, (_, label) in enumerate(images):
        seen[label] = seen.get(label, 0) + 1
        test += [index] if seen[label] % 4 == 2 else []
    if len(names) < 2:
        raise RefusedError(f"Two classes are needed to tell apart, got {names[0] if names else 'no images'}.")
    if few := [name for name in names if seen[name] < 2]:
        raise RefusedError(f"{few[0]!r} needs at least two images: one to learn from, one to test with.")
    return names, [index for index in range(len(images)) if index not in set(test)], test
