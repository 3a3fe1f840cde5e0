"""What becomes of a stage whose workers fail: which failures are deaths, and what is said when there are too many."""

import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from training.stage_run import only_deaths

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
