"""Published weights in words: a line, a table, a page."""

from collections.abc import Sequence
from pathlib import Path

from deploy.plan_table import aligned
from pipelines.sources import printable
from vggcore.published import PublishedWeights, mean_text


def layers_text(record: PublishedWeights) -> str:
    """ "13 convs and 3 FC layers"."""
    convs = sum(layer.startswith("conv") for layer in record.layers)
    return f"{convs} convs{' and 3 FC layers' if record.has_fc else ''}"


def outputs_text(record: PublishedWeights) -> str:
    """ "1,000 classes", "4 outputs without names", "none"."""
    if record.outputs is None:
        return "none"
    return f"{record.outputs:,} {'classes' if record.classes is not None else 'outputs without names'}"


def line_of(record: PublishedWeights) -> str:
    """What was imported."""
    outputs = f", {outputs_text(record)}" if record.outputs is not None else ""
    mean, digest = mean_text(record.mean), record.digest
    return f"{record.name}: net {record.net}, {layers_text(record)}{outputs}, mean {mean}, digest {digest}"


def table_of(records: Sequence[PublishedWeights]) -> str:
    """A line each."""
    rows = [
        (record.name, record.net, layers_text(record), outputs_text(record), mean_text(record.mean), record.digest[:12])
        for record in records
    ]
    return "\n".join(aligned(("name", "net", "layers", "outputs", "mean RGB", "digest"), rows, left=range(6)))


def text_of(record: PublishedWeights, path: Path) -> str:
    """All that is known, a line a fact."""
    classes = record.classes or ()
    some = ", ".join(classes[:3]) + (f", ... {classes[-1]}" if len(classes) > 3 else "")
    lines = {
        "name": record.name,
        "net": f"{record.net}, {layers_text(record)}" + (f", FC1 fits crop {record.crop}" if record.crop else ""),
        "outputs": outputs_text(record) + (f": {some}" if classes else ""),
        "pictures": f"RGB, 0..255, less the mean {mean_text(record.mean)}",
        "origin": record.origin or "not known",
        "licence": record.licence or "not stated",
        "source": f"{record.source}, imported {record.imported_at}",
        "source file's digest": record.source_digest,
        "digest": record.digest,
        "file": str(path),
    }
    return "\n".join(f"{key}: {printable(value)}" for key, value in lines.items())      # a file may name anything
