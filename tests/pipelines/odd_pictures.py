"""Odd picture files for tests, made through Pillow, each with what a scan should say of it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64
TALL, WIDE = (WIDTH, HEIGHT), (HEIGHT, WIDTH)  # (height, width) turned by a quarter, and as made


def blocks(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture of 8x8 blocks of random colours, (height, width, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3))
    return np.kron(coarse, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)


def write_blocks(folder: Path, count: int, *, first_seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> None:
    """`count` different small PNG pictures in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first_seed, first_seed + count):
        Image.fromarray(blocks(seed, height, width)).save(folder / f"{seed:05d}.png", compress_level=1)


def write_class_folders(root: Path, counts: dict[str, int], **sides: int) -> Path:
    """PNG pictures, all different, in the folders that `counts` names ("cat", "train/cat"); returns root."""
    for number, (name, count) in enumerate(counts.items()):
        write_blocks(root / name, count, first_seed=10_000 * number, **sides)
    return root


def sixteen_bits() -> np.ndarray:
    """A 16-bit grey ramp, (HEIGHT, WIDTH) uint16, that reaches from 0 to 65,535."""
    return np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)


def write_good_pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Odd files that are pictures all the same; (height, width) with EXIF applied, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    picture, sizes = Image.fromarray(blocks(1)), {}

    def save(name: str, image: Image.Image, size: tuple[int, int] = WIDE, **how: Any) -> None:
        image.save(folder / name, **how)
        sizes[name] = size

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(f"exif-{orientation}.jpg", picture, TALL if orientation >= 5 else WIDE, exif=exif)
    see_through = picture.convert("RGBA")
    see_through.putalpha(7)
    save("alpha.png", see_through)
    save("sixteen-bits.png", Image.fromarray(sixteen_bits()))
    save("cmyk.jpg", picture.convert("CMYK"))
    save("grey.jpg", picture.convert("L"))
    save("progressive.jpg", picture, progressive=True)
    save("palette.png", picture.convert("P"))
    save("really-a-png.jpg", picture, format="PNG")
    save("CAPITALS.JPG", picture, format="JPEG")
    save("one-pixel.png", picture.resize((1, 1)), (1, 1))
    save("one-pixel.jpg", picture.resize((1, 1)), (1, 1))
    save("picture.webp", picture)
    save("picture.bmp", picture)
    save("picture.tiff", picture)
    save('two\nlines, "quoted".png', picture)
    save("smörgåsbord ☕.png", picture)
    return sizes


def write_bad_pictures(folder: Path) -> dict[str, str]:
    """Files with a picture's name that cannot be used; words of the reason by name."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(blocks(2))
    picture.save(folder / "whole.jpg")
    jpeg = (folder / "whole.jpg").read_bytes()
    picture.save(folder / "whole.jpg", progressive=True)
    progressive = (folder / "whole.jpg").read_bytes()
    picture.save(folder / "whole.jpg", format="PNG")
    png = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()

    (folder / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "without-its-last-bytes.jpg").write_bytes(jpeg[:-10])
    (folder / "head-alone.jpg").write_bytes(jpeg[:100])
    (folder / "half-progressive.jpg").write_bytes(progressive[: len(progressive) // 2])
    (folder / "half.png").write_bytes(png[: len(png) // 2])
    (folder / "zero-bytes.jpg").touch()
    (folder / "page.png").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    (folder / "noise.png").write_bytes(np.random.default_rng(3).bytes(500))
    picture.save(folder / "animation.jpg", format="GIF")
    (folder / "leads-nowhere.jpg").symlink_to(folder / "absent.jpg")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(png)
    return {
        "half.jpg": "truncated",
        "without-its-last-bytes.jpg": "truncated",
        "head-alone.jpg": "truncated",
        "half-progressive.jpg": "truncated",
        "half.png": "truncated",
        "zero-bytes.jpg": "0 bytes",
        "page.png": "web page",
        "noise.png": "not a picture that DALI decodes",
        "animation.jpg": "GIF",
        "leads-nowhere.jpg": "not there",
        "caf\\xe9.png": "not UTF-8",
    }


def truncate(folder: Path, names: Sequence[str]) -> None:
    """Cuts the files to half their length."""
    for name in names:
        path = folder / name
        os.truncate(path, path.stat().st_size // 2)
