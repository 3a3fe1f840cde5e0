"""Folders of real colour JPEGs for tests: crops of photographs that scikit-learn and scikit-image bring along."""

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images


def photographs() -> dict[str, Image.Image]:
    """One photograph a class, 300 to 430 px high: a cat, a cup of coffee and a flower."""
    _china, flower = load_sample_images().images
    return {
        name: Image.fromarray(pixels)
        for name, pixels in (("cat", data.chelsea()), ("coffee", data.coffee()), ("flower", flower))
    }


def make_photo_folder(
    folder: Path, *, per_class: int, split: bool = False, size: tuple[int, int] = (72, 120), seed: int = 0
) -> Path:
    """Fills `folder` with JPEGs in class folders cat/ coffee/ flower/, and returns it; the same files for the same seed.

    per_class: pictures in each class; with `split`, in train/, and a quarter of it, 2 at least, in val/ and in test/ each.
    size: the shorter side is drawn from [low, high] pixels, the longer is 1 to 1.5 times as long, upright or lying.
    """
    draws = np.random.default_rng(seed)
    few = max(2, per_class // 4)
    counts = {"train/": per_class, "val/": few, "test/": few} if split else {"": per_class}
    for name, photograph in photographs().items():
        for before, count in counts.items():
            place = folder / f"{before}{name}"
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                shorter = int(draws.integers(size[0], size[1] + 1))
                longer = int(shorter * draws.uniform(1.0, 1.5))
                width, height = (shorter, longer) if number % 2 else (longer, shorter)
                zoom = draws.uniform(1.0, 2.0) * min(1.0, 140 / shorter)  # photograph pixels a crop's pixel covers
                zoom = min(zoom, photograph.width / width, photograph.height / height)
                left = draws.uniform(0, photograph.width - width * zoom)
                top = draws.uniform(0, photograph.height - height * zoom)
                box = (left, top, left + width * zoom, top + height * zoom)
                crop = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
                crop.save(place / f"{name}-{number:03d}.jpg", quality=90)
    return folder
