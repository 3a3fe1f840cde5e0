"""Jobs on a Ray cluster: an order handed over once, followed, listed, stopped; all through Ray's Jobs API on the head.

A job's id is its key and an attempt: Ray refuses a repeated id, so two submissions at once make one job.
"""

import asyncio
import contextlib
import difflib
import logging
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import requests

from deploy.job_order import STOP_S, Order
from deploy.ray_head import (
    CONNECT_S,
    auth_headers,
    check_head,
    checked_address,
    head_python,
    only_address,
    refusal,
    silent_head,
)
from deploy.tracking_address import short_reason
from training.worker_count import WorkerCount, read_workers, workers_text
from vggcore.errors import ClusterError

logger = logging.getLogger(__name__)

UPLOAD_S, ASK_S = 60.0, 10.0         # how long the head may take for an upload or a submission, and for a question
SILENCE_S = 15.0                     # a job's log that says nothing for so long: ask the head whether it is still there
POLL_S = 0.5
STOP_SLACK_S = 10                    # for Ray to see that the job is over
COLLISIONS = 5                       # how often another submission may take the id that we were about to use
RUNNING = ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Job:
    """A job as the head knows it; times are seconds since 1970."""

    id: str
    recipe: str                      # "" when the job is not ours
    pipeline: str                    # the pipeline whose tick it is; "": none
    key: str
    named: str
    status: str                      # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    exit_code: int | None
    message: str
    started: float | None
    ended: float | None
    store: str
    workers: WorkerCount | None
    entrypoint: str
    image: str                       # the container's; "": none
    env: tuple[str, ...]             # names only: values may be secrets

    @property
    def is_over(self) -> bool:
        """Whether the job has come to its end, whichever."""
        return self.status not in RUNNING

    @property
    def command(self) -> str:
        """What the head's shell runs, less what writes the command's files into a container."""
        return self.entrypoint.rpartition("\n")[2].removeprefix("exec ")

    @property
    def attempt(self) -> int:
        """The number at the end of the id; 0 when it has none."""
        number = self.id.rpartition("-")[2]
        return int(number) if number.isdecimal() else 0

    def serves(self, order: Order) -> bool:
        """Whether this job does what is asked for: the same schedule, recipe or pipeline, into the same store."""
        return self.store == order.store and (self.key == order.key or self.named == order.named)


