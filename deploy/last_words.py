"""What `vggrow train` prints last: the table of results, and the commands that go on from there."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from deploy.line import Line
from deploy.options import elsewhere
from deploy.tracking_address import SQLITE
from deploy.verdict import beside_parents, verdict
from deploy.yardsticks import read_yardsticks, result_rows, result_table
from training.parents import published_ancestor
from training.published.library import list_weights
from training.store import Store, store_root
from vggcore.errors import StoreError
from vggcore.published import PUBLISHED


def last_words(line: Line, *, command: str, store: str, pictures: Path | None) -> str:
    """The text; `command` is how vggrow is typed here, `store` what --store was, `pictures` the folder, where there is one."""
    path = line.report.parent / "yardsticks.json"
    yardsticks = read_yardsticks(path) if path.exists() else None
    evaluations = {name: found.facts for name, found in line.evaluations.items()}
    facts = line.evaluations[line.registered_stage].facts
    scales = ", ".join(map(str, facts["scales"]))
    views = f", {facts['views']}" if "views" in facts else ""
    if line.tracking.startswith(SQLITE):
        database = SQLITE + from_here(Path(line.tracking.removeprefix(SQLITE)))
        page = f"{command.replace('vggrow', 'mlflow')} server --backend-store-uri {database} --port 5000"
        address = "http://127.0.0.1:5000"
    else:
        page, address = "", line.tracking
    address += f"/#/experiments/{line.experiment_id}?workflowType=machine_learning"
    there = elsewhere(store)
    parts = [
        f"Test split, {facts['pictures']} pictures, {facts['protocol']}, Q = {scales}{views} for {line.registered_stage}:",
        "",
        result_table(result_rows(evaluations, yardsticks, line.measured), net=line.registered_stage),
        "",
        f"model     {line.registered.uri} (version {line.registered.version}: {line.registered.reason})",
        f"report    {from_here(line.report)}",
        f"MLflow    {page}" if page else f"MLflow    {address}",
        *([f"          then {address}"] if page else []),
        f"predict   {command} predict {line.registered.uri} PICTURE...{there}",
    ]
    opened, classes = Store(store_root(store)), line.measured.posteriors.shape[1]
    worse = beside_parents(line.stages, line.keys, opened, classes=classes, pictures=line.val_pictures)
    if worse:
        parts += ["", *worse]
    wrong = verdict(line.measured, yardsticks)
    if wrong:
        parts += ["", *wrong]
        with suppress(StoreError):                  # the run is done: what is broken beside it must not hide its table
            known = any(published_ancestor(stage, line.stages, opened) for stage in line.stages)
            weights = [record.name for record in list_weights(opened)]
            parts += [what_to_try(pictures, known, weights, command, there)]
    return "\n".join(parts)


def what_to_try(pictures: Path | None, from_weights: bool, weights: Sequence[str], command: str, there: str) -> str:
    """The next step after a poor result. weights: the published ones in the store; from_weights: a stage started from some."""
    if from_weights:
        return "try: mend wrong labels (the report shows the worst pictures), larger features.scales, or more pictures"
    name = weights[0] if weights else PUBLISHED
    first = "" if weights else f"{command} weights import {name}{there}, then "
    if pictures is None:
        return f'try: {first}a stage with head = "linear", fit = "logistic" and init_from = "weights:{name}"'
    return f"try: {first}{command} init {shlex.quote(from_here(pictures))} --from weights:{name}{there} --out NEW.toml"


def from_here(path: Path) -> str:
    """A path below the working folder as it is typed there, any other in full."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
