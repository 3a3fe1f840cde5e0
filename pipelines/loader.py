"""Batches of views as torch tensors: any epoch, from any batch on, this worker's share only; and the test views.

A pipeline is built once and kept: each pass hands it another list of batches. A batch's tensors are its own, safe to
hold for as long as one likes (on a GPU they are copies, made in the stream that is current).
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from pipelines import graph
from pipelines.after_crop import after_crop, mixed
from pipelines.cache import DecodedCache
from pipelines.colour import Colour
from pipelines.epoch_views import EpochViews
from pipelines.manifest import Pictures
from pipelines.plan import (
    Integers,
    ViewRule,
    Views,
    batches_per_epoch,
    centre_views,
    full_views,
    share,
    weights,
    window,
)
from vggcore.errors import DatasetError
from vggcore.recipe import View

Columns = tuple[Any, ...]  # one batch of graph.VIEW_COLUMNS or graph.WHOLE_COLUMNS
MakeColumns = Callable[[Integers], Columns]
TestBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """This worker's share of one global batch; a worker without a share still gets the batch, with 0 pictures."""

    images: torch.Tensor  # (n, 3, crop, crop) float32, RGB, contiguous, on the device
    labels: torch.Tensor  # (n,) int64, on the device
    rows: torch.Tensor  # (n,) int64, places in the global batch, on the device
    pictures: Integers  # (n,) rows of the split
    size: int  # pictures of the global batch, over all workers
    index: int  # number of the batch within the epoch
    # with mixup, each image is mix * a view of its picture + (1 - mix) * one of its partner; None without
    mix: torch.Tensor | None = None  # (n,) float32, on the device
    partner_labels: torch.Tensor | None = None  # (n,) int64, on the device
    partners: Integers | None = None  # (n,) rows of the split


