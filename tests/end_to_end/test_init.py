"""From a folder of pictures to a trained model by `vggrow init` and `vggrow train`; one that learnt nothing is called that."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from tests.end_to_end.command import vggrow


def noise(folder: Path) -> Path:
    """Two classes of 30 pictures each that nothing tells apart."""
    draws = np.random.default_rng(3)
    for label in ("heads", "tails"):
        (folder / label).mkdir(parents=True)
        for number in range(30):
            Image.fromarray(draws.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / label / f"{number:02}.png")
    return folder


def test_init_and_train_run_at_once_and_a_guess_is_called_one(tmp_path):
    noise(tmp_path / "coins")

    begun = vggrow("init", "coins", cwd=tmp_path)
    recipe = tmp_path / "coins.toml"
    recipe.write_text(re.sub(r"(warmup_epochs|max_epochs) = \d+", shorter, recipe.read_text()))      # as a user may edit it
    done = vggrow("train", "coins.toml", cwd=tmp_path)

    assert begun.returncode == 0 and begun.stdout.endswith("vggrow train coins.toml --yardsticks\n"), begun.stderr
    assert done.returncode == 0, done.stderr
    last, before = done.stdout.strip().splitlines()[-1], done.stdout.strip().splitlines()[-2]
    assert "is not shown to be better than chance: balanced accuracy" in before and "chance is 50.0 %" in before
    assert last.startswith("try: ") and last.endswith("init coins --from weights:keras/vgg16_notop --out NEW.toml")


def shorter(found: re.Match[str]) -> str:
    """Three epochs, one of them to warm up."""
    return f"{found[1]} = {1 if found[1] == 'warmup_epochs' else 3}"
