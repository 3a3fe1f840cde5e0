"""What a decision rests on: a model's lineage in the store, the gate list's pictures, leaks, and scores on the list."""

import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from deploy.gate import Score
from pipelines.gate_list import USES, GateList, read_gate
from pipelines.manifest import Manifest, Pictures, read_manifest
from pipelines.near_duplicates import nearest_listed
from training.store import Store, lock_file_held, read_json
from vggcore.digest import digest
from vggcore.errors import DatasetError
from vggcore.recipe import GATE
from vggcore.schedule import Stage
from vggcore.view_average import effective_views
from vggcore.whole_file import whole_file, write_json, write_text

LATENCY_PICTURES = 3   # one by one, as they are served; the median counts
FIRST_SHARE = 0.05 / 52   # what a use spends whose line does not say: lines have said it since there were several rules


@dataclass(frozen=True)
class Ancestor:
    """A stage that a model comes from, itself included, with the pictures it learnt from."""

    name: str
    key: str
    manifest: Manifest


@dataclass(frozen=True)
class Lineage:
    """What the store knows of where a model comes from: the stage itself first, then its parents; what is missing."""

    stages: tuple[Ancestor, ...]
    problems: tuple[str, ...]


def trace(store: Store, stage_key: str | None, *, model: str) -> Lineage:
    """Follows a model's stage to the first ancestor; every stage, its pictures and its code must be on record.

    Code is on record where a schedule of the store names the stage, with its recipe and the versions of the libraries.
    """
    if not stage_key:
        return Lineage((), (f"{model} names no stage",))
    stages, problems = [], []
    key: str | None = stage_key
    recorded = recorded_stages(store)
    seen: set[str] = set()
    while key and key not in seen:
        seen.add(key)
        about = read_json(store.stage(key) / "stage.json")
        if about is None:
            problems.append(f"{model}: stage {key} is not in store {store.root}")
            break
        name, fingerprint = about["name"], about["fingerprint"]
        if not (store.stage(key) / "result.json").exists():
            problems.append(f"{model}: stage {name} ({key}) has no result")
        if key not in recorded:
            problems.append(f"{model}: no schedule has the recipe and library versions of stage {name} ({key})")
        folder = store.data(fingerprint)
        if not (folder / "manifest.parquet").exists():
            problems.append(f"{model}: the pictures of stage {name}, fingerprint {fingerprint}, are not in the store")
        else:
            manifest = read_manifest(folder)
            if "dhash" not in manifest.table.column_names:
                problems.append(f"{model}: the manifest of stage {name} has no difference hashes; scan its pictures again")
            else:
                stages.append(Ancestor(name, key, manifest))
        key = about["parent"] and stored_parent(about["parent"]["key"])
    return Lineage(tuple(stages), tuple(problems))


def stored_parent(key: str) -> str | None:
    """A parent's key where it is a stage; published weights end a lineage: none of the pictures here taught them."""
    return None if key.startswith("weights:") else key


def recorded_stages(store: Store) -> set[str]:
    """The keys of the stages whose schedule is on record with recipe and versions."""
    found: set[str] = set()
    for path in (store.root / "schedules").glob("*/stages.json"):
        record = read_json(path)
        if record.get("versions") and (path.parent / "recipe.toml").exists():
            found.update(stage["key"] for stage in record["stages"])
    return found


def gate_of(store: Store, lineage: Lineage) -> GateList | None:
    """The gate list in force for the pictures a model learnt from; None where its manifest was made without a gate."""
    own = lineage.stages[0].manifest.gate if lineage.stages else None
    return read_gate(store.root / "gates" / own.key) if own else None


def leaks(gate: GateList, lineages: Sequence[Lineage]) -> list[str]:
    """The pictures of any train or val split, of the models or their ancestors, that are gate pictures or near to one."""
    found: dict[str, str] = {}
    listed = set(gate.contents)
    for stage in (stage for lineage in lineages for stage in lineage.stages):
        table = stage.manifest.table
        splits, contents, paths = (table[name].to_pylist() for name in ("split", "content", "path"))
        near = nearest_listed(table["dhash"].to_numpy().astype(np.uint64), gate.dhashes).tolist()
        for path, split, content, place in zip(paths, splits, contents, near, strict=True):
            if split in ("train", "val") and (content in listed or place >= 0):
                kind = "a gate picture" if content in listed else "near to one"
                found.setdefault(path, f"{path} in {split} of {stage.name}, {kind}")
    return list(found.values())


