"""Fixtures that several modules of these tests share."""

from mlflow_server import mlflow_server
from small_model import empty_database, logged, pictures

__all__ = ["empty_database", "logged", "mlflow_server", "pictures"]
