"""`vggrow features`: features of pictures by any net with weights, as one Parquet file."""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deploy.own_output import check_features
from deploy.predict import Predictor, open_model
from deploy.scans import scan_data
from pipelines.manifest import HEADER
from training.features.compute import Found, Workers, features_of
from training.features.forward import set_up_device
from training.features.source import (
    FeatureSource,
    chosen_precision,
    fc_spec,
    pooled_spec,
    published_source,
    stage_source,
)
from training.features.spec import FeatureSpec
from training.features.table import fixed_size_list
from training.published.library import list_weights
from training.ray_start import start_ray
from training.store import Store
from training.where import Where, check_where, cores
from training.worker_count import most
from vggcore.errors import RecipeError, StoreError
from vggcore.recipe import GATE, Data, Features, Pool, load_recipe
from vggcore.schedule import Stage
from vggcore.weights import save_weights
from vggcore.whole_file import whole_file

PUBLISHED_SCALE = 224      # shorter side Q of published weights where none is given: what they were trained on


@dataclass(frozen=True)
class Asked:
    """What of `vggrow features` decides the values; None: not given."""

    groups: tuple[int, ...] | None       # of conv groups
    fc: bool                             # the units of FC-2 in their place
    pool: Pool | None
    scales: tuple[int, ...] | None
    flip: bool
    precision: str                       # "auto", "fp32" or "bf16"


@dataclass(frozen=True)
class Written:
    """What a features file holds, and what it took."""

    out: Path
    key: str
    pictures: int
    values: int
    computed: int
    spec: dict[str, Any]


def write_features(
    what: str,
    source: Path,
    out: Path,
    asked: Asked,
    *,
    where: Where,
    tracking: str,
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
) -> Written:
    """Writes the features of all pictures of a recipe or folder (the gate's apart) to `out`, whole or not at all.

    what: "weights:NAME", the name of published weights of the store, or a MODEL. Raises VggrowError.
    """
    check_out(out)
    check_where(where, ())
    if where.in_this_process:
        set_up_device(where.device, asked.precision)
    with opened(what, where.store, tracking) as (found, own):
        spec = spec_of(asked, found, own, where.device)
        data = Data(root=source.absolute()) if source.is_dir() else load_recipe(source).data
        manifest = scan_data(data, where.store, threads=cores())
        table = manifest.table.filter(pc.not_equal(manifest.table["split"], GATE))
        if not where.in_this_process:
            start_ray(
                where.store, address=where.address, cpus=most(where.workers) * where.threads, stall_s=where.stall_s
            )
        pictures = manifest.pictures_of(table)
        features = features_of(
            pictures, spec, found, where.store, Workers.of(where), progress=progress, say=say
        )
    write_table(out, table, features, spec, with_split=not source.is_dir())
    return Written(
        out=out,
        key=spec.key,
        pictures=table.num_rows,
        values=spec.values,
        computed=features.computed,
        spec=spec.model_dump(mode="json"),
    )


def check_out(out: Path) -> None:
    """StoreError where the file could not be written, or is something else: it is better known before the work."""
    folder = out.absolute().parent
    is_folder, has_folder = map(os.path.isdir, (out, folder))      # of a Path, a name too long would be an error
    if has_folder and not os.access(folder, os.W_OK):
        raise StoreError(f"--out {out}: nothing may be written in {folder}; expected a folder of yours")
    if is_folder or not has_folder:
        what = "is a folder" if is_folder else f"has no folder {folder}"
        raise StoreError(f"--out {out}: {what}; expected the path of a file to write, such as features.parquet")
    check_features(out)


@contextmanager
def opened(what: str, store: Store, tracking: str) -> Iterator[tuple[FeatureSource, Stage | None]]:
    """The weights that features come from, and the stage's settings where it is a model of ours."""
    name = what.removeprefix("weights:")
    published = [record.name for record in list_weights(store)]
    if what.startswith("weights:") or name in published:
        yield published_source(store, name), None
        return
    predictor = open_model(what, store=store.root, tracking=tracking, known=published)
    stage = Stage.model_validate_json(json.dumps(predictor.description["stage"]))
    # Every worker must see the weights, which may lie in a registry: a copy in the store for this command alone.
    scratch = store.scratch / f"features-{secrets.token_hex(8)}.safetensors"
    save_weights(predictor.weights, scratch)
    try:
        yield model_source(predictor, stage, scratch), stage
    finally:
        scratch.unlink(missing_ok=True)


def model_source(predictor: Predictor, stage: Stage, file: Path) -> FeatureSource:
    """A model of ours, with its mean."""
    from deploy.judge import colour_of

    return stage_source(stage, file, {}, colour_of(predictor.description))


def spec_of(asked: Asked, source: FeatureSource, stage: Stage | None, device: str) -> FeatureSpec:
    """The spec of what was asked for; a linear model's own features where nothing is. Raises RecipeError."""
    precision = chosen_precision(asked.precision, device)
    if asked.fc:
        if asked.pool is not None or asked.flip:
            name = "pool" if asked.pool is not None else "flip"
            raise RecipeError(
                f"--{name} has no effect with --groups fc: these features are averaged over places and the mirror image"
                " (Appendix B); remove it"
            )
        side = stage.middle_scale if stage is not None else PUBLISHED_SCALE
        return fc_spec(source, asked.scales or (side,), precision=precision)
    own = stage.features if stage is not None and stage.features is not None else Features()
    scales = asked.scales or own.scales or (stage.middle_scale if stage is not None else PUBLISHED_SCALE,)
    features = Features(
        groups=asked.groups or own.groups, pool=asked.pool or own.pool, scales=scales, flip=asked.flip or own.flip
    )
    smallest = 2 ** max(features.groups)
    if min(scales) < smallest:
        raise RecipeError(f"--scales: {min(scales)} is below {smallest}, the pixels that group {max(features.groups)} needs")
    return pooled_spec(source, features, precision=precision)


def write_table(out: Path, table: pa.Table, found: Found, spec: FeatureSpec, *, with_split: bool) -> None:
    """path, class, split (of a recipe), content, features; the spec is in the file's own metadata."""
    names = ["path", "class", *(["split"] if with_split else []), "content"]
    columns = {name: table[name] for name in names} | {"features": fixed_size_list(found.values)}
    with_spec = pa.table(columns).replace_schema_metadata({HEADER: spec.model_dump_json()})
    try:
        with whole_file(out) as part:
            pq.write_table(with_spec, part)
    except pa.ArrowException as error:
        raise StoreError(f"{out}: cannot be written ({error}); name another file") from error
