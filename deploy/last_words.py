"""What `vggrow train` prints last: the table of results, and the commands that go on from there."""

from pathlib import Path

from deploy.line import Line
from deploy.tracking_address import SQLITE
from deploy.yardsticks import read_yardsticks, result_rows, result_table
from training.store import DEFAULT_STORE


def last_words(line: Line, *, command: str, store: str) -> str:
    """The text; `command` is how vggrow is typed here, `store` what --store was."""
    path = line.report.parent / "yardsticks.json"
    yardsticks = read_yardsticks(path) if path.exists() else None
    evaluations = {name: found.facts for name, found in line.evaluations.items()}
    facts = line.evaluations[line.registered_stage].facts
    scales = ", ".join(map(str, facts["scales"]))
    if line.tracking.startswith(SQLITE):
        database = SQLITE + from_here(Path(line.tracking.removeprefix(SQLITE)))
        page = f"{command.replace('vggrow', 'mlflow')} server --backend-store-uri {database} --port 5000"
        address = "http://127.0.0.1:5000"
    else:
        page, address = "", line.tracking
    address += f"/#/experiments/{line.experiment_id}?workflowType=machine_learning"
    elsewhere = "" if store == DEFAULT_STORE else f" --store {store}"
    parts = [
        f"Test split, {facts['pictures']} pictures, {facts['protocol']}, Q = {scales} for {line.registered_stage}:",
        "",
        result_table(result_rows(evaluations, yardsticks, line.measured), net=line.registered_stage),
        "",
        f"model     {line.registered.uri} (version {line.registered.version}: {line.registered.reason})",
        f"report    {from_here(line.report)}",
        f"MLflow    {page}" if page else f"MLflow    {address}",
        *([f"          then {address}"] if page else []),
        f"predict   {command} predict {line.registered.uri} PICTURE...{elsewhere}",
    ]
    return "\n".join(parts)


def from_here(path: Path) -> str:
    """A path below the working folder as it is typed there, any other in full."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
