"""`make story`: each day comes out as it is told, by the records, the registry and the webhook; the page stands alone."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deploy.ticks import Tick, Ticks
from tests.end_to_end.command import environment
from training.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@dataclass
class Told:
    """A story that was told, and where."""

    folder: Path
    log: str

    @property
    def days(self) -> list[dict]:
        return json.loads((self.folder / "story.json").read_text())["days"]

    @property
    def page(self) -> str:
        return (self.folder / "story.html").read_text()

    @property
    def ticks(self) -> list[Tick]:
        return Ticks.of(Store(self.folder / "vggrow-store"), "week").all()

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder / 'vggrow-store' / 'mlflow.db'}")


def tell(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.story", str(folder)], capture_output=True, text=True, env=environment(), timeout=3000
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Told:
    """The whole week, told once."""
    folder = tmp_path_factory.mktemp("week") / "story"
    done = tell(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Told(folder, done.stdout)


def test_the_seven_days_come_out_as_they_are_told(told):
    outcomes = [day["outcome"] for day in told.days]

    assert [*outcomes[:5], outcomes[6]] == ["promoted", "nothing new", "promoted", "refused", "stopped", "rolled back"]
    assert outcomes[5] in ("promoted", "refused")       # what was caught up may be better or not; that it was one tick is day 6
    assert [tick.outcome for tick in told.ticks] == [*outcomes[:6], "nothing new"]
    assert [len(day["ticks"]) for day in told.days] == [1] * 7


def test_ticks_stand_on_the_storys_dates_and_the_missed_nights_were_caught_up_once(told):
    dates = [tick.began[:10] for tick in told.ticks]

    assert dates == [f"2026-03-0{day}" for day in (2, 3, 4, 5, 6, 8, 8)]     # Saturday has none, Sunday one by the timetable
    started, restarted, _ = told.days[5]["typed"]
    assert started["words"] == restarted["words"] == "vggrow timetable run pipeline.toml"
    assert (started["ended"], restarted["ended"]) == ("ended by SIGKILL", "ended by SIGTERM, exit 0")


def test_the_registry_has_a_version_a_training_and_the_rolled_back_champion(told):
    trained = [tick for tick in told.ticks if "register" in tick.records]
    versions = {version.version: version.tags for version in told.client.search_model_versions("name = 'cells'")}
    aliases = told.client.get_registered_model("cells").aliases
    caught_up = told.ticks[5].outcome

    assert sorted(map(str, versions)) == ["1", "2", "3", "4"]
    assert [tick.records["register"]["version"] for tick in trained] == ["1", "2", "3", "4"]
    assert str(aliases["champion"]) == ("2" if caught_up == "promoted" else "1")
    assert "previous" not in aliases


def test_day_threes_gain_was_shown_at_the_alpha_in_force_and_day_fours_was_not(told):
    better, worse = (told.ticks[number].records["gate"]["decision"] for number in (2, 3))

    assert better["alpha_k"] == worse["alpha_k"] == pytest.approx(0.05 / 52)
    assert better["p_value"] <= better["alpha_k"] < worse["p_value"]
    assert better["gain"] >= better["needed_gain"]
    assert sum(better["counts"].values()) == sum(worse["counts"].values()) == 500


def test_a_broken_delivery_ended_at_the_scan(told):
    stopped = told.ticks[4]

    assert set(stopped.records) == {"scan", "decide", "notify"}
    assert told.days[4]["typed"][0]["ended"] == "exit 2"
    assert "do not decode" in stopped.reason or "max_bad" in stopped.reason


def test_the_webhook_heard_of_each_decision_once_with_a_right_signature(told):
    messages = [message for day in told.days for message in day["messages"]]
    heard = [(message["verified"], message["body"]["tick"], message["body"]["outcome"]) for message in messages]

    assert heard == [(True, tick.number, tick.outcome) for tick in told.ticks if tick.outcome != "nothing new"]


class Addresses(HTMLParser):
    """What a browser would fetch for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster") and value]
        assert tag not in ("script", "iframe", "object", "embed", "base"), tag


def test_the_page_needs_nothing_from_elsewhere_and_has_all_seven_days(told):
    parser = Addresses()
    parser.feed(told.page)

    assert all(address.startswith(("#", "data:")) for address in parser.found), parser.found
    assert not re.search(r"url\(|@import", told.page)
    assert [f"day-{number}" in told.page for number in range(1, 8)] == [True] * 7
    assert told.page.count("data:image/png") == sum("gate" in tick.records for tick in told.ticks[1:])     # charts, no cell


def test_a_folder_that_no_story_made_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("dear to me")

    done = tell(tmp_path)

    assert done.returncode == 2
    assert str(tmp_path) in done.stderr and "no story's" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "mine.txt").read_text() == "dear to me"