def gate_pictures(store: Store, gate: GateList, lineage: Lineage, classes: Sequence[str]) -> Pictures:
    """The list's pictures with labels by `classes`, sorted by content; every file is there and is what it was.

    They are looked up in the model's own manifest, and then in later scans of the same pictures. Raises DatasetError for a
    class that the model does not know, and for pictures that are gone or changed.
    """
    unknown = sorted(set(gate.classes) - set(classes))
    if unknown:
        raise DatasetError(
            f"{gate.folder}: the gate list has class {unknown[0]!r}, which the model does not know; renew the list with"
            " `vggrow models renew-gate`"
        )
    least: list[str] = list(gate.contents)
    for manifest in manifests_with(store, gate, lineage):
        names = ("content", "path", "height", "width", "split")
        columns = (manifest.table[name].to_pylist() for name in names)
        place: dict[str, tuple[str, int, int]] = {}
        for content, path, height, width, split in zip(*columns, strict=True):
            if content not in place or split == GATE:
                place[content] = (path, height, width)
        missing = [content for content in gate.contents if content not in place]
        if not missing:
            rows = [place[content] for content in gate.contents]
            pictures = Pictures(
                root=manifest.root,
                paths=np.array([path for path, _, _ in rows], object),
                labels=np.array([classes.index(label) for label in gate.classes], np.int64),
                heights=np.array([height for _, height, _ in rows], np.int64),
                widths=np.array([width for _, _, width in rows], np.int64),
                contents=np.array(gate.contents, object),
            )
            check_files(pictures)
            return pictures
        least = min(least, missing, key=len)
    raise DatasetError(
        f"{gate.folder}: {len(least):,} of {len(gate.contents):,} gate pictures are in no scan of the store; put them back and"
        " scan again, or renew the list with `vggrow models renew-gate`"
    )


def manifests_with(store: Store, gate: GateList, lineage: Lineage) -> Iterator[Manifest]:
    """The manifests that may know the list's files: the newest scans of the same pictures, then the model's own."""
    files = sorted(
        (store.root / "data").glob("*/manifest.parquet"), key=lambda file: file.stat().st_mtime_ns, reverse=True
    )
    own = {stage.manifest.fingerprint for stage in lineage.stages}
    for file in files:
        if file.parent.name not in own:
            manifest = read_manifest(file.parent)
            if manifest.gate and manifest.gate.key == gate.home.name:
                yield manifest
    for stage in lineage.stages:
        yield stage.manifest


def check_files(pictures: Pictures) -> None:
    """DatasetError that names a gate picture whose file is gone, or is no longer what was scanned."""
    for path, content in zip(pictures.paths, pictures.contents, strict=True):
        file = pictures.root / str(path)
        try:
            found = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        except OSError as error:
            raise DatasetError(
                f"{file}: gate picture cannot be read ({error.strerror}); put it back, or renew the list with"
                " `vggrow models renew-gate`"
            ) from error
        if found != content:
            raise DatasetError(f"{file}: gate picture has changed since it was scanned; put the old file back, or scan again")


def score(
    gate: GateList,
    pictures: Pictures,
    *,
    model: str,
    identity: str,
    opened: Any,
    protocol: str,
    scales: Sequence[int],
    keep: bool,
) -> Score:
    """What an opened model (deploy.predict.Predictor) says of the list's pictures, or some, through DALI as in training.

    Kept beside the list under identity, protocol and scales, and read from there the next time; a renewed list is another
    folder, so that everything is scored again. The views it averages over are its own, as it is served. keep: False for a
    dry run, which writes nothing.
    """
    question = {"model": identity, "protocol": protocol, "scales": list(scales), "classes": list(opened.classes)}
    views = opened.description["protocol"].get("views", "none")
    question |= {"views": views} if views != "none" else {}
    if len(pictures) < len(gate.contents):       # of the classes that the champion knows
        question["pictures"] = digest(list(pictures.contents), hex_characters=32)
    folder = gate.folder / "scores" / digest(question, hex_characters=16)
    known = read_json(folder / "score.json")
    if known is not None:
        table = pq.read_table(folder / "posteriors.parquet")
        posteriors = np.array(table["posteriors"].to_pylist(), np.float32)
        return score_of(model, pictures, posteriors, known)
    posteriors = posteriors_of(opened, pictures, protocol, scales)
    facts = {
        **question,
        "size_mib": sum(tensor.numel() * tensor.element_size() for tensor in opened.weights.values()) / 2**20,
        "latency_ms": latency_ms(opened, pictures),
    }
    if keep:
        contents = pa.array([str(content) for content in pictures.contents])
        columns = {"content": contents, "posteriors": pa.array(list(posteriors), pa.list_(pa.float32()))}
        with whole_file(folder / "posteriors.parquet") as part:
            pq.write_table(pa.table(columns), part)
        write_json(folder / "score.json", facts)
    return score_of(model, pictures, posteriors, facts)


