"""`vggrow bench train` measures what it says, side by side, and keeps nothing but the decoded pictures."""

import json

import pytest

from tests.end_to_end.command import vggrow


@pytest.mark.slow
def test_the_four_figures_come_with_their_ratios_and_nothing_is_kept(make_recipe, tmp_path):
    recipe, store = make_recipe(), tmp_path / "store"

    done = vggrow("bench", "train", recipe, "--store", store, "--seconds", 0.2, "--turns", 1, "--json")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("limit", "bare", "plain", "ours", "ours_cached"):
        assert found[name] > 0
    assert found["ours_of_bare"] == pytest.approx(found["ours"] / found["bare"])
    assert found["ours_of_plain"] == pytest.approx(found["ours"] / found["plain"])
    assert 0 < found["bare_of_limit"] < 1
    assert {path.name for path in store.iterdir()} <= {"data", "locks"}


def test_a_stage_that_is_not_there_is_named(make_recipe, tmp_path):
    done = vggrow("bench", "train", make_recipe(), "--stage", "A-63", "--store", tmp_path / "store")

    assert done.returncode == 2 and "--stage A-63: no such stage" in done.stderr and "did you mean 'A-36'?" in done.stderr
