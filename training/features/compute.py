"""Computes features: what is in the store is read, the rest is cut into parts, which workers compute and write.

In this process for one worker, as Ray tasks for several; one thread a batch, so that a picture's values are the same bits
at any number of workers and threads. A kill loses the parts that are being computed and nothing else.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipelines.manifest import Pictures
from pipelines.plan import Integers
from pipelines.scales import ScalesLoader, scaled_shapes
from training.features.batches import batch_size, cut, into_parts, pixels_of
from training.features.forward import FeatureNet, set_up_device
from training.features.source import FeatureSource, spec_colour
from training.features.spec import FeatureSpec, used_tensors
from training.features.table import FeatureTable, write_part
from training.store import Store, take
from training.where import Where
from training.worker_count import most
from vggcore.weights import load_some

logger = logging.getLogger(__name__)

LOOK_S = 0.2              # how often a wait looks whether it is to end
Check = Callable[[], None]
Progress = Callable[[int, int], None]      # pictures computed, pictures to compute


@dataclass(frozen=True)
class Workers:
    """What computes features; nothing here changes a bit of them."""

    threads: int                 # of each worker, and so many batches at a time
    device: str = "cpu"          # or "cuda"
    tasks: int | None = None     # Ray tasks at once; None: in this process

    @classmethod
    def of(cls, where: Where) -> "Workers":
        """As a schedule runs."""
        return cls(where.threads, where.device, None if where.in_this_process else most(where.workers))


@dataclass(frozen=True)
class Part:
    """What one worker computes and writes as one file; it travels by pickle."""

    spec: FeatureSpec
    source: FeatureSource
    folder: Path                 # of the spec's features
    pictures: Pictures
    batches: list[Integers]      # rows of `pictures`
    workers: Workers


@dataclass(frozen=True)
class Found:
    """Features of pictures, and how many of these were computed for it."""

    values: NDArray[np.float32]      # (n, F)
    computed: int


def nothing() -> None:
    """A check that never ends anything."""


def no_progress(_done: int, _total: int) -> None:
    """Shows nothing."""


def features_of(
    pictures: Pictures,
    spec: FeatureSpec,
    source: FeatureSource,
    store: Store,
    workers: Workers,
    *,
    progress: Progress = no_progress,
    check: Check = nothing,
    say: Callable[[str], None] = logger.info,
) -> Found:
    """The features of these pictures, in their order; only what the store does not have is computed, each content once.

    Ray must run where it has tasks (ray_start.start_ray). check: called every fraction of a second; it may raise to end the
    work, and what was computed stays. Raises DatasetError for a picture that is no longer what was scanned, StoreError for
    a store that takes no writes.
    """
    contents = [str(content) for content in pictures.contents]
    table = FeatureTable(store, spec)
    table.refresh()
    computed = 0
    if table.missing(contents):
        table.describe()
        with alone(table.folder, check, say):
            table.refresh()
            missing = table.missing(contents)
            computed = len(missing)
            compute(pictures, rows_of(contents, missing), table, source, workers, progress, check)
        table.refresh()
    return Found(table.rows(contents), computed)


def rows_of(contents: list[str], wanted: set[str]) -> Integers:
    """The first row of each of the wanted contents."""
    first = {content: row for row, content in reversed(list(enumerate(contents))) if content in wanted}
    return np.array(sorted(first.values()), np.int64)


@contextmanager
def alone(folder: Path, check: Check, say: Callable[[str], None]) -> Iterator[None]:
    """Lets one command compute a spec's features at a time; others wait and find them done. A killed holder's is free."""
    lock = FileLock(folder / ".lock")
    told = False
    while True:
        try:
            take(lock, LOOK_S)
            break
        except Timeout:
            check()
            if not told:
                say("another command computes these features; waiting for it")
            told = True
    try:
        yield
    finally:
        lock.release()


def compute(
    pictures: Pictures,
    rows: Integers,
    table: FeatureTable,
    source: FeatureSource,
    workers: Workers,
    progress: Progress,
    check: Check,
) -> None:
    """Computes and writes the features of these rows of the pictures."""
    if not len(rows):
        return
    scales = table.spec.scales
    batches = cut(pictures, rows, scales, workers.device)
    parts = [make_part(table, source, pictures, some, workers) for some in into_parts(pictures, batches, scales)]
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, len(rows))

    progress(0, len(rows))
    if workers.tasks is None:
        for part in parts:
            compute_part(part, advance, check)
        net_of.cache_clear()
    else:
        from training.features.on_ray import compute_on_ray  # Ray: a second, where it is asked for

        compute_on_ray(parts, workers.tasks, advance, check)


def make_part(
    table: FeatureTable, source: FeatureSource, pictures: Pictures, batches: list[Integers], workers: Workers
) -> Part:
    """A part with its own pictures alone."""
    rows = np.concatenate(batches)
    ends = np.cumsum([len(batch) for batch in batches])[:-1]
    numbered = np.split(np.arange(len(rows)), ends)
    return Part(table.spec, source, table.folder, pictures.some(rows), numbered, workers)


def compute_part(part: Part, advance: Callable[[int], None] = lambda count: None, check: Check = nothing) -> int:
    """Computes a part, writes it, and gives its rows; what ends it early leaves the batches that are done written."""
    set_up_device(part.workers.device, part.spec.precision)
    net = net_of(part.spec, part.source.file, tuple(sorted(part.source.tensors.items())), part.workers.device)
    done: list[tuple[Integers, NDArray[np.float32]]] = []
    try:
        with closing(computed_batches(part, net)) as batches:
            for rows, values in batches:
                done.append((rows, values))
                advance(len(rows))
                check()
    finally:
        if done:
            rows = np.concatenate([rows for rows, _ in done])
            contents = [str(content) for content in part.pictures.contents[rows]]
            write_part(part.folder, contents, np.concatenate([values for _, values in done]))
    return len(part.pictures)


@lru_cache(maxsize=1)
def net_of(spec: FeatureSpec, file: Path, tensors: tuple[tuple[str, str], ...], device: str) -> FeatureNet:
    """The net of a spec with weights of a file, see FeatureSource, kept for the parts that follow."""
    names = dict(tensors)
    used = load_some(file, {name: names.get(name, name) for name in used_tensors(spec.net, spec.groups)})
    return FeatureNet(spec, used, device)


def computed_batches(part: Part, net: FeatureNet) -> Generator[tuple[Integers, NDArray[np.float32]], None, None]:
    """The rows and values, (n, F), of each batch, in order; `threads` batches at a time, each in one thread."""
    spec, shapes = part.spec, scaled_shapes(part.pictures, part.spec.scales).reshape(len(part.pictures), -1)
    device = part.workers.device
    sizes = [batch_size(pixels_of(shapes[batch[0]]), device) for batch in part.batches]
    threads = 1 if device == "cuda" else part.workers.threads
    loader = ScalesLoader(
        part.pictures,
        spec_colour(spec),
        spec.scales,
        standardise=spec.deviation is not None,
        batch=max(len(batch) for batch in part.batches),
        device=device,
        threads=part.workers.threads,
    )
    ahead: deque[tuple[Integers, Future[NDArray[np.float32]]]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for (images, rows), size in zip(loader.batches(part.batches), sizes, strict=True):
            ahead.append((rows, pool.submit(values_of, net, images, size)))
            if len(ahead) > threads:
                first, values = ahead.popleft()
                yield first, values.result()
        for first, values in ahead:
            yield first, values.result()
    finally:
        pool.shutdown(cancel_futures=True)
        loader.close()


def values_of(net: FeatureNet, images: list[Tensor], size: int) -> NDArray[np.float32]:
    """The values of a batch, filled up to `size` pictures with zeros on their way through the net."""
    count = len(images[0])
    filled = [functional.pad(one, (0, 0, 0, 0, 0, 0, 0, size - count)) if count < size else one for one in images]
    return net.values(filled)[:count].numpy()
