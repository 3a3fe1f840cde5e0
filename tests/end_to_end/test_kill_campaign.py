"""A schedule that is killed again and again, anywhere, ends with the weights, history and runs of an undisturbed one."""

import json
import os

import pytest

from tests.end_to_end.campaign_figure import write_figure
from tests.end_to_end.kill_campaign import campaign

KILLS = 10      # at each number of workers: 20 in all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


@pytest.mark.parametrize("workers", [2, 3])
def test_a_schedule_killed_again_and_again_ends_as_if_nobody_had_disturbed_it(workers, photos, tmp_path):
    seed = int.from_bytes(os.urandom(3), "little")
    print(f"seed of the kills: {seed}")

    found = campaign(photos, tmp_path / "campaign", workers=workers, kills=KILLS, seed=seed)

    record = found.record()
    (tmp_path / "kill-campaign.json").write_text(json.dumps([record], indent=1))
    write_figure([record], tmp_path / "kill-campaign.svg")
    assert len(found.kills) == KILLS and {kill.kind for kill in found.kills} == {"driver", "both", "worker"}
    assert [run.differs for run in found.runs] == [()] * len(found.runs)
    assert any(kill.resumed_from for kill in found.kills)      # some hit training
