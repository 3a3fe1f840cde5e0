"""The one tree of errors a user can mend: the command line prints the message and exits 2.

Each takes one message argument, so that it survives pickling on its way from a Ray worker. The message says the place
first, then what was found, what was wanted and what to do. Any other exception is our own fault: traceback, exit 1.
"""


class VggrowError(Exception):
    """Something the user can mend; the message is one line."""


class RecipeError(VggrowError):
    """A recipe, or a flag beside it, asks for what cannot be."""


class DatasetError(VggrowError):
    """Pictures, classes or splits are not what training needs."""


class StoreError(VggrowError):
    """The store is not writable, is held by another command, or holds something broken."""


class WeightsError(VggrowError):
    """A file of published weights is absent, broken, or of another net."""


class DeviceError(VggrowError):
    """The machine lacks what was asked for: a GPU, a precision, memory."""


class TrackingError(VggrowError):
    """The MLflow server does not answer, or refuses."""


class RegistryError(VggrowError):
    """A registered model, version or alias is absent or not what was wanted."""


class ClusterError(VggrowError):
    """The Ray cluster does not answer, or lacks the resources."""


class TrainingError(VggrowError):
    """Training cannot go on: the loss is not a number, or workers keep dying."""
