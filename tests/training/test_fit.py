"""Ray Train's run of a stage: which failures of its workers are deaths, and what is not started beside them."""

from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from training.fit import UNUSED, UNUSED_HERE, StageTrainer, make_trainer, only_deaths
from training.store import Store
from training.where import Where

CLOSED = "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4242"
WAITED = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation"

# fmt: off
FAILURES = [
    # what Ray says of each worker                                                                              only deaths
    ({1: WorkerHealthCheckFailedError("a worker health check failed", RayActorError())},                        True),
    ({0: RuntimeError(CLOSED), 1: WorkerHealthCheckFailedError("failed", RayActorError())},                     True),
    ({0: WorkerHealthCheckTimeoutError("hanging for 20.3 seconds")},                                            True),
    ({0: RuntimeError(WAITED)},                                                                                 True),
    ({0: RuntimeError("mat1 and mat2 shapes cannot be multiplied")},                                            False),
    ({0: RuntimeError(WAITED), 1: KeyError("scale")},                                                           False),
    ({},                                                                                                        False),
]
# fmt: on


def test_a_worker_that_dies_while_the_others_are_started_is_a_death_and_no_error_of_rays_controller():
    assert only_deaths(ControllerError(RayActorError()))
    assert not only_deaths(ControllerError(ValueError("no such resource")))


@pytest.mark.parametrize(("failures", "deaths"), FAILURES)
def test_workers_that_die_or_hang_are_told_from_errors_of_our_own(failures, deaths):
    assert only_deaths(WorkerGroupError("training failed", failures)) is deaths


@pytest.mark.parametrize("unused", [UNUSED, UNUSED_HERE])
def test_a_stage_starts_all_that_ray_train_does_but_what_no_stage_uses(unused):
    trainer = StageTrainer(print)
    trainer.unused = unused

    theirs = [type(one).__name__ for one in TorchTrainer._create_default_callbacks(trainer)]
    ours = [type(one).__name__ for one in trainer._create_default_callbacks()]

    assert ours == [name for name in theirs if name not in unused]
    assert unused <= set(theirs), "Ray names them otherwise now"


@pytest.mark.parametrize(("address", "unused"), [(None, UNUSED_HERE), ("auto", UNUSED)])
def test_a_cluster_keeps_what_gives_its_room_back_after_a_dead_controller(address, unused, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    where = Where(store=Store(tmp_path), workers=2, address=address)

    assert make_trainer(SimpleNamespace(key="0", fence=1), where, 1).unused == unused
