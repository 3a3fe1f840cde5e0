"""`vggrow bench train`: how near a stage comes to what the machine can do, four figures side by side in one run.

(i) the machine's matrix multiplication; (ii) the net's bare forward, backward and update on one batch in memory; (iii) a
plain PyTorch loop on the same pictures, torchvision's loader, no Ray; (iv) our whole stage. Each measured alone, one after
the other, in turns, so that all see the same machine.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from pipelines.cache import cache_folder, make_cache, open_cache
from pipelines.manifest import Manifest, Pictures
from training.bench_subject import Subject, subject
from training.freezing import freeze, training_macs
from training.learner import Learner, set_up_torch
from training.optimise import Way, make_optimizer
from training.stage_job import StageJob
from training.store import Store
from training.team import Team
from training.validation import VAL_BATCH, Validation
from training.worker import StageTraining
from vggcore.errors import VggrowError
from vggcore.initialise import initialise_net
from vggcore.nets import Vgg, build_net, layer_table
from vggcore.schedule import Stage

MATRIX = {"cpu": 2048, "cuda": 8192}    # side of the matrices of (i): far above the caches, as large layers are


@dataclass(frozen=True)
class Speeds(Subject):
    """Medians over the turns; images/s but for `limit`, which is multiplications and additions a second."""

    operations_per_image: float      # multiplications and additions of forward and backward
    limit: float                     # (i)
    bare: float                      # (ii)
    plain: float | None              # (iii); None without torchvision
    ours: float                      # (iv), files decoded
    ours_cached: float               # (iv), from the decoded cache
    train_pictures: int
    val_pictures: int
    validation_first: float          # images/s of the first validation, read from the decoded cache
    validation_later: float          # and of the later ones, whose views are in memory where they are few enough

    @property
    def bare_share(self) -> float:
        """(ii) of (i)."""
        return self.bare * self.operations_per_image / self.limit

    def of_epoch(self, validation: float) -> float:
        """Seconds of a validation at this speed, of the seconds of an epoch of training from the decoded cache."""
        return (self.val_pictures / validation) / (self.train_pictures / self.ours_cached)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the ratios that count."""
        return asdict(self) | {
            "validation_first_of_epoch": self.of_epoch(self.validation_first),
            "validation_later_of_epoch": self.of_epoch(self.validation_later),
            "bare_of_limit": self.bare_share,
            "ours_of_bare": self.ours / self.bare,
            "ours_cached_of_bare": self.ours_cached / self.bare,
            "ours_of_plain": None if self.plain is None else self.ours / self.plain,
            "ours_cached_of_plain": None if self.plain is None else self.ours_cached / self.plain,
        }


def measure(
    stage: Stage, manifest: Manifest, store: Store, *, threads: int, device: str, seconds: float, turns: int
) -> Speeds:
    """Measures a stage of a scanned recipe; nothing is left in the store but the decoded cache.

    seconds: of each figure in each of the `turns`. threads: CPU threads, of torch and of each loader.
    """
    with tempfile.TemporaryDirectory(prefix="bench-", dir=store.root) as scratch:
        job = bench_job(stage, manifest, Path(scratch), threads=threads, device=device)
        (job.store / "data").mkdir()
        (job.store / "data" / manifest.fingerprint).symlink_to(store.data(manifest.fingerprint))
        make_cache(manifest, store.root, budget_bytes=2**62, threads=threads, say=lambda words: None)
        set_up_torch(job)
        figures: dict[str, list[float]] = {}
        plain = plain_loop(job, manifest)
        for _ in range(turns):
            for name, figure in (
                ("limit", lambda: matmul_limit(stage, device, seconds)),
                ("bare", lambda: bare_images(job, manifest, seconds)),
                ("plain", (lambda: rate(plain, seconds)) if plain is not None else None),
                ("ours", lambda: rate(our_loop(job, manifest, cached=False), seconds)),
                ("ours_cached", lambda: rate(our_loop(job, manifest, cached=True), seconds)),
            ):
                if figure is not None:
                    figures.setdefault(name, []).append(figure())
            for name, speed in zip(("first", "later"), validations(job, manifest, figures["bare"][-1] * seconds), strict=True):
                figures.setdefault(name, []).append(speed)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return Speeds(
        **vars(subject(stage, threads=threads, device=device)),
        operations_per_image=operations(stage, len(manifest.classes)),
        limit=medians["limit"],
        bare=medians["bare"],
        plain=medians.get("plain"),
        ours=medians["ours"],
        ours_cached=medians["ours_cached"],
        train_pictures=len(manifest.split("train")),
        val_pictures=len(manifest.split("val")),
        validation_first=medians["first"],
        validation_later=medians["later"],
    )


