"""The images of the benchmarks, ready without any data hub.

By default they are Fashion-MNIST; any folder of images or hub id can be named instead.
"""

import gzip
import importlib.util
import os
import random
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm

SHIPPED_IMAGES = Path(__file__).resolve().parent / "data" / "fashion_mnist"
SYSTEM_IMAGES = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts the full set
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


class ImageSet(Dataset[dict[str, Any]]):
    """Labelled images, kept as bytes and resized and normalised when they are read.

    Args:
        images: uint8 tensor, (N, 1 or 3, H, W).
        labels: int64 tensor, (N,).
        image_size: Height and width of the images given out.
        classes: Names of the classes, in label order.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, image_size: int, classes: Sequence[str]) -> None:
        """Keeps the images as they are."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 (N, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
        self.images, self.labels = images, labels
        self.image_size, self.classes = image_size, list(classes)
        self._mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD).view(3, 1, 1)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns ``{"pixel_values": float32 (3, S, S), "labels": int}``."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns several items at once, which is how a ``DataLoader`` asks for a batch."""
        index = torch.as_tensor(indices)
        pixels = self.images[index].float() / 255
        size = (self.image_size, self.image_size)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        pixels = (pixels - self._mean) / self._std  # a grey image becomes three channels here
        return [
            {"pixel_values": image, "labels": label}
            for image, label in zip(pixels.unbind(), self.labels[index].tolist(), strict=True)
        ]


def part(images: ImageSet, start: int, stop: int) -> ImageSet:
    """Returns images ``start`` to ``stop`` - 1."""
    return ImageSet(images.images[start:stop], images.labels[start:stop], images.image_size, images.classes)


def load_images(
    dataset: str | None = None, train: int = 6000, test: int = 2000, image_size: int = 56
) -> tuple[ImageSet, ImageSet]:
    """Loads training and test images.

    Fashion-MNIST, the default, gives its FIRST ``train`` and ``test`` images, in file order. The repository holds the
    first 6,000 and 2,000; more needs the full set, in the folder ``$WASI_FASHION_MNIST`` or where Debian's package
    ``dataset-fashion-mnist`` installs it. Other data give as many images as they have, up to these counts, in an order
    shuffled with a fixed seed; those without test images give a fifth of their images for it.

    Args:
        dataset: None for Fashion-MNIST; a local folder ``<class>/*.png``, optionally under ``train/`` and ``test/``;
            or the hub id of an image-classification dataset (needs the package ``datasets``).
        train: Training images.
        test: Test images.
        image_size: Height and width in pixels, reached by bilinear resizing.

    Returns:
        Training and test images; ``.classes`` holds the names of the classes.

    Raises:
        ValueError: If there are fewer Fashion-MNIST images than asked for, or if no images are found.
        ModuleNotFoundError: If a hub id is given and ``datasets`` is not installed.
    """
    if train < 1 or test < 1:
        raise ValueError(f"train and test must be at least 1, got {train} and {test}")
    if dataset is None:
        return _fashion_mnist("train", train, image_size), _fashion_mnist("t10k", test, image_size)
    if Path(dataset).is_dir():
        return _image_folder(Path(dataset), train, test, image_size)
    return _hub_dataset(dataset, train, test, image_size)


def fashion_mnist_folder() -> Path:
    """Returns the folder of the Fashion-MNIST files in use: the full set if it is there, else the shipped subset."""
    chosen = os.environ.get("WASI_FASHION_MNIST")
    if chosen and not (Path(chosen) / "train-images-idx3-ubyte.gz").is_file():
        raise FileNotFoundError(f"WASI_FASHION_MNIST must hold train-images-idx3-ubyte.gz, got {chosen!r}")
    if chosen:
        return Path(chosen)
    return SYSTEM_IMAGES if (SYSTEM_IMAGES / "train-images-idx3-ubyte.gz").is_file() else SHIPPED_IMAGES


