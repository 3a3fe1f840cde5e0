"""The DALI graphs, read from path to tensor: a training view, a centre crop, a whole picture, the same at several scales.

Each is a pure function of the rows that its source hands it (see plan.py); none draws a random number. The GPU side is
written as DALI documents it and has not been tried on a GPU yet.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from nvidia.dali import fn, pipeline_def, types

Device = Literal["cpu", "gpu"]
Source = Callable[[Any], tuple[Any, ...]]  # BatchInfo -> one batch of every column; StopIteration at the epoch's end
Deviation = Sequence[float] | None  # RGB, levels 0..255; None: no division (the paper's)

# The columns a source hands to a graph, in order, one row a picture: type and number of dimensions of a row.
VIEW_COLUMNS = {
    "path": (types.UINT8, 1),  # (bytes,) the file's absolute path
    "picture": (types.INT64, 0),  # the row in Pictures, handed through
    "start": (types.INT32, 1),  # (2,) y, x: first pixel to decode
    "end": (types.INT32, 1),  # (2,) one past the last
    "roi_start": (types.FLOAT, 1),  # (2,) y, x: the crop's corners, in source pixels after `start`
    "roi_end": (types.FLOAT, 1),  # (2,)
    "mirror": (types.INT32, 0),  # 1: left and right exchanged
    "mean": (types.FLOAT, 1),  # (3,) RGB, subtracted; the training set's mean less the view's colour shift
}
CENTRE_COLUMNS = {name: kind for name, kind in VIEW_COLUMNS.items() if name != "mirror"}
WHOLE_COLUMNS = {
    "path": (types.UINT8, 1),
    "picture": (types.INT64, 0),
    "size": (types.FLOAT, 1),  # (2,) height, width at shorter side Q, whole numbers
}
# From the decoded cache: the window's pixels in place of path, start and end; sizes as they were scanned.
CACHED = {"pixels": (types.UINT8, 3), "picture": (types.INT64, 0), "scanned": (types.INT32, 1)}
CACHED_VIEW_COLUMNS = CACHED | {name: VIEW_COLUMNS[name] for name in ("roi_start", "roi_end", "mirror", "mean")}
CACHED_CENTRE_COLUMNS = CACHED | {name: VIEW_COLUMNS[name] for name in ("roi_start", "roi_end", "mean")}
CACHED_WHOLE_COLUMNS = CACHED | {"size": WHOLE_COLUMNS["size"]}


def columns(source: Source, wanted: dict[str, tuple[types.DALIDataType, int]]) -> Any:
    """The source's columns as nodes of a graph; one call of `source` a batch, which yields contiguous arrays."""
    return fn.external_source(
        source=source,
        num_outputs=len(wanted),
        batch=True,
        batch_info=True,
        dtype=[dtype for dtype, _ in wanted.values()],
        ndim=[dimensions for _, dimensions in wanted.values()],
        layout=["HWC" if name == "pixels" else "" for name in wanted],
    )


def in_colour(pixels: Any, channels: int) -> Any:
    """Pixels as RGB; a grey cache has one channel, which stands for all three from here on."""
    return fn.cat(pixels, pixels, pixels, axis_name="C") if channels == 1 else pixels


def on(device: Device, pixels: Any) -> Any:
    """Cached pixels where the rest of the graph works."""
    return pixels.gpu() if device == "gpu" else pixels


def upright_sizes(encoded: Any) -> Any:
    """Height and width of each encoded picture, (2,) int32; fails where a file is no picture.

    The decoder must come after it and must get no window outside a picture: DALI 2.4.0's own check of a batch of more
    than 4 * (threads + 1) pictures leaves its threads running when it fails, and the process dies by a segmentation
    fault (dali/operators/imgcodec/image_decoder.h, SetupImpl: RunAll(false), an exception, no WaitForWork).
    """
    return fn.peek_image_shape(encoded, dtype=types.INT32)[0:2]


def within(sizes: Any, start: Any, end: Any, roi_start: Any, roi_end: Any) -> tuple[Any, Any, Any, Any]:
    """The window as planned, or the whole of a side that is shorter than the plan thought (see upright_sizes).

    What comes of such a picture is of no use; the loader sees by its size that it's another one, and says so.
    """
    fits, not_fits = end <= sizes, end > sizes
    return start * fits, end * fits + sizes * not_fits, roi_start * fits, roi_end * fits + sizes * not_fits


