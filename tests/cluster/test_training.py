"""A schedule on three nodes ends where one machine ends, and goes on when a node is taken away, hangs, or the head dies."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from tests.cluster.cluster import Cluster, Node, processes
from tests.cluster.conftest import borrowed
from tests.cluster.test_jobs import LONG, Client, iterations_of, world_sizes
from tests.end_to_end.command import SIGINT, Running, vggrow, wait_until
from tests.end_to_end.conftest import RECIPE
from tests.end_to_end.test_resume import iterations, stage_folder
from tests.end_to_end.trained import CHILD
from tests.pipelines.photo_folders import make_photo_folder
from training.picture_log import pictures_that_count
from training.processes import ray_workers

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

WAIT_S = 900.0         # for what takes a minute on two idle cores
EPOCHS = 12            # of stage A
FEW_EPOCHS = 4         # beside one worker: after more, a ReLU that the last bit decides parts them (one-trajectory.md)
STAGES = {"A-36", "B-36", "D-36", "D-36-44"}
BATCHES = 7            # 60 pictures in batches of 9
LATER = f"""
{CHILD}
[[stage]]
name = "D-36"
net = "D"
scale = 36
init_from = "A-36"
[[stage]]
name = "D-36-44"
net = "D"
scale = [36, 44]
init_from = "D-36"
[evaluate]
stages = ["D-36-44"]
"""


@pytest.fixture(scope="module")
def spread() -> Iterator[Cluster]:
    """A head and two nodes, a CPU for a worker on each of the three."""
    with borrowed(Cluster(os.environ.get("VGGROW_CLUSTER", "vgc") + "t", "10.213.79", head_cpus=1)) as spread:
        yield spread


@pytest.fixture(scope="module")
def write(spread, tmp_path_factory) -> Callable[..., Path]:
    """Writes a recipe for photos that all nodes see: net A for some epochs, and perhaps more stages of two epochs."""
    photos = spread.shared / "photos"
    if not photos.exists():
        make_photo_folder(photos, per_class=20, split=True, size=(48, 72))

    def write(epochs: int, more: str = "") -> Path:
        path = tmp_path_factory.mktemp("recipe") / "photos.toml"
        text = RECIPE.format(root=photos, epochs=2 if more else epochs, every="5 iterations")
        path.write_text(text + (f"max_epochs = {epochs}\n{more}" if more else ""))
        return path

    return write


@pytest.fixture(scope="module")
def one_machine(write, tmp_path_factory) -> Path:
    """The store of the schedule trained by three workers of this machine, undisturbed."""
    store = tmp_path_factory.mktemp("one-machine") / "store"
    done = vggrow("train", write(EPOCHS, LATER), "--workers", 3, "--threads", 1, "--store", store, timeout_s=2 * WAIT_S)
    assert done.returncode == 0, done.stderr
    return store


def client_of(spread: Cluster, recipe: Path, name: str) -> Client:
    """A person with this recipe and a store of their own on the cluster."""
    return Client(spread, recipe, spread.shared / f"{name}-{time.time_ns() // 10**9}")


def results(store: Path) -> dict[str, tuple[Path, dict[str, float]]]:
    """The folder and result.json of each stage, by its name."""
    return {
        json.loads((path.parent / "stage.json").read_text())["name"]: (path.parent, json.loads(path.read_text()))
        for path in (store / "stages").glob("*/result.json")
    }


def weight_bytes(found: tuple[Path, dict[str, float]]) -> bytes:
    """The bytes of a stage's resulting weights."""
    return weight_file(found).read_bytes()


def weight_file(found: tuple[Path, dict[str, float]]) -> Path:
    """Where a stage's resulting weights are."""
    folder, result = found
    return folder / "checkpoints" / str(result["checkpoint"]) / "model.safetensors"


def places(folder: Path) -> list[list[str]]:
    """The nodes' addresses of the workers, by rank, of each start of a stage."""
    return [json.loads(line)["places"] for line in (folder / "starts.jsonl").read_text().splitlines()]