@dataclass(frozen=True)
class Submission:
    """A job that does what was asked for: a new one, or the one that was running already."""

    job: Job
    fresh: bool
    before: Job | None               # the newest earlier attempt, if the head remembers one


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Asks the head at `address`, http(s)://HOST:PORT of its dashboard, whether it answers and lets us in.

        Raises ClusterError within 10 s otherwise. The token is RAY_AUTH_TOKEN, or in the file RAY_AUTH_TOKEN_PATH, or in
        ~/.ray/auth_token, as Ray has it.
        """
        self.address = checked_address(address)
        self.headers = auth_headers()
        check_head(self.address, self.headers)
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard_sdk", "job.sdk"):       # a line an upload, a line a closed log
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)

        class PatientClient(JobSubmissionClient):  # type: ignore[misc]
            """Ray 2.60's client waits for ever for a head that has gone silent; this one does not."""

            def _do_request(self, method: str, *words: Any, **more: Any) -> Any:
                timeout = (CONNECT_S, ASK_S if method == "GET" else UPLOAD_S)
                return super()._do_request(method, *words, **{"timeout": timeout, **more})

        with self.clear_errors(), only_address(self.address):
            self.client = PatientClient(self.address, headers=self.headers)

    @contextlib.contextmanager
    def clear_errors(self) -> Iterator[None]:
        """What Ray's client raises, as one line."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise refusal(self.address, 401 if "required" in str(error).splitlines()[0] else 403) from error
        except (ConnectionError, requests.RequestException) as error:
            reason = short_reason(error) if isinstance(error, requests.RequestException) else "connection refused"
            raise silent_head(self.address, reason) from error

    def list(self) -> list[Job]:
        """Every submitted job that the head remembers, oldest first."""
        with self.clear_errors():
            found = [as_job(one) for one in self.client.list_jobs() if one.submission_id]
        return sorted(found, key=lambda job: (job.started or 0.0, job.id))

    def get(self, job_id: str) -> Job:
        """One job. ClusterError with the nearest id when there is none of this name."""
        with self.clear_errors():
            try:
                return as_job(self.client.get_job_info(job_id))
            except RuntimeError as error:
                if "status code 404" not in str(error):
                    raise ClusterError(f"job {job_id}: {said(error)}") from error
        raise ClusterError(f"--address {self.address}: no job {job_id!r}{nearest([job.id for job in self.list()], job_id)}")

    def python(self) -> str:
        """The head's own interpreter. ClusterError where the dashboard does not say."""
        return head_python(self.address, self.headers)

    def submit(self, order: Order, *, entrypoint: str, runtime_env: Mapping[str, Any]) -> Submission:
        """Hands the order over, unless a job that serves it is running already: then gives that one.

        entrypoint: what the head's shell runs. runtime_env: Ray's, less the order's variables: a packed working_dir, or a
        container.
        """
        for _ in range(COLLISIONS):
            known = self.list()
            before = [job for job in known if job.serves(order)]
            running = [job for job in before if not job.is_over]
            if running:
                return Submission(running[-1], fresh=False, before=None)
            taken = [job for job in known if job.id.startswith(f"{order.key}-")]
            attempt = 1 + max((job.attempt for job in (*before, *taken)), default=0)
            job_id = f"{order.key}-{attempt}"
            try:
                self.hand_over(order, job_id, entrypoint, {**runtime_env, "env_vars": dict(order.env)})
            except JobExists:
                logger.info("job %s was submitted by another command just now", job_id)
                continue
            return Submission(self.get(job_id), fresh=True, before=before[-1] if before else None)
        raise ClusterError(f"--address {self.address}: others submit {order.recipe!r} all the time; try again")

    def hand_over(self, order: Order, job_id: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
        """Uploads the package, if the head has not got it yet, and submits. Raises JobExists, or ClusterError."""
        metadata = {
            "vggrow.recipe": order.recipe,
            "vggrow.pipeline": order.pipeline,
            "vggrow.key": order.key,
            "vggrow.named": order.named,
            "vggrow.store": order.store,
            "vggrow.workers": workers_text(order.workers),
        }
        with self.clear_errors():
            try:
                self.client.submit_job(
                    entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env, metadata=metadata
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise JobExists(job_id) from error
                raise ClusterError(f"--address {self.address}: the head does not take the job: {said(error)}") from error

    def stop(self, job_id: str) -> Job:
        """Asks a running job for a checkpoint and its end, and waits for it; a job that is over is left alone."""
        job = self.get(job_id)
        if job.is_over:
            return job
        with self.clear_errors():
            try:
                self.client.stop_job(job_id)
            except RuntimeError as error:
                raise ClusterError(f"job {job_id}: the head does not stop it: {said(error)}") from error
        deadline = time.monotonic() + STOP_S + STOP_SLACK_S
        while not (job := self.get(job_id)).is_over:
            if time.monotonic() > deadline:
                raise ClusterError(f"job {job_id}: was asked to stop, but is still {job.status}; look at its log, ask again")
            time.sleep(POLL_S)
        return job

    def logs(self, job_id: str) -> str:
        """All that the job's command has said so far."""
        self.get(job_id)
        with self.clear_errors():
            try:
                return str(self.client.get_job_logs(job_id))
            except RuntimeError as error:
                raise ClusterError(f"job {job_id}: the head does not give its log: {said(error)}") from error

    def follow(self, job_id: str, hear: Callable[[str], None]) -> Job:
        """Gives the job's words to `hear`, from the first one on, until it is over; then the job.

        A connection that breaks is made anew, and no word is heard twice. Raises ClusterError when the head is gone.
        """
        self.get(job_id)
        heard = 0
        while True:
            words = Heard(heard, hear)
            try:
                asyncio.run(self.tail(job_id, words))
            except (RuntimeError, OSError, TimeoutError) as error:       # aiohttp's ClientError is an OSError or seen below
                logger.info("job %s: its log breaks off (%s)", job_id, error)
            heard = words.heard
            job = self.get(job_id)
            if job.is_over:
                return job
            time.sleep(POLL_S)

    async def tail(self, job_id: str, words: "Heard") -> None:
        """Follows the log to its end, or until nothing was said for a while."""
        import aiohttp

        chunks = self.client.tail_job_logs(job_id)
        try:
            while True:
                try:
                    words(await asyncio.wait_for(anext(chunks), SILENCE_S))
                except StopAsyncIteration:
                    return
                except aiohttp.ClientError as error:
                    raise ConnectionError(str(error)) from error
        finally:
            await chunks.aclose()


class JobExists(Exception):
    """Another job has this id."""


class Heard:
    """Passes on what is new of a log that is read from its start each time."""

    def __init__(self, known: int, hear: Callable[[str], None]) -> None:
        """known: how many characters were heard before."""
        self.heard, self.place, self.hear = known, 0, hear

    def __call__(self, chunk: str) -> None:
        """A piece of the log, in order."""
        fresh = chunk[max(0, self.heard - self.place) :]
        self.place += len(chunk)
        self.heard = max(self.heard, self.place)
        if fresh:
            self.hear(fresh)


def as_job(details: Any) -> Job:
    """Ray's JobDetails as ours."""
    about, runtime_env = details.metadata or {}, details.runtime_env or {}
    workers = about.get("vggrow.workers")
    return Job(
        id=str(details.submission_id),
        recipe=about.get("vggrow.recipe", ""),
        pipeline=about.get("vggrow.pipeline", ""),
        key=about.get("vggrow.key", ""),
        named=about.get("vggrow.named", ""),
        status=str(getattr(details.status, "value", details.status)),
        exit_code=details.driver_exit_code,
        message=details.message or "",
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        store=about.get("vggrow.store", ""),
        workers=read_workers(workers) if workers else None,
        entrypoint=details.entrypoint,
        image=runtime_env.get("container", {}).get("image", ""),
        env=tuple(sorted(runtime_env.get("env_vars", {}))),
    )


def said(error: Exception) -> str:
    """The last line of what Ray says: its own is a traceback with a status code before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def nearest(known: Sequence[str], word: str) -> str:
    """A hint with the nearest id, or how to see them all."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "; `vggrow jobs list` has them all"


def outcome(job: Job) -> int:
    """The exit code that a job that is over stands for: its own; 130 when it was stopped. ClusterError without one."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return 130
    if job.exit_code == 127:
        python = shlex.split(job.command)[0]
        raise ClusterError(f"job {job.id}: the head has no {python}; name its interpreter by --python")
    if job.exit_code is not None and job.exit_code < 0:
        raise ClusterError(f"job {job.id}: was killed by {signal.Signals(-job.exit_code).name}; submit again to go on")
    if job.exit_code is None:
        lines = [line.strip() for line in job.message.splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else "no word why"
        if job.image and "podman" in reason:
            raise ClusterError(
                f"job {job.id}: the head cannot start image {job.image!r} ({reason}); podman must be on every node, and able to"
                " pull it"
            )
        raise ClusterError(f"job {job.id}: ended without an exit code of its own ({reason}); submit again to go on")
    return job.exit_code
