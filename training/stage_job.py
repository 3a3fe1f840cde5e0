"""What a worker is told about the stage it trains, and how it proves that it sees what the driver sees."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from pipelines.colour import Colour
from pipelines.manifest import Manifest
from pipelines.plan import ViewRule
from training.parents import Parent
from training.store import Store
from vggcore.errors import DatasetError, StoreError, VggrowError
from vggcore.schedule import Stage
from vggcore.whole_file import write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageJob:
    """All that a worker needs to know; it travels to the workers by pickle."""

    stage: Stage
    key: str
    store: Path
    fingerprint: str
    classes: tuple[str, ...]           # in the model's order
    parent: Parent | None              # None: random weights
    colour: Colour                     # mean and deviation that belong to the net, axes of the pictures
    lock: str                          # name of the lock under which this stage is trained
    fence: int                         # the lock's number, see store.fence_holds
    nonce: str                         # what every worker must read in the store
    device: str                        # "cpu" or "cuda"
    threads: int                       # CPU threads a worker, for torch and for DALI each
    cached: bool = True                # read the decoded cache where the store has it
    preemptible: bool = False          # Ray may say that a node will be taken away: ask it
    log_pictures: bool = False         # keep which pictures each worker trained, see picture_log
    sample_s: float = 10.0             # seconds between samples of what each machine does, see system_metrics; 0: none


class Superseded(Exception):
    """Another command has taken the stage over; this worker writes nothing any more."""


def prove_same_world(job: StageJob, manifest: Manifest) -> None:
    """StoreError or DatasetError unless this worker reads the driver's store and the scan's pictures."""
    store = Store(job.store)
    nonce = store.locks / f"{job.lock}.nonce"
    if not nonce.exists() or nonce.read_text() != job.nonce:
        raise StoreError(
            f"--store {job.store}: a worker does not see the store that the driver sees; name a folder that every node"
            " mounts at the same path"
        )
    pictures = manifest.split("train")
    for index in sorted({0, len(pictures.paths) // 2, len(pictures.paths) - 1}):
        path = pictures.root / pictures.paths[index]
        found = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() if path.exists() else "no file"
        if found != pictures.contents[index]:
            raise DatasetError(
                f"{path}: a worker finds other content than the scan did ({found}, scanned {pictures.contents[index]});"
                " every node must see the same pictures; start again to scan again"
            )


def record_problem(job: StageJob, problem: VggrowError) -> None:
    """Leaves the problem for the conductor, which raises it again; a store that takes no writes may be the problem itself."""
    found = {"fence": job.fence, "type": type(problem).__name__, "message": str(problem)}
    try:
        write_json(Store(job.store).stage(job.key) / "error.json", found)
    except StoreError as error:
        logger.warning("stage %s: its problem is not recorded (%s)", job.stage.name, error)


def view_rule(stage: Stage) -> ViewRule:
    """What of a stage decides its views."""
    return ViewRule(
        seed=stage.seed,
        net=stage.net,
        scale=stage.scale,
        crop=stage.crop,
        flip=stage.flip,
        colour=stage.colour,
        global_batch=stage.global_batch,
        view=stage.view,
        flip_vertical=stage.flip_vertical,
        quarter_turns=stage.quarter_turns,
        area=stage.area,
        aspect=stage.aspect,
        mixup=stage.mixup,
        erase=stage.erase,
        balance=stage.balance,
    )