class TrainLoader:
    """A worker's share of a stage's training views, epoch by epoch (Sec. 3.1).

    The same pictures, seen the same way, in the same global batches, for any world_size and from any batch on.
    standardise: also divide by the training set's deviation; device: "cpu" or "cuda:<n>"; threads: DALI's CPU threads.
    """

    def __init__(
        self,
        pictures: Pictures,
        colour: Colour,
        rule: ViewRule,
        *,
        standardise: bool,
        rank: int,
        world_size: int,
        device: str,
        threads: int,
        cache: DecodedCache | None = None,
    ) -> None:
        self.pictures = pictures
        self.colour = colour
        self.rule = rule
        self.cache = Cached(cache, pictures) if cache is not None else None
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        longest_share = share(min(rule.global_batch, len(pictures.paths)), 0, world_size)[1]
        self.feed = Feed(
            lambda source: graph.build(
                graph.train_graph,
                source,
                device,
                batch=max(longest_share, 1) * (2 if rule.mixup else 1),
                threads=threads,
                crop=rule.crop,
                deviation=deviation(colour, standardise),
                cached=cache.channels if cache is not None else 0,
            ),
            pictures,
        )

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of epoch number `epoch` >= 0 from batch number `first_batch` on.

        Starting an epoch ends one that is still unfinished. Raises DatasetError, naming the file, when a picture cannot
        be read any more.
        """
        rule, total = self.rule, len(self.pictures.paths)
        planned = EpochViews(rule, self.pictures, self.colour, epoch)
        plans = []
        for index in range(first_batch, batches_per_epoch(total, rule.global_batch)):
            size = min(rule.global_batch, total - index * rule.global_batch)
            start, stop = share(size, self.rank, self.world_size)
            plans.append((index, size, start, np.arange(start, stop) + index * rule.global_batch))
        read = [planned.places(positions) for _, _, _, positions in plans if len(positions)]

        def view_columns(places: Integers) -> Columns:
            columns = columns_of(self.pictures, planned.rows(places), self.colour.mean, self.cache)
            return tuple(columns[name] for name in (graph.CACHED_VIEW_COLUMNS if self.cache else graph.VIEW_COLUMNS))

        made = self.feed.batches(read, view_columns)
        for index, size, start, positions in plans:
            if len(positions):
                images, found = next(made)
                images = after_crop(images, planned.rows(planned.places(positions)))
            else:  # DALI takes no empty batch
                images = torch.zeros((0, 3, rule.crop, rule.crop), device=self.device)
                found = np.zeros(0, np.int64)
            n = len(positions)
            batch = Batch(
                images=images[:n],
                labels=on_device(self.pictures.labels[found[:n]], self.device),
                rows=torch.arange(start, start + n, device=self.device),
                pictures=found[:n],
                size=size,
                index=index,
            )
            yield self.mixed(batch, images[n:], found[n:], weights(rule, epoch, positions)) if rule.mixup else batch

    def mixed(self, batch: Batch, images: torch.Tensor, found: Integers, weight: NDArray[np.float32]) -> Batch:
        """The batch with its partners' images, (n, 3, crop, crop), mixed in; found: (n,) the partners' rows of the split."""
        mix = on_device(weight, self.device)
        return replace(
            batch,
            images=mixed(batch.images, images, mix),
            mix=mix,
            partner_labels=on_device(self.pictures.labels[found], self.device),
            partners=found,
        )

    def close(self) -> None:
        """Lets the pipeline and its threads go; the loader cannot be used afterwards."""
        self.feed.close()


class TestLoader:
    """Test views of pictures in any number: centre crops, or whole pictures, at any test scale Q (Sec. 3.2).

    view: "whole" brings both sides of a picture to Q (what plan.View means in training).
    standardise: also divide by the training set's deviation; device: "cpu" or "cuda:<n>"; threads: DALI's CPU threads.
    """

    __test__ = False  # for pytest: not a class of tests

    def __init__(
        self,
        pictures: Pictures,
        colour: Colour,
        *,
        standardise: bool,
        device: str,
        threads: int,
        cache: DecodedCache | None = None,
        view: View = "crop",
    ) -> None:
        self.pictures = pictures
        self.colour = colour
        self.view: View = view
        self.cache = Cached(cache, pictures) if cache is not None else None
        self.deviation = deviation(colour, standardise)
        self.device = torch.device(device)
        self.threads = threads
        self.feeds: dict[tuple[int, int], Feed] = {}  # by crop (0: whole) and batch, as long as the loader is open

    def centre(self, test_scale: int, crop: int, batch: int, start: int = 0, stop: int | None = None) -> Iterator[TestBatch]:
        """Centre crops at Q = test_scale >= crop of pictures [start, stop), at most `batch` at a time, in order.

        Gives images (n, 3, crop, crop) float32 and labels (n,) int64 on the device, and indices (n,) int64 on the CPU:
        the pictures' rows. Raises DatasetError, naming the file, when a picture cannot be read any more.
        """
        assert test_scale >= crop, f"test scale {test_scale} is below the crop {crop}"

        def centre_columns(indices: Integers) -> Columns:
            rows = centre_views(self.pictures, indices, test_scale, crop, self.view)
            columns = columns_of(self.pictures, rows, self.colour.mean, self.cache)
            return tuple(columns[name] for name in (graph.CACHED_CENTRE_COLUMNS if self.cache else graph.CENTRE_COLUMNS))

        indices = np.arange(len(self.pictures.paths))[start:stop]
        return self.read(self.feed(crop, batch), chunks(indices, batch), centre_columns)

    def whole(self, test_scale: int, batch: int, start: int = 0, stop: int | None = None) -> Iterator[TestBatch]:
        """Pictures [start, stop) uncropped at shorter side Q = test_scale ("whole": both sides), at most `batch` at a time.

        Pictures of one rescaled size h x w come together, so not in order: indices say which they are. Otherwise as
        `centre`, with images (n, 3, h, w).
        """
        indices = np.arange(len(self.pictures.paths))[start:stop]
        rows = full_views(self.pictures, indices, test_scale, self.view)
        sizes = np.stack([rows.scaled_h, rows.scaled_w], axis=1)
        groups = [indices[(sizes == size).all(axis=1)] for size in np.unique(sizes, axis=0)]

        def whole_columns(indices: Integers) -> Columns:
            rows = full_views(self.pictures, indices, test_scale, self.view)
            size = np.stack([rows.scaled_h, rows.scaled_w], axis=1).astype(np.float32)
            if self.cache is not None:
                return self.cache.whole(indices), indices, self.cache.sizes(indices), size
            return file_names(self.pictures, indices), indices, size

        planned = [chunk for group in groups for chunk in chunks(group, batch)]
        return self.read(self.feed(0, batch), planned, whole_columns)

    def read(self, feed: "Feed", planned: Sequence[Integers], make_columns: MakeColumns) -> Iterator[TestBatch]:
        """The planned batches with their labels and indices."""
        for images, found in feed.batches(planned, make_columns):
            yield images, on_device(self.pictures.labels[found], self.device), torch.from_numpy(found)

    def feed(self, crop: int, batch: int) -> "Feed":
        """The feed for centre crops (or whole pictures: crop 0) in batches of `batch`, built when first asked for."""
        if (crop, batch) not in self.feeds:
            settings: dict[str, Any] = {"batch": batch, "threads": self.threads, "deviation": self.deviation}
            settings["cached"] = self.cache.channels if self.cache is not None else 0
            if crop:
                chosen, settings["crop"] = graph.centre_graph, crop
            else:
                chosen, settings["mean"] = graph.whole_graph, self.colour.mean.tolist()
            device = str(self.device)
            self.feeds[crop, batch] = Feed(lambda source: graph.build(chosen, source, device, **settings), self.pictures)
        return self.feeds[crop, batch]

    def close(self) -> None:
        """Lets the pipelines and their threads go; they are built again when asked for."""
        for feed in self.feeds.values():
            feed.close()
        self.feeds.clear()


class Feed:
    """A DALI pipeline that is handed lists of batches, one list after another, without being built again."""

    def __init__(self, make: Callable[[graph.Source], Any], pictures: Pictures) -> None:
        self.make = make
        self.pictures = pictures
        self.planned: Sequence[Integers] = ()
        self.columns: MakeColumns | None = None
        self.handed: deque[Integers] = deque()  # the pictures of the batches that are being made
        self.held: Any = None
        self.passes = 0
        self.pipeline = make(self.source)

    def source(self, info: Any) -> Columns:
        """What DALI calls for each batch, in order, some batches ahead of the one that is read."""
        if info.iteration >= len(self.planned):
            raise StopIteration
        assert self.columns is not None
        batch = self.columns(self.planned[info.iteration])
        self.handed.append(batch[1])
        return batch

    def batches(self, planned: Sequence[Integers], make_columns: MakeColumns) -> Iterator[tuple[torch.Tensor, Integers]]:
        """Images (n, 3, h, w) float32 and pictures (n,) of each planned batch, in order.

        planned: per batch its places, (n,), n >= 1; make_columns: the graph's columns for such places, which must not
        raise (DALI shows a source's error batches too early, and at every later run). A pass that is unfinished when
        the next one starts is over. Raises DatasetError, naming the file, when a picture cannot be read any more.
        """
        self.passes += 1
        this_pass = self.passes
        self.drain()
        self.planned, self.columns = planned, make_columns
        for places in planned:
            if this_pass != self.passes:
                raise RuntimeError("this pass over the pictures is over: a later one was started from the same loader")
            try:
                outputs = self.pipeline.run()
            except RuntimeError as error:
                culprit = self.culprit(places)
                if culprit is None:  # each picture passes alone: not a picture's fault
                    raise
                raise broken(self.pictures, culprit) from error
            found, expected = np.array(outputs[1].as_cpu().as_array()), self.handed.popleft()
            assert np.array_equal(found, expected), f"asked for pictures {expected}, got {found}"
            sizes = np.array(outputs[2].as_cpu().as_array())
            wanted = np.stack([self.pictures.heights[found], self.pictures.widths[found]], axis=1)
            if not np.array_equal(sizes, wanted):
                row = int(np.flatnonzero((sizes != wanted).any(axis=1))[0])
                raise replaced(self.pictures, int(found[row]), sizes[row])
            yield self.own(outputs[0]), found

    def own(self, output: Any) -> torch.Tensor:
        """A DALI batch as a torch tensor that stays as it is while later batches are made.

        On the CPU no copy: with exec_dynamic DALI writes each batch to memory of its own, which the tensor keeps alive.
        """
        images = from_dlpack(output.as_tensor())
        if not images.is_cuda:
            return images
        copy = images.clone()  # in torch's current stream, which DALI does not know:
        event = torch.cuda.current_stream().record_event()  # its memory is let go only when the copy is done
        if self.held is not None:
            self.held[1].synchronize()
        self.held = (images, event)
        return copy

    def drain(self) -> None:
        """Takes out the batches of an unfinished pass: reset() alone would leave them to the next one, silently."""
        self.planned = ()
        try:
            while True:
                self.pipeline.run()
        except StopIteration:
            self.pipeline.reset()
        except RuntimeError:  # a broken picture, in a batch that nobody will see
            self.pipeline = self.make(self.source)
        self.handed.clear()

    def culprit(self, places: Integers) -> int | None:
        """The first picture of a batch that fails when it is read alone, in the very same way; DALI seldom names it."""
        for place in places:
            self.drain()
            self.planned = [place[np.newaxis]]
            try:
                self.pipeline.run()
            except RuntimeError:
                return int(self.handed[0][0])
        return None

    def close(self) -> None:
        """Lets the pipeline and its threads go."""
        self.planned, self.pipeline, self.held = (), None, None


class Cached:
    """The decoded cache as one set of pictures sees it."""

    def __init__(self, cache: DecodedCache, pictures: Pictures) -> None:
        """Raises KeyError for a picture that the cache has not got: it is another state of the data."""
        self.cache, self.rows, self.channels = cache, cache.rows(pictures), cache.channels

    def sizes(self, indices: Integers) -> NDArray[np.int32]:
        """(n, 2) upright height and width."""
        rows = self.rows[indices]
        return np.stack([self.cache.heights[rows], self.cache.widths[rows]], axis=1).astype(np.int32)

    def whole(self, indices: Integers) -> list[NDArray[np.uint8]]:
        """Pictures as they are."""
        return [self.cache.picture(int(row)) for row in self.rows[indices]]

    def windows(
        self, indices: Integers, start: NDArray[np.int32], end: NDArray[np.int32]
    ) -> list[NDArray[np.uint8]]:
        """Their windows [start, end)."""
        return self.cache.windows(self.rows[indices], start, end)


def columns_of(pictures: Pictures, rows: Views, mean: NDArray[np.float64], cache: Cached | None = None) -> dict[str, Any]:
    """Views as the graphs' columns; the colour shift is folded into the mean that is subtracted."""
    where = window(rows, pictures.heights[rows.picture], pictures.widths[rows.picture])
    if cache is not None:
        read = {"pixels": cache.windows(rows.picture, where.start, where.end), "scanned": cache.sizes(rows.picture)}
    else:
        read = {"path": file_names(pictures, rows.picture), "start": where.start, "end": where.end}
    return read | {
        "picture": rows.picture,
        "roi_start": where.roi_start,
        "roi_end": where.roi_end,
        "mirror": rows.mirror,
        "mean": (mean - rows.shift).astype(np.float32),
    }


def on_device(numbers: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Numbers as a tensor on the device; on a GPU from pinned memory, so that nobody waits for what the GPU still has to do."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def file_names(pictures: Pictures, indices: Integers) -> list[NDArray[np.uint8]]:
    """The pictures' absolute paths as DALI wants them, one array of bytes each."""
    root = os.fspath(pictures.root)
    return [np.frombuffer(os.fsencode(f"{root}/{pictures.paths[index]}"), np.uint8) for index in indices]


def chunks(indices: Integers, batch: int) -> list[Integers]:
    """`indices` in pieces of `batch`, the last perhaps shorter."""
    return [indices[start : start + batch] for start in range(0, len(indices), batch)]


def deviation(colour: Colour, standardise: bool) -> list[float] | None:
    """What a graph divides by: the training set's deviation of R, G, B in levels 0..255; None for the paper's way.

    Raises DatasetError where a channel is the same everywhere: nothing to divide by.
    """
    if not standardise:
        return None
    if not np.all(colour.deviation > 0):
        raise DatasetError(
            f"standardise = true: the training pictures' deviation is {colour.deviation.tolist()} in R, G and B,"
            " but must be above 0 to divide by; set standardise = false"
        )
    levels: list[float] = colour.deviation.tolist()
    return levels


def replaced(pictures: Pictures, picture: int, size: NDArray[np.int32]) -> DatasetError:
    """The error for a picture in whose place there is one of another size, (2,): its window was planned for the old."""
    path = Path(pictures.root) / pictures.paths[picture]
    height, width = pictures.heights[picture], pictures.widths[picture]
    return DatasetError(
        f"{path}: not the picture that was scanned any more ({size[0]} x {size[1]} pixels, wanted {height} x {width});"
        " restore or remove it, then start the same command again"
    )


def broken(pictures: Pictures, picture: int) -> DatasetError:
    """The error for a picture that cannot be read any more, with what its file looks like now."""
    path = Path(pictures.root) / pictures.paths[picture]
    then = "then start the same command again"
    try:
        content = path.read_bytes()
    except OSError as error:
        return DatasetError(f"{path}: cannot be read any more ({error.strerror}); restore or remove it, {then}")
    found = f"{len(content)} bytes"
    if content and hashlib.blake2b(content, digest_size=16).hexdigest() != pictures.contents[picture]:
        found += ", changed since the scan"
    return DatasetError(f"{path}: not a picture that DALI decodes any more ({found}); restore or remove it, {then}")
