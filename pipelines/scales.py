"""Whole pictures at several test scales Q from one decode each, in batches that are given from outside."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import graph
from pipelines.colour import Colour
from pipelines.loader import Columns, Feed, MakeColumns, broken, deviation, file_names, replaced
from pipelines.manifest import Pictures
from pipelines.plan import Integers, scaled_sides
from vggcore.errors import DatasetError


def scaled_shapes(pictures: Pictures, scales: Sequence[int]) -> Integers:
    """(n, scales, 2) heights and widths of whole pictures, pixels, with the shorter side at each scale."""
    indices = np.arange(len(pictures))
    return np.stack([np.stack(scaled_sides(pictures, indices, scale, "crop"), axis=1) for scale in scales], axis=1)


class ScalesLoader:
    """Whole pictures at several scales; each file is decoded once, and must still be what was scanned.

    device: "cpu" or "cuda:<n>"; threads: DALI's CPU threads; standardise: also divide by the deviation.
    """

    def __init__(
        self,
        pictures: Pictures,
        colour: Colour,
        scales: Sequence[int],
        *,
        standardise: bool,
        batch: int,
        device: str,
        threads: int,
    ) -> None:
        """batch: the most pictures a batch may have."""
        self.pictures = pictures
        self.shapes = scaled_shapes(pictures, scales).astype(np.float32)
        settings = {"scales": len(scales), "mean": colour.mean.tolist(), "deviation": deviation(colour, standardise)}
        self.feed = ScalesFeed(
            lambda source: graph.build(graph.scales_graph, source, device, batch=batch, threads=threads, **settings),
            pictures,
        )

    def batches(self, planned: Sequence[Integers]) -> Iterator[tuple[list[torch.Tensor], Integers]]:
        """Images (n, 3, h, w) float32, RGB less the mean, at each scale, and the rows of each planned batch, in order.

        planned: rows of `pictures` that have one shape at each scale. Raises DatasetError, naming the file, when a picture
        cannot be read any more or is not the one that was scanned.
        """

        def columns(rows: Integers) -> Columns:
            sizes = (np.ascontiguousarray(at_scale) for at_scale in self.shapes[rows].swapaxes(0, 1))
            return file_names(self.pictures, rows), rows, *sizes

        return self.feed.at_scales(planned, columns)

    def close(self) -> None:
        """Lets the pipeline and its threads go; the loader cannot be used afterwards."""
        self.feed.close()


class ScalesFeed(Feed):
    """A feed whose pipeline gives each picture at several scales, and its file."""

    def at_scales(
        self, planned: Sequence[Integers], make_columns: MakeColumns
    ) -> Iterator[tuple[list[torch.Tensor], Integers]]:
        """As `batches`, with all scales' images; files are compared with the scan's."""
        self.drain()
        self.planned, self.columns = planned, make_columns
        for rows in planned:
            try:
                outputs = self.pipeline.run()
            except RuntimeError as error:
                culprit = self.culprit(rows)
                if culprit is None:  # each picture passes alone: not a picture's fault
                    raise
                raise broken(self.pictures, culprit) from error
            found = np.array(outputs[1].as_cpu().as_array())
            assert np.array_equal(found, self.handed.popleft()), f"asked for pictures {rows}, got {found}"
            sizes = np.array(outputs[2].as_cpu().as_array())
            for place, row in enumerate(found.tolist()):
                self.check(row, sizes[place], np.asarray(outputs[3][place]))
            yield [self.own(output) for output in (outputs[0], *outputs[4:])], found

    def check(self, row: int, size: NDArray[np.int32], encoded: NDArray[np.uint8]) -> None:
        """DatasetError unless a file has the size and the content that were scanned."""
        pictures = self.pictures
        if size.tolist() != [pictures.heights[row], pictures.widths[row]]:
            raise replaced(pictures, row, size)
        if hashlib.blake2b(encoded.data, digest_size=16).hexdigest() != str(pictures.contents[row]):
            raise changed(pictures, row)


def changed(pictures: Pictures, row: int) -> DatasetError:
    """The error for a file of other content than the scan's."""
    path = Path(pictures.root) / str(pictures.paths[row])
    return DatasetError(
        f"{path}: the file has changed since it was scanned; restore or remove it, or start the same command again to scan"
        " again"
    )