def bench_job(stage: Stage, manifest: Manifest, scratch: Path, *, threads: int, device: str) -> StageJob:
    """A stage that starts from random weights and writes to a scratch folder."""
    return StageJob(
        stage=stage.model_copy(update={"init_from": None, "max_epochs": 10**6, "patience": 10**6}),
        key="0" * 16,
        store=scratch,
        fingerprint=manifest.fingerprint,
        classes=manifest.classes,
        parent=None,
        colour=manifest.colour,
        lock="bench",
        fence=0,
        nonce="",
        device=device,
        threads=threads,
    )


def operations(stage: Stage, classes: int) -> float:
    """Multiplications and additions of a picture's forward and backward."""
    return 2.0 * training_macs(stage, layer_table(stage.net, classes=classes, **stage.net_settings))


def dtype_of(stage: Stage) -> torch.dtype:
    """What the stage multiplies."""
    return torch.bfloat16 if stage.precision == "bf16" else torch.float32


def matmul_limit(stage: Stage, device: str, seconds: float) -> float:
    """(i) Multiplications and additions a second of square matrices in the stage's precision."""
    side = MATRIX[device]
    one, other = (torch.randn(side, side, device=device, dtype=dtype_of(stage)) for _ in range(2))
    out = torch.empty_like(one)

    def multiply() -> Iterator[int]:
        while True:
            torch.matmul(one, other, out=out)
            wait_for(device)
            yield 1

    return rate(multiply(), seconds) * 2.0 * side**3


def made_net(job: StageJob, classes: int, way: Way = "fused") -> tuple[Vgg, Optimizer]:
    """The stage's net with first weights in its memory format, and its optimiser."""
    stage = job.stage
    net = build_net(stage.net, classes=classes, **stage.net_settings)
    initialise_net(net, stage.initialise, width=stage.width, seed=stage.seed, name=stage.net)
    net.to(job.device).to(memory_format=torch.channels_last if stage.channels_last else torch.contiguous_format)
    freeze(net, stage)
    return net.train(), make_optimizer(net.named_parameters(), stage, way)


def update(
    job: StageJob,
    model: nn.Module,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    set_to_none: bool = True,
) -> None:
    """Forward, backward and update, as our loop does them and as anyone would."""
    if job.stage.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=job.stage.precision == "bf16"):
        logits = model(images)
    torch.autograd.backward(cross_entropy(logits.float(), labels))
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)


def bare_loop(
    job: StageJob,
    *,
    classes: int,
    batch: int,
    first: tuple[int, ...] = (),
    way: Way = "fused",
    set_to_none: bool = True,
) -> Iterator[int]:
    """(ii) on one batch in memory, an iteration a step: yields its pictures.

    first: pictures of the first iterations, at most `batch`; then `batch` for ever.
    """
    net, optimizer = made_net(job, classes, way)
    model: nn.Module = torch.compile(net, dynamic=False) if job.stage.compile else net    # type: ignore[assignment]
    images = torch.randn(batch, 3, job.stage.crop, job.stage.crop, device=job.device)
    labels = torch.zeros(batch, dtype=torch.int64, device=job.device)
    for iteration in count():
        size = first[iteration] if iteration < len(first) else batch
        net.set_draws(job.stage.seed, iteration, torch.arange(size, device=job.device))
        update(job, model, optimizer, images[:size], labels[:size], set_to_none=set_to_none)
        wait_for(job.device)
        yield size


def bare_images(job: StageJob, manifest: Manifest, seconds: float) -> float:
    """(ii) Images a second."""
    batch = min(job.stage.global_batch, len(manifest.split("train")))
    return rate(bare_loop(job, classes=len(manifest.classes), batch=batch), seconds)


class Views(Dataset[tuple[Tensor, int]]):
    """A training picture as torchvision's users read it: Pillow, resize to S, random crop, flip, normalise."""

    def __init__(self, pictures: Pictures, stage: Stage, transform: Callable[[Image.Image], Tensor]) -> None:
        """transform: of torchvision."""
        self.pictures, self.stage, self.transform = pictures, stage, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        with Image.open(self.pictures.root / str(self.pictures.paths[place])) as picture:
            return self.transform(picture.convert("RGB")), int(self.pictures.labels[place])


