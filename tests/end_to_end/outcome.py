"""What a schedule has come to, as its store and MLflow have it, without what no two runs have in common."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from tests.end_to_end.test_resume import mlflow_points, run_statuses, stage_folder, weights

METRICS = ("train_loss", "epoch", "val_loss", "val_top1_accuracy", "learning_rate")
CLOCKS = ("seconds", "val_seconds", "checkpoint_seconds")


def outcome(store: Path) -> dict[str, Any]:
    """All that must be the same however often a run of one stage was killed, each thing under its name."""
    folder = stage_folder(store)
    result = json.loads((folder / "result.json").read_text())
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("photos").experiment_id])
    versions = client.search_model_versions("name = 'photos'")
    return {
        "weights": weights(store),
        "optimiser": (folder / "checkpoints" / result["checkpoint"] / "optimizer.pt").read_bytes(),
        "history": list(without_clocks(rows_of(folder / "history.jsonl"))),
        "MLflow's points": {metric: mlflow_points(store, metric) for metric in METRICS},
        "MLflow's clocks": [step for step, _ in mlflow_points(store, "seconds")],
        "MLflow's runs": run_statuses(store),
        "MLflow's parameters": sorted(sorted(run.data.params.items()) for run in runs),
        "test's figures": sorted(sorted(tests_figures(run.data.metrics)) for run in runs),
        "versions": [version.version for version in versions],
        "aliases": client.get_registered_model("photos").aliases,
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Every line of a journal as it stands in the file; an unfinished one is an error."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def without_clocks(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of a history but for their times."""
    for row in rows:
        yield {name: value for name, value in row.items() if name not in CLOCKS}


def tests_figures(metrics: dict[str, float]) -> Iterator[tuple[str, float]]:
    """What a run has measured on the test split."""
    return ((name, value) for name, value in metrics.items() if name.startswith("test_"))
