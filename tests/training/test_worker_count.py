"""How many workers: a number or a range, as it is written and as it is used."""

import pytest

from deploy.options import WorkerRange
from training.store import Store
from training.where import Where, check_where, threads_for
from training.worker_count import most, read_workers, workers_text
from vggcore.errors import RecipeError
from vggcore.recipe import parse_recipe
from vggcore.schedule import resolve_stages

RECIPE = """
name = "few"
[data]
root = "/pictures"
[train]
global_batch = 4
[[stage]]
name = "A-256"
net = "A"
scale = 256
"""


@pytest.fixture
def stages(tmp_path):
    """One stage whose global batch has 4 pictures."""
    return resolve_stages(parse_recipe(RECIPE, place="few.toml", folder=tmp_path))


def test_a_number_and_a_range_are_read_as_they_are_written():
    for text, workers, highest in (("4", 4, 4), ("1:3", (1, 3), 3)):
        assert read_workers(text) == workers
        assert most(workers) == highest
        assert workers_text(workers) == text
        assert WorkerRange().convert(text, None, None) == workers


@pytest.mark.parametrize("text", ["0", "0:2", "3:1", "2:2", "1:", ":2", "1-2", "two", "-1", "", "1:2:3"])
def test_what_is_neither_is_named(text):
    with pytest.raises(ValueError, match="wanted a number of at least 1, or MIN:MAX"):
        read_workers(text)


def test_the_cores_are_shared_by_the_most_workers(monkeypatch):
    monkeypatch.setattr("training.where.cores", lambda: 8)

    assert [threads_for(workers) for workers in (1, 3, (1, 4), 16)] == [8, 2, 2, 1]


def test_a_range_on_one_machine_and_more_workers_than_pictures_are_refused_before_anything_starts(
    tmp_path, stages, monkeypatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address in (None, "local"):
        with pytest.raises(RecipeError, match=r"--workers 1:2: on one machine .* name that number, or a cluster by --address"):
            check_where(Where(Store(tmp_path), workers=(1, 2), address=address), stages)
    with pytest.raises(RecipeError, match="--workers 1:5 is more than global_batch 4"):
        check_where(Where(Store(tmp_path), workers=(1, 5), address="auto"), stages)

    check_where(Where(Store(tmp_path), workers=(1, 4), address="auto"), stages)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    check_where(Where(Store(tmp_path), workers=(1, 4)), stages)
