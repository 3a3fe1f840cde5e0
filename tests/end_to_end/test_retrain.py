"""The tick on the real command: killed anywhere it ends as an undisturbed one; bad data stop it; each decision is told once."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deploy.ticks import STEPS, Tick, Ticks
from tests.deploy.webhook_receiver import Receiver
from tests.end_to_end.command import Running, vggrow, wait_until
from tests.end_to_end.conftest import RECIPE
from tests.pipelines.photo_folders import make_photo_folder
from training.store import Store

PIPELINE = """
name = "weekly"
recipe = "photos.toml"
[gate]                 # one use, and a lenient one: 15 gate pictures could not show a gain otherwise
alpha = 0.5
planned_uses = 1
max_class_drop = 1.0
[run]
store = "store"
[notify]
url = "{url}"
"""
ENVIRONMENT = {"VGGROW_WEBHOOK_SECRET": "a secret of the test"}


@dataclass
class Pipeline:
    """A pipeline on photos of its own, with its store and its webhook's receiver."""

    folder: Path
    receiver: Receiver
    recipes: int = 0

    @property
    def file(self) -> Path:
        return self.folder / "pipeline.toml"

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder / 'store' / 'mlflow.db'}")

    def write_recipe(self, *, epochs: int = 2) -> None:
        """Another seed each time, so that there is something to train."""
        text = RECIPE.format(root=self.photos, epochs=epochs, every="5min")
        (self.folder / "photos.toml").write_text(text.replace("seed = 3", f"seed = {3 + self.recipes}"))
        self.recipes += 1

    def retrain(self, *more: str):
        return vggrow("retrain", self.file, *more, **ENVIRONMENT)

    def ticks(self) -> list[Tick]:
        return Ticks.of(Store(self.folder / "store"), "weekly").all()

    def versions(self) -> int:
        return len(self.client.search_model_versions("name = 'photos'"))

    def champion(self) -> str:
        return str(self.client.get_registered_model("photos").aliases["champion"])

    def decisions(self) -> list[dict]:
        """What the registry's own record says was decided."""
        path = self.folder / "store" / "registry" / "photos" / "history.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def told(self) -> list[str]:
        """The ids of the messages that the receiver took; one id may come more than once."""
        return [post.headers["X-Vggrow-Event"] for post in self.receiver.taken]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Iterator[Pipeline]:
    """One tick is done: version 1 is the champion, and the receiver failed at the first attempt."""
    folder = tmp_path_factory.mktemp("retrain")
    make_photo_folder(folder / "photos", per_class=20, split=True, size=(48, 72))
    shutil.copytree(make_photo_folder(folder / "more", per_class=5, size=(48, 72), seed=1), folder / "photos" / "gate")
    with Receiver() as receiver, pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)                  # for Running, which takes the caller's
        found = Pipeline(folder, receiver)
        found.write_recipe()
        found.file.write_text(PIPELINE.format(url=receiver.url))
        receiver.answers = [503]
        done = found.retrain()
        assert done.returncode == 0, done.stderr
        yield found


def started(pipeline: Pipeline, tmp_path: Path) -> Running:
    return Running("retrain", pipeline.file, log=tmp_path / f"log-{time.monotonic_ns()}")


def kill_when(pipeline: Pipeline, tmp_path: Path, number: int, step: str) -> bool:
    """Starts the command and kills it as soon as the record of a step is there; whether it was still running then."""
    record = pipeline.folder / "store" / "retraining" / "weekly" / "ticks" / str(number) / f"{step}.json"
    running = started(pipeline, tmp_path)
    try:
        wait_until(lambda: record.exists() or running.process.poll() is not None, timeout_s=240)
        assert record.exists(), running.output()
        alive = running.process.poll() is None
    finally:
        running.kill_everything()
    return alive


def check_one_of_each(pipeline: Pipeline, before: "Counts", tick: Tick) -> None:
    """One finished tick more, one version, one decision, one message: whatever happened on the way."""
    ticks, versions, decisions, told = before
    assert tick.finished and set(tick.records) == set(STEPS)
    assert [one.number for one in pipeline.ticks()] == [*range(1, ticks + 2)]
    assert pipeline.versions() == versions + 1
    assert tick.records["register"]["version"] == str(versions + 1)
    (decision,) = pipeline.decisions()[decisions:]
    assert (decision["version"], decision["action"]) == (str(versions + 1), tick.outcome)
    assert tick.records["gate"]["decision"]["use"] is not None      # the gate was asked, with pictures
    champion = tick.records["decide"]["champion"]["version"]
    assert pipeline.champion() == (str(versions + 1) if tick.outcome == "promoted" else champion)
    assert set(pipeline.told()[told:]) == {tick.records["notify"]["event"]}
    bodies = {post.body for post in pipeline.receiver.taken[told:]}
    assert len(bodies) == 1                                          # a repeat says the same, to the last byte
    assert json.loads(bodies.pop())["outcome"] == tick.outcome


Counts = tuple[int, int, int, int]