def score_of(model: str, pictures: Pictures, posteriors: NDArray[np.float32], facts: Mapping[str, Any]) -> Score:
    """A Score of what was found, or kept."""
    return Score(
        model=model,
        classes=tuple(facts["classes"]),
        contents=tuple(str(content) for content in pictures.contents),
        labels=pictures.labels,
        posteriors=posteriors,
        protocol=facts["protocol"],
        scales=tuple(facts["scales"]),
        size_mib=facts["size_mib"],
        latency_ms=facts["latency_ms"],
        views=facts.get("views", "none"),
    )


def posteriors_of(opened: Any, pictures: Pictures, protocol: str, scales: Sequence[int]) -> NDArray[np.float32]:
    """(pictures, classes) posteriors by the path that training and `vggrow evaluate` read pictures with."""
    from deploy.judge import colour_of
    from training.evaluate import evaluate_weights
    from training.where import cores

    return evaluate_weights(
        opened.weights,
        stage_of(opened),
        pictures,
        colour_of(opened.description),
        classes=len(opened.classes),
        protocol=protocol,   # type: ignore[arg-type]   # a Protocol: model.json's, checked when it was packaged
        scales=scales,
        views=effective_views(opened.description["protocol"].get("views", "none"), protocol, stage_of(opened)),
        device="cpu",
        threads=cores(),
    )


def stage_of(opened: Any) -> Stage:
    """The stage that model.json describes."""
    return Stage.model_validate_json(json.dumps(opened.description["stage"]))


def latency_ms(opened: Any, pictures: Pictures) -> float | None:
    """Milliseconds from a picture's file to the answer on this machine's CPU; None where the serving code can't read one."""
    paths = [pictures.root / str(path) for path in pictures.paths[:LATENCY_PICTURES]]
    times = []
    try:
        opened.predict(paths[:1])   # the first call is not like the others
        for path in paths:
            began = time.perf_counter()
            opened.predict([path])
            times.append(1e3 * (time.perf_counter() - began))
    except DatasetError:
        return None
    return round(statistics.median(times), 3)


def uses(gate: GateList) -> list[dict[str, Any]]:
    """The decisions that looked at the list, in order; a line that a crash cut off does not count."""
    try:
        text = (gate.folder / USES).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    # Not splitlines(): a name may hold other characters that end a line for it, such as U+2028.
    return [json.loads(line) for line in text.split("\n")[:-1]]


def use_number(gate: GateList, decision_id: str) -> int:
    """Which use of the list a decision is, or would be, from 1."""
    known = [line["id"] for line in uses(gate)]
    return known.index(decision_id) + 1 if decision_id in known else len(known) + 1


def spent_before(gate: GateList, decision_id: str) -> float:
    """How much of alpha the uses before this decision's had, by the rules that were in force at each."""
    return float(sum(line.get("alpha", FIRST_SHARE) for line in uses(gate)[: use_number(gate, decision_id) - 1]))


def count_use(store: Store, gate: GateList, decision_id: str, facts: Mapping[str, Any], *, alpha: float) -> int:
    """Counts a decision's use of the list, once however often it is asked, and gives its number, from 1.

    alpha: what this use may spend.
    """
    store.locks.mkdir(parents=True, exist_ok=True)
    with lock_file_held(store.locks / f"gate-{gate.home.name}.lock"):
        number, known = use_number(gate, decision_id), uses(gate)
        if number > len(known):
            lines = [*known, {"id": decision_id, "alpha": alpha, **facts}]
            text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
            write_text(gate.folder / USES, text)
    return number