def walked(folder: Path) -> list[int]:
    """The iterations of a stage's journal, in its order."""
    rows = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [row["iteration"] for row in rows if "epoch" not in row]


def workers_on(node: Node) -> list[psutil.Process]:
    """Ray Train's workers in a namespace."""
    return ray_workers(psutil.Process(pid) for pid in processes(node.namespace) if psutil.pid_exists(pid))


def test_a_schedule_on_three_nodes_ends_bit_by_bit_where_three_workers_of_one_machine_end(spread, write, one_machine):
    client = client_of(spread, write(EPOCHS, LATER), "schedule")
    addresses = sorted(node.ip for node in (spread.head, *spread.nodes))

    done = client.submit("--workers", 3, "--follow")

    assert done.returncode == 0, done.stderr
    ours, theirs = results(client.store), results(one_machine)
    assert set(ours) == set(theirs) == STAGES
    for name, found in ours.items():
        assert [sorted(start) for start in places(found[0])] == [addresses]
        assert weight_bytes(found) == weight_bytes(theirs[name]), name
        assert found[1]["val_top1_accuracy"] == theirs[name][1]["val_top1_accuracy"]


def test_a_schedule_on_three_nodes_ends_where_one_worker_ends_but_for_float_sums(spread, write, tmp_path):
    client = client_of(spread, write(FEW_EPOCHS, LATER), "few")

    done = client.submit("--workers", 3, "--follow")
    alone = vggrow("train", client.recipe, "--threads", 1, "--store", tmp_path / "store", timeout_s=2 * WAIT_S)

    assert done.returncode == 0, done.stderr
    assert alone.returncode == 0, alone.stderr
    ours, singles = results(client.store), results(tmp_path / "store")
    assert set(ours) == set(singles) == STAGES
    for name, found in ours.items():
        single, spread_out = load_file(weight_file(singles[name])), load_file(weight_file(found))
        furthest = max(float(abs(single[part] - spread_out[part]).max()) for part in single)
        print(f"{name}: against one worker, weights differ by {furthest:.1e} at most")
        assert furthest < 1e-4
        assert abs(found[1]["val_top1_accuracy"] - singles[name][1]["val_top1_accuracy"]) < 1.5 / 15     # one picture of 15


def test_a_worker_that_hangs_and_a_head_that_dies_change_no_bit_of_the_weights(spread, write, one_machine, tmp_path):
    client = client_of(spread, write(EPOCHS), "disturbed")
    follower = client.submitting("--workers", 3, "--stall-limit", 20, "--follow", log=tmp_path / "log")
    wait_until(lambda: iterations_of(client) >= 6, timeout_s=WAIT_S)
    (hung,) = workers_on(spread.nodes[0])
    hung.suspend()                                        # SIGSTOP: alive, and silent
    began = time.monotonic()
    wait_until(lambda: len(world_sizes(client)) == 2, timeout_s=WAIT_S)
    hung_s = time.monotonic() - began
    wait_until(lambda: not hung.is_running(), timeout_s=60)
    wait_until(lambda: iterations_of(client) >= 30, timeout_s=WAIT_S)

    spread.restart_ray()
    code = follower.wait(WAIT_S)
    again = client.submit("--workers", 3, "--follow")

    print(f"hung: {hung_s:.1f} s to the next start")
    said = (tmp_path / "log").read_text()
    assert code == 2 and said.splitlines()[-1].startswith("error: ")
    (log,) = client.store.glob("stages/*/logs/conductor.log")      # the follower may be some lines behind when the head dies
    text = log.read_text()
    assert text.count("workers have begun: world size 3") == 2             # of each command
    assert text.count("workers were started anew: world size 3") == 1      # after the hang
    assert again.returncode == 0, again.stderr
    (found,) = results(client.store).values()
    assert weight_bytes(found) == weight_bytes(results(one_machine)["A-36"])
    assert walked(found[0]) == list(range(1, EPOCHS * BATCHES + 1))