def read_idx(path: Path, count: int) -> np.ndarray:
    """Reads the first ``count`` items of a gzipped IDX file of unsigned bytes.

    Raises:
        ValueError: If it is not such a file, or if it holds fewer items.
    """
    with gzip.open(path, "rb") as stream:
        zero, kind, ndim = struct.unpack(">HBB", stream.read(4))
        if zero != 0 or kind != 8:
            raise ValueError(f"{path.name} must be an IDX file of unsigned bytes, got type {kind}")
        total, *shape = struct.unpack(f">{ndim}I", stream.read(4 * ndim))
        if count > total:
            raise ValueError(
                f"{path.name} holds {total:,} items, {count:,} were asked for; the full Fashion-MNIST can be put in "
                "the folder that WASI_FASHION_MNIST names"
            )
        values = stream.read(count * int(np.prod(shape, initial=1)))
    return np.frombuffer(values, dtype=np.uint8).reshape(count, *shape).copy()


def _fashion_mnist(split: str, count: int, image_size: int) -> ImageSet:
    folder = fashion_mnist_folder()
    images = torch.from_numpy(read_idx(folder / f"{split}-images-idx3-ubyte.gz", count)).unsqueeze(1)
    labels = torch.from_numpy(read_idx(folder / f"{split}-labels-idx1-ubyte.gz", count)).long()
    return ImageSet(images, labels, image_size, FASHION_CLASSES)


def _image_folder(root: Path, train: int, test: int, image_size: int) -> tuple[ImageSet, ImageSet]:
    split = (root / "train").is_dir()
    first = root / "train" if split else root
    classes = sorted(folder.name for folder in first.iterdir() if folder.is_dir())
    pool = _labelled_files(first, classes)
    if split:
        second = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
        if second is None:
            raise ValueError(f"{root} has a folder train but none of test, val, validation")
        held_out = _labelled_files(second, classes)
    else:
        cut = max(1, len(pool) // 5)
        held_out, pool = pool[:cut], pool[cut:]
    if not pool or not held_out:
        raise ValueError(f"{root} must hold images as <class>/*.png, got {len(pool)} and {len(held_out)} images")
    pool, held_out = pool[:train], held_out[:test]
    return (
        _open_images(pool, len(pool), image_size, classes),
        _open_images(held_out, len(held_out), image_size, classes),
    )


def _labelled_files(root: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """Lists (file, label) below ``root/<class>/``, in an order that is mixed but always the same."""
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    random.Random(0).shuffle(files)
    return files


def _open_images(items: Iterable[tuple[Any, int]], count: int, image_size: int, classes: Sequence[str]) -> ImageSet:
    """Stacks images given as files or PIL images, resized one by one so that no two are held at full size."""
    from PIL import Image

    images = torch.empty(count, 3, image_size, image_size, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.long)
    for position, (item, label) in enumerate(tqdm(items, desc="Reading images", total=count)):
        with Image.open(item) if isinstance(item, Path) else item as image:
            small = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
        images[position] = torch.from_numpy(np.array(small)).permute(2, 0, 1)
        labels[position] = label
    return ImageSet(images, labels, image_size, classes)


def _hub_dataset(name: str, train: int, test: int, image_size: int) -> tuple[ImageSet, ImageSet]:
    if importlib.util.find_spec("datasets") is None:
        raise ModuleNotFoundError(
            f"{name!r} is no local folder, and a hub dataset needs the package datasets: pip install datasets"
        )
    import datasets

    parts = datasets.load_dataset(name)
    features = next(iter(parts.values())).features
    image_key = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label_key = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image_key is None or label_key is None:
        raise ValueError(f"{name!r} must have an Image and a ClassLabel column, got {dict(features)}")
    held_out = next((key for key in ("test", "validation", "valid") if key in parts), None)
    first = parts["train"].shuffle(seed=0)
    if held_out is None:
        both = first.train_test_split(test_size=0.2, shuffle=False)
        first, second = both["train"], both["test"]
    else:
        second = parts[held_out].shuffle(seed=0)
    sets = []
    for part, count in ((first, train), (second, test)):
        rows = part.select(range(min(count, len(part))))
        items = ((row[image_key], row[label_key]) for row in rows)
        sets.append(_open_images(items, len(rows), image_size, features[label_key].names))
    return sets[0], sets[1]