def plain_loop(job: StageJob, manifest: Manifest) -> Iterator[int] | None:
    """(iii) The same net and updates behind torchvision's transforms and torch's DataLoader; None without torchvision."""
    try:
        from torchvision import transforms
    except ImportError:
        return None
    stage = job.stage
    view = transforms.Compose(
        [
            transforms.Resize(stage.middle_scale),
            transforms.RandomCrop(stage.crop),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=(manifest.colour.mean / 255).tolist(), std=(1.0, 1.0, 1.0)),
        ]
    )
    loader = DataLoader(
        Views(manifest.split("train"), stage, view),
        batch_size=stage.global_batch,
        shuffle=True,
        num_workers=job.threads,
        persistent_workers=True,
    )
    net, optimizer = made_net(job, len(manifest.classes))

    def train() -> Iterator[int]:
        iteration = 0
        while True:
            for images, labels in loader:
                images, labels = images.to(job.device), labels.to(job.device)
                net.set_draws(stage.seed, iteration, torch.arange(len(labels), device=job.device))
                update(job, net, optimizer, images, labels)
                iteration += 1
                yield len(labels)

    return train()


def our_loop(job: StageJob, manifest: Manifest, *, cached: bool) -> Iterator[int]:
    """(iv) Our stage as a worker runs it: loader, loop, history, validation left out; pictures trained, a step each."""
    training = StageTraining(replace(job, cached=cached), manifest, Team(torch.device(job.device)))
    training.folder.mkdir(parents=True, exist_ok=True)
    training.may_write = lambda: None  # type: ignore[method-assign]    # no lock is held: nobody else knows this folder
    training.history.may_write = lambda: None
    try:
        while True:
            problem = yield from training.steps()
            if isinstance(problem, VggrowError):
                raise problem
            training.progress = replace(training.progress, epoch=training.progress.epoch + 1, batch=0)
    finally:
        training.loader.close()
        training.validation.close()


def validations(job: StageJob, manifest: Manifest, enough: float) -> tuple[float, float]:
    """Images a second of a stage's first validation and of the next one, over all of val or `enough` of its pictures."""
    team = Team(torch.device(job.device))
    cache = open_cache(cache_folder(job.store, job.fingerprint))
    learner, validation = Learner(job, len(manifest.classes), team, None), Validation(job, manifest, team, cache)
    few = slice(0, max(VAL_BATCH, round(enough)))
    validation.pictures = replace(
        validation.pictures, paths=validation.pictures.paths[few], labels=validation.pictures.labels[few]
    )
    speeds = []
    try:
        for _ in range(2):
            began = time.monotonic()
            validation.measure(learner, lambda: False)
            speeds.append(len(validation.pictures.paths) / (time.monotonic() - began))
    finally:
        validation.close()
    return speeds[0], speeds[1]


def rate(steps: Iterator[int], seconds: float) -> float:
    """What steps yield, a second, over `seconds` and two steps at least.

    Two steps before are not counted, or one where it takes longer than `seconds`.
    """
    began = time.monotonic()
    next(steps)
    if time.monotonic() - began < seconds:
        next(steps)
    done, began = 0, time.monotonic()
    counted = 0
    while time.monotonic() - began < seconds or counted < 2:
        done += next(steps)
        counted += 1
    return done / (time.monotonic() - began)


def wait_for(device: str) -> None:
    """Until a GPU has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def speeds_text(found: Speeds) -> str:
    """For a person: the four figures and their ratios."""
    told = found.to_json()
    plain = "-" if found.plain is None else f"{found.plain:,.1f}"
    lines = [
        found.first_line(),
        f"(i)   matrix multiplication   {found.limit / 1e9:,.1f} GFLOP/s",
        f"(ii)  bare training           {found.bare:,.1f} images/s   {told['bare_of_limit']:.2f} of (i)",
        f"(iii) plain PyTorch loop      {plain} images/s",
        f"(iv)  our stage, files        {found.ours:,.1f} images/s   {told['ours_of_bare']:.2f} of (ii)"
        + ("" if found.plain is None else f"   {told['ours_of_plain']:.2f} of (iii)"),
        f"(iv)  our stage, cached       {found.ours_cached:,.1f} images/s   {told['ours_cached_of_bare']:.2f} of (ii)"
        + ("" if found.plain is None else f"   {told['ours_cached_of_plain']:.2f} of (iii)"),
        f"validation                  {told['validation_first_of_epoch']:.1%} of an epoch the first time,"
        f" {told['validation_later_of_epoch']:.1%} later"
        f" ({found.val_pictures} pictures beside {found.train_pictures} trained, from the cache)",
        found.last_line(),
    ]
    return "\n".join(lines)