def counts(pipeline: Pipeline) -> Counts:
    return len(pipeline.ticks()), pipeline.versions(), len(pipeline.decisions()), len(pipeline.told())


def test_the_first_tick_makes_a_champion_and_tells_it_once_though_the_receiver_failed_first(pipeline):
    tick = pipeline.ticks()[0]

    assert (tick.outcome, set(tick.records)) == ("promoted", set(STEPS))
    statuses = [json.loads(post.body)["outcome"] for post in pipeline.receiver.seen[:2]]
    assert statuses == ["promoted", "promoted"]
    assert pipeline.told()[0] == tick.records["notify"]["event"]
    assert pipeline.told().count(tick.records["notify"]["event"]) == 1


def test_nothing_new_is_said_recorded_and_told_to_nobody(pipeline):
    before = counts(pipeline)

    done = pipeline.retrain("--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outcome"] == "nothing new"
    assert counts(pipeline) == (before[0] + 1, *before[1:])
    assert set(pipeline.ticks()[-1].records) == {"scan", "decide", "notify"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_tick_killed_at_every_step_ends_as_an_undisturbed_one(pipeline, tmp_path):
    pipeline.write_recipe(epochs=12)
    before = counts(pipeline)
    number = before[0] + 1

    alive = [kill_when(pipeline, tmp_path, number, step) for step in STEPS]
    done = pipeline.retrain("--json") if not pipeline.ticks()[-1].finished else None

    assert done is None or done.returncode == 0
    assert alive[:-1] == [True] * 7          # each kill but the last, after which there is nothing left, met a living command
    tick = pipeline.ticks()[-1]
    assert tick.number == number
    check_one_of_each(pipeline, before, tick)


def kill_at_random(pipeline: Pipeline, tmp_path: Path, moments: int, epochs: int) -> None:
    """Kills the command at random moments after its start until there were so many, then lets it end."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed of the moments: {seed}")
    draws = random.Random(seed)
    pipeline.write_recipe(epochs=epochs)
    before, longest = counts(pipeline), 20.0
    left = moments
    while left:
        running, began = started(pipeline, tmp_path), time.monotonic()
        wait_s = draws.uniform(2.0, longest)
        try:
            while time.monotonic() - began < wait_s and running.process.poll() is None:
                time.sleep(0.01)
        finally:
            running.kill_everything()
        left -= 1
        ticks = pipeline.ticks()
        if len(ticks) > before[0] and ticks[-1].finished and left:      # it is whole, though perhaps its command is not
            check_one_of_each(pipeline, before, pipeline.ticks()[-1])
            pipeline.write_recipe(epochs=epochs)
            before = counts(pipeline)

    ticks = pipeline.ticks()
    if len(ticks) == before[0] or not ticks[-1].finished:
        done = pipeline.retrain()
        assert done.returncode == 0, done.stderr
    check_one_of_each(pipeline, before, pipeline.ticks()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_tick_killed_at_random_moments_ends_as_an_undisturbed_one(pipeline, tmp_path):
    kill_at_random(pipeline, tmp_path, moments=3, epochs=8)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ticks_killed_at_thirty_random_moments_end_as_undisturbed_ones(pipeline, tmp_path):
    kill_at_random(pipeline, tmp_path, moments=30, epochs=8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_signal_stops_a_tick_cleanly_and_a_changed_recipe_takes_its_place(pipeline, tmp_path):
    pipeline.write_recipe(epochs=500)
    before = counts(pipeline)
    stages = pipeline.folder / "store" / "stages"
    known = set(stages.iterdir())
    running = started(pipeline, tmp_path)
    try:
        wait_until(lambda: any((new / "history.jsonl").exists() for new in set(stages.iterdir()) - known),
                   timeout_s=120, running=running)  # fmt: skip
        running.send(signal.SIGTERM)
        code = running.wait(60)
    finally:
        running.kill_everything()
    stopped = pipeline.ticks()[-1]
    pipeline.write_recipe()

    done = pipeline.retrain("--dry-run")
    again = pipeline.retrain()

    assert code == 130 and "the same command goes on" in running.output() and "Traceback" not in running.output()
    assert stopped.outcome == "unfinished: train"
    assert done.returncode == 0 and f"tick {stopped.number}: would train" in done.stdout
    assert again.returncode == 0, again.stderr
    superseded, finished = pipeline.ticks()[-2:]
    assert (superseded.outcome, superseded.reason) == (
        "superseded", "the recipe or the gate rules changed before anything was registered"
    )  # fmt: skip
    assert pipeline.versions() == before[1] + 1
    assert pipeline.told()[before[3] :] == [finished.records["notify"]["event"]]


@pytest.fixture
def warm(pipeline, tmp_path) -> Iterator[Pipeline]:
    """The pipeline starts from its champion, and two pictures more have come."""
    text = pipeline.file.read_text()
    pipeline.file.write_text(text.replace("[run]", '[start]\nwarm = "champion"\n[run]'))
    new = [
        Path(shutil.copy(path, pipeline.photos / "train" / "cat" / f"new-{path.name}"))
        for path in (make_photo_folder(tmp_path / "more", per_class=2, size=(48, 72), seed=9) / "cat").iterdir()
    ]
    yield pipeline
    pipeline.file.write_text(text)
    for path in new:
        path.unlink()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_warm_tick_trains_one_stage_from_the_champion_and_has_it_for_an_ancestor(warm):
    before, champion = counts(warm), warm.champion()
    store = warm.folder / "store"
    parent = warm.client.get_model_version("photos", champion).tags["vggrow.stage_key"]

    done = warm.retrain()

    assert done.returncode == 0, done.stderr
    assert f"start: stage A-36 from version {champion}, the champion" in done.stdout
    tick = warm.ticks()[-1]
    check_one_of_each(warm, before, tick)
    key = tick.records["register"]["stage_key"]
    about = json.loads((store / "stages" / key / "stage.json").read_text())
    assert (about["name"], about["parent"]["key"], about["stage"]["learning_rate"]) == ("A-36-warm", parent, 1e-4)
    assert json.loads(warm.retrain("--json").stdout)["outcome"] == "nothing new"
    kept = store / "schedules" / tick.records["register"]["schedule_key"] / "recipe.toml"
    plan = vggrow("plan", kept, "--store", store, "--json")
    assert [stage["key"] for stage in json.loads(plan.stdout)["stages"]] == [key]      # the kept recipe says it all


@pytest.fixture
def broken_delivery(pipeline) -> Iterator[Path]:
    """A class folder is gone, and one of its pictures stands in another class."""
    away = pipeline.folder / "away"
    away.mkdir()
    copy = pipeline.photos / "train" / "cat" / "was-flower.jpg"
    shutil.copy(pipeline.photos / "train" / "flower" / "flower-003.jpg", copy)
    for split in ("train", "val", "test", "gate"):
        (pipeline.photos / split / "coffee").rename(away / split)
    yield copy
    for split in ("train", "val", "test", "gate"):
        (away / split).rename(pipeline.photos / split / "coffee")
    copy.unlink()
    away.rmdir()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_data_that_got_worse_stop_before_training_and_are_told_once(pipeline, broken_delivery):
    before = counts(pipeline)

    rehearsed = pipeline.retrain("--dry-run")
    first, second = pipeline.retrain(), pipeline.retrain()

    assert counts(pipeline)[0] == before[0] + 2          # the rehearsal left no record
    for done in (rehearsed, first, second):
        assert done.returncode == 2 and done.stdout == ""
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "before training: class 'coffee' is gone" in line
        assert "the same picture in two classes: 'train/cat/was-flower.jpg' and 'train/flower/flower-003.jpg'" in line
    assert [tick.outcome for tick in pipeline.ticks()[-2:]] == ["stopped", "stopped"]
    assert counts(pipeline)[1:3] == before[1:3]          # no version, no decision
    (body,) = [json.loads(post.body) for post in pipeline.receiver.taken[before[3] :]]
    assert (body["outcome"], body["tick"]) == ("stopped", before[0] + 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_history_lists_every_tick_and_its_page_stands_alone(pipeline, tmp_path):
    page = tmp_path / "history.html"

    done = vggrow("history", pipeline.file, "--out", page)

    assert done.returncode == 0, done.stderr
    ticks = pipeline.ticks()
    for line, tick in zip(done.stdout.splitlines()[1:], ticks, strict=False):
        assert line.split()[0] == str(tick.number) and tick.outcome in line
    html = page.read_text()
    assert "The champion over time" in html and "<script" not in html and "http://" not in html and "https://" not in html
    assert all(f'<th scope="row">{tick.number}</th>' in html for tick in ticks)


def test_an_empty_reason_and_workers_that_cannot_be_start_no_tick(pipeline):
    before = counts(pipeline)
    right = pipeline.file.read_text()

    empty = pipeline.retrain("--accept", "")
    pipeline.file.write_text(right.replace("[run]", '[run]\nworkers = "1:2"'))
    elastic = pipeline.retrain()
    pipeline.file.write_text(right)

    assert empty.returncode == 2 and "--accept needs a REASON" in empty.stderr
    assert elastic.returncode == 2 and "[run] workers 1:2" in elastic.stderr and "Traceback" not in elastic.stderr
    assert counts(pipeline) == before


def test_a_webhook_without_its_secret_and_a_mistake_in_the_recipe_start_no_tick(pipeline):
    before = counts(pipeline)
    recipe = pipeline.folder / "photos.toml"
    right = recipe.read_text()

    unsigned = vggrow("retrain", pipeline.file, **ENVIRONMENT | {"VGGROW_WEBHOOK_SECRET": ""})
    recipe.write_text(right.replace("patience", "patiense"))
    mistaken = pipeline.retrain()
    recipe.write_text(right)

    assert unsigned.returncode == 2 and "VGGROW_WEBHOOK_SECRET is not set" in unsigned.stderr
    assert mistaken.returncode == 2 and "did you mean 'patience'?" in mistaken.stderr
    assert counts(pipeline) == before