def test_a_node_that_ray_says_will_go_leaves_a_checkpoint_and_each_picture_is_seen_once_an_epoch(spread, write, tmp_path):
    client = client_of(spread, write(LONG), "elastic")
    lost = spread.nodes[1]
    follower = client.submitting("--workers", "1:3", "--log-pictures", "--follow", log=tmp_path / "log")
    wait_until(lambda: iterations_of(client) >= 10 and world_sizes(client) == [3], timeout_s=WAIT_S)
    folder = stage_folder(client.store)
    announcing = threading.Thread(target=spread.announce_loss, args=(lost,), kwargs={"in_s": 30})     # a slow command
    announcing.start()
    wait_until(lambda: (folder / "preemptions.jsonl").exists(), timeout_s=WAIT_S)
    told = time.monotonic()
    (notice,) = map(json.loads, (folder / "preemptions.jsonl").read_text().splitlines())
    wait_until(lambda: max(client.checkpoints(), default=0) >= notice["iteration"], timeout_s=60)
    kept_s = time.monotonic() - told
    announcing.join()
    state = vggrow("status", client.store, "--json", timeout_s=WAIT_S)
    wait_until(lambda: time.monotonic() - told > 30, timeout_s=60)
    spread.kill(lost)
    gone = time.monotonic()
    try:
        wait_until(lambda: world_sizes(client)[-1] == 2, timeout_s=WAIT_S)
        seen = iterations_of(client)
        wait_until(lambda: iterations_of(client) > seen, timeout_s=WAIT_S)
        alone_s = time.monotonic() - gone
        wait_until(lambda: iterations_of(client) > seen + 10, timeout_s=WAIT_S)
    finally:
        spread.join(lost)
    wait_until(lambda: world_sizes(client)[-1] == 3, timeout_s=WAIT_S)
    seen = iterations_of(client)
    wait_until(lambda: iterations_of(client) > seen + 10, timeout_s=WAIT_S)
    stopped = client.jobs("stop", job_of(tmp_path / "log"))
    follower.wait(WAIT_S)

    print(f"notice to checkpoint {kept_s:.1f} s, node lost to training again {alone_s:.1f} s")
    assert kept_s < 10
    assert "A-36: a node is about to be taken away, says Ray; checkpoint at iteration" in (tmp_path / "log").read_text()
    assert json.loads(state.stdout)[0]["stages"][0]["state"] == "running"
    assert stopped.returncode == 0, stopped.stderr
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [start["world_size"] for start in starts] == [3, 2, 3]
    assert lost.ip not in starts[1]["places"] and starts[1]["iteration"] >= notice["iteration"]
    steps = walked(folder)
    assert steps == list(range(1, len(steps) + 1))
    seen_pictures, alone = pictures_that_count(folder), alone_until(len(steps), client.recipe, tmp_path)
    assert list(seen_pictures) == steps
    assert seen_pictures == {iteration: alone[iteration] for iteration in steps}
    for epoch in range(len(steps) // BATCHES):
        of_epoch = [seen_pictures[BATCHES * epoch + batch] for batch in range(1, BATCHES + 1)]
        assert sorted(picture for batch in of_epoch for picture in batch) == list(range(60))


def job_of(log: Path) -> str:
    """The job's name in what a follower was told."""
    return log.read_text().split("submitted ")[1].split()[0]


def alone_until(iteration: int, recipe: Path, folder: Path) -> dict[int, list[int]]:
    """The pictures of each iteration, as one worker that nobody disturbs trains them, to this iteration at least."""
    store = folder / "alone"
    running = Running("train", recipe, "--threads", 1, "--log-pictures", "--store", store, log=folder / "alone.log")
    try:
        wait_until(lambda: iterations(store) >= iteration, timeout_s=WAIT_S, running=running)
        running.send(SIGINT)
        running.wait(WAIT_S)
    finally:
        running.kill_everything()
    return pictures_that_count(stage_folder(store))