def decoded_window(device: Device, paths: Any, start: Any, end: Any, roi_start: Any, roi_end: Any) -> tuple[Any, ...]:
    """Files' sizes now, the pixels of their windows, and the crop's corners in these pixels."""
    encoded = fn.io.file.read(paths, dont_use_mmap=True)  # mmap: a file truncated meanwhile kills the process
    sizes = upright_sizes(encoded)
    if device == "gpu":  # whole: a window's decode crashed an H100 (nvImageCodec #55)
        return sizes, fn.decoders.image(encoded, device="mixed"), roi_start + start, roi_end + start
    start, end, roi_start, roi_end = within(sizes, start, end, roi_start, roi_end)
    return sizes, fn.decoders.image_slice(encoded, start=start, end=end, axis_names="HW"), roi_start, roi_end


# exec_dynamic: without it one broken picture ends the pipeline, and outputs that are still held are overwritten.
dali_graph = cast(Callable[[Callable[..., Any]], Callable[..., Any]], pipeline_def(exec_dynamic=True))


@dali_graph
def decode_graph(source: Source, device: Device) -> Any:
    """Whole files as they are, (bytes,), and their pixels, (H, W, 3) uint8 RGB upright; source: yields paths, (bytes,)."""
    del device
    paths = fn.external_source(source=source, batch=True, batch_info=True, dtype=types.UINT8, ndim=1)
    encoded = fn.io.file.read(paths, dont_use_mmap=True)
    return encoded, fn.decoders.image(encoded, device="cpu", output_type=types.RGB)


@dali_graph
def train_graph(source: Source, device: Device, crop: int, deviation: Deviation, cached: int = 0) -> Any:
    """One training view a picture (Sec. 3.1): a window of the rescaled picture, perhaps mirrored, colours shifted.

    source: yields VIEW_COLUMNS a batch, as plan.py says of each view; the graph itself draws nothing.
    cached: channels of the decoded cache that the windows come from, CACHED_VIEW_COLUMNS then; 0: none, files.
    Returns images (N, 3, crop, crop) float32, RGB, 0..255 less the mean; pictures (N,) int64, as they came;
    sizes (N, 2) int32, the files' upright height and width now.
    """
    if cached:
        pixels, pictures, sizes, roi_start, roi_end, mirror, mean = columns(source, CACHED_VIEW_COLUMNS)
        pixels = on(device, pixels)
    else:
        paths, pictures, start, end, roi_start, roi_end, mirror, mean = columns(source, VIEW_COLUMNS)
        sizes, pixels, roi_start, roi_end = decoded_window(device, paths, start, end, roi_start, roi_end)
    crops = fn.resize(pixels, size=crop, roi_start=roi_start, roi_end=roi_end, antialias=True, subpixel_scale=False)
    images = fn.crop_mirror_normalize(
        in_colour(crops, cached), mirror=mirror, mean=mean, std=deviation or 1.0, dtype=types.FLOAT, output_layout="CHW"
    )
    return images, pictures, sizes


@dali_graph
def centre_graph(source: Source, device: Device, crop: int, deviation: Deviation, cached: int = 0) -> Any:
    """The centre crop of a picture rescaled to shorter side Q; no flip, no colour shift.

    source: yields CENTRE_COLUMNS a batch; cached: as in train_graph, with CACHED_CENTRE_COLUMNS.
    Returns images (N, 3, crop, crop) float32, RGB, 0..255 less the mean; pictures (N,) int64, as they came;
    sizes (N, 2) int32, the files' upright height and width now.
    """
    if cached:
        pixels, pictures, sizes, roi_start, roi_end, mean = columns(source, CACHED_CENTRE_COLUMNS)
        pixels = on(device, pixels)
    else:
        paths, pictures, start, end, roi_start, roi_end, mean = columns(source, CENTRE_COLUMNS)
        sizes, pixels, roi_start, roi_end = decoded_window(device, paths, start, end, roi_start, roi_end)
    crops = fn.resize(pixels, size=crop, roi_start=roi_start, roi_end=roi_end, antialias=True, subpixel_scale=False)
    images = fn.crop_mirror_normalize(
        in_colour(crops, cached), mean=mean, std=deviation or 1.0, dtype=types.FLOAT, output_layout="CHW"
    )
    return images, pictures, sizes


