"""Fixtures that several modules of these tests share."""

from gate_store import made_shelf, shelf
from mlflow_server import mlflow_server
from small_model import empty_database, logged, pictures

__all__ = ["empty_database", "logged", "made_shelf", "mlflow_server", "pictures", "shelf"]
