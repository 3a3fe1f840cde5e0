"""One small schedule trained by the real command, shared by the tests that only look at its result."""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.command import vggrow
from tests.end_to_end.conftest import RECIPE

CHILD = '[[stage]]\nname = "B-36"\nnet = "B"\nscale = 36\ninit_from = "A-36"\n'


@dataclass(frozen=True)
class Trained:
    """A recipe, its store, and what `plan` said before and `train` at its end."""

    recipe: Path
    store: Path
    plan_before: str
    said: str       # train's stdout
    progress: str   # train's stderr


@functools.cache
def train_once(photos: Path) -> Trained:
    """A-36, then B-36 from it, two epochs each with one worker; trained at the first call of a session alone."""
    folder = Path(tempfile.mkdtemp(dir=photos.parent))
    recipe, store = folder / "photos.toml", folder / "store"
    recipe.write_text(RECIPE.format(root=photos, epochs=2, every="5min") + CHILD)
    plan = vggrow("plan", recipe, "--store", store, "--json")
    assert plan.returncode == 0, plan.stderr
    done = vggrow("train", recipe, "--store", store)
    assert done.returncode == 0, done.stderr
    return Trained(recipe=recipe, store=store, plan_before=plan.stdout, said=done.stdout, progress=done.stderr)