@dali_graph
def whole_graph(source: Source, device: Device, mean: Sequence[float], deviation: Deviation, cached: int = 0) -> Any:
    """The whole picture at shorter side Q, for the dense protocol (Sec. 3.2).

    source: yields WHOLE_COLUMNS a batch; all pictures of a batch have one size. cached: as in train_graph, with
    CACHED_WHOLE_COLUMNS.
    Returns images (N, 3, h, w) float32, RGB, 0..255 less the mean; pictures (N,) int64, as they came;
    sizes (N, 2) int32, the files' upright height and width now.
    """
    if cached:
        pixels, pictures, sizes, size = columns(source, CACHED_WHOLE_COLUMNS)
        pixels = on(device, pixels)
    else:
        paths, pictures, size = columns(source, WHOLE_COLUMNS)
        encoded = fn.io.file.read(paths, dont_use_mmap=True)
        sizes = upright_sizes(encoded)
        pixels = whole_pixels(device, encoded, sizes)
    rescaled = in_colour(fn.resize(pixels, size=size, antialias=True, subpixel_scale=False), cached)
    images = fn.crop_mirror_normalize(rescaled, mean=mean, std=deviation or 1.0, dtype=types.FLOAT, output_layout="CHW")
    return images, pictures, sizes


@dali_graph
def scales_graph(source: Source, device: Device, scales: int, mean: Sequence[float], deviation: Deviation) -> Any:
    """Whole pictures at several shorter sides, each file decoded once.

    source: yields scales_columns(scales) a batch; all pictures of a batch have one size at each scale.
    Returns images of the first scale, pictures and sizes as whole_graph; the files themselves, (bytes,) uint8 on the CPU;
    then images of the other scales.
    """
    paths, pictures, *wanted = columns(source, scales_columns(scales))
    encoded = fn.io.file.read(paths, dont_use_mmap=True)
    sizes = upright_sizes(encoded)
    pixels = whole_pixels(device, encoded, sizes)
    first, *others = (
        fn.crop_mirror_normalize(
            fn.resize(pixels, size=size, antialias=True, subpixel_scale=False),
            mean=mean,
            std=deviation or 1.0,
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        for size in wanted
    )
    return first, pictures, sizes, encoded, *others


def scales_columns(scales: int) -> dict[str, tuple[types.DALIDataType, int]]:
    """The columns of scales_graph: as WHOLE_COLUMNS, with a size for each scale."""
    sizes = {f"size{number}": WHOLE_COLUMNS["size"] for number in range(scales)}
    return {name: WHOLE_COLUMNS[name] for name in ("path", "picture")} | sizes


def whole_pixels(device: Device, encoded: Any, sizes: Any) -> Any:
    """The pixels of whole files, (H, W, 3) uint8 RGB, upright; sizes: of upright_sizes."""
    if device == "gpu":
        return fn.decoders.image(encoded, device="mixed")
    # the same as decoders.image, after `sizes`
    return fn.decoders.image_slice(encoded, start=sizes * 0, end=sizes, axis_names="HW")


def build(graph: Callable[..., Any], source: Source, device: str, *, batch: int, threads: int, **settings: Any) -> Any:
    """A built DALI pipeline of one of the graphs above (milliseconds on a CPU).

    device: "cpu" or "cuda:<n>"; batch: the most pictures a batch may have; threads: DALI's CPU threads;
    settings: the graph's own keywords.
    """
    on_gpu = device.startswith("cuda")
    pipeline = graph(
        source=source,
        device="gpu" if on_gpu else "cpu",
        batch_size=batch,
        num_threads=threads,
        device_id=int(device.partition(":")[2] or 0) if on_gpu else None,
        prefetch_queue_depth=2,  # one batch is made while the one before it is used
        **settings,
    )
    pipeline.build()
    return pipeline
