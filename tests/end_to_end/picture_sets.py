"""Four small sets of real pictures, from packages at hand without a network: `python -m tests.end_to_end.picture_sets DIR`.

docs/benchmarks/init.md tries the defaults of `vggrow init` on them. The files are the same at every run.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CELLS = 400          # of the 2,223 with certain labels
TILE = 32            # pixels


def cells(folder: Path) -> None:
    """Solar cells (elpv-dataset, CC BY-NC-SA 4.0), 300 x 300, every fifth or so of those with certain labels; 2 classes.

    The cells come from 44 modules, in file order; a random split has cells of one module on both sides.
    """
    spec = importlib.util.find_spec("elpv_dataset")
    assert spec is not None and spec.origin is not None, "pip install 'vggrow[demo]'"
    data = Path(spec.origin).parent / "data"
    lines = [line.split() for line in (data / "labels.csv").read_text(encoding="utf-8").splitlines()]
    certain = [(path, float(probability)) for path, probability, _ in lines if float(probability) in (0.0, 1.0)]
    for place in np.linspace(0, len(certain) - 1, CELLS).round().astype(int):
        path, probability = certain[place]
        home = folder / ("defective" if probability else "functional")
        home.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / path, home / Path(path).name)


def digits(folder: Path) -> None:
    """1,797 handwritten digits of 8 x 8 pixels, 16 levels of grey (scikit-learn, from UCI's optdigits); 10 classes.

    Thirteen people wrote them and the file does not say who; a random split has each of them on both sides.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    for place, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        save(pixels * 255 / 16, folder / str(label) / f"{place:04}.png")


def textures(folder: Path) -> None:
    """Tiles of 32 x 32 pixels of three photographs, brick, grass and gravel (scikit-image, CC0); 3 classes.

    One photograph a class. Tiles do not overlap, and a column of tiles between train and val is left out; still all splits
    are of one photograph, so the figures say nothing of other bricks.
    """
    from skimage import data

    for label in ("brick", "grass", "gravel"):
        photograph = getattr(data, label)()
        for column in range(photograph.shape[1] // TILE):
            split = "train" if column < 9 else "" if column == 9 else "val" if column < 13 else "test"
            for row in range(photograph.shape[0] // TILE if split else 0):
                tile = photograph[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
                save(tile, folder / split / label / f"{row:02}_{column:02}.png")


def faces(folder: Path) -> None:
    """100 faces and 100 patches without a face, 25 x 25 pixels, grey (scikit-image's lfw_subset); 2 classes.

    From Labeled Faces in the Wild; whether a person stands there twice is not known.
    """
    from skimage import data

    for place, pixels in enumerate(data.lfw_subset()):
        save(pixels * 255, folder / ("face" if place < 100 else "other") / f"{place:03}.png")


SETS = {"cells": cells, "digits": digits, "textures": textures, "faces": faces}


def save(pixels: NDArray[np.generic], path: Path) -> None:
    """Grey pixels (h, w) of 0..255 as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels).round().clip(0, 255).astype(np.uint8)).save(path)


if __name__ == "__main__":
    for name, make in SETS.items():
        make(Path(sys.argv[1]) / name)
