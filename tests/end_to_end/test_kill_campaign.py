"""A schedule that is killed again and again, anywhere, ends with the weights, history and runs of an undisturbed one."""

import os

import pytest

from tests.end_to_end.kill_campaign import campaign, write_record

KILLS = 10      # at each number of workers: 20 in all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


@pytest.mark.parametrize("workers", [2, 3])
def test_a_schedule_killed_again_and_again_ends_as_if_nobody_had_disturbed_it(workers, photos, tmp_path):
    seed = int.from_bytes(os.urandom(3), "little")
    print(f"seed of the kills: {seed}")

    found = campaign(
        photos,
        tmp_path / "campaign",
        workers=workers,
        kills=KILLS,
        seed=seed,
        keep=lambda so_far: write_record([so_far], tmp_path),
    )

    assert len(found.kills) == KILLS and {kill.kind for kill in found.kills} == {"driver", "both", "worker"}
    assert [run.differs for run in found.runs] == [()] * len(found.runs)
    assert any(kill.resumed_from for kill in found.kills)      # some hit training
