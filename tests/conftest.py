"""The order of the tests: files that run whole commands come first, so that no worker is left alone with one at the end."""

import signal

import pytest

# Tests that were started in the background of a script have SIGINT ignored, and so would the commands that they interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End-to-end files first, the rest as collected; `make test` hands whole files to its workers in this order."""
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)
