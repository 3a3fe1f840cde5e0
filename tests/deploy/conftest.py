"""Fixtures that several modules of these tests share."""

from tests.deploy.gate_store import made_shelf, shelf
from tests.deploy.mlflow_server import mlflow_server
from tests.deploy.small_model import empty_database, logged, pictures

__all__ = ["empty_database", "logged", "made_shelf", "mlflow_server", "pictures", "shelf"]
