"""A stage's log files: whose lines stand where, what they say of themselves, and that logging never breaks or blurs a run."""

import io
import logging
import os
import re
import socket
import threading
import warnings

import pytest

from training.stage_log import FIT, LogFile, conductor_hears, logs_folder, stage_log, stage_logger, worker_hears

LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d{4} "


def everything(_record: logging.LogRecord) -> bool:
    return True


def written(folder, who: str) -> str:
    return (logs_folder(folder) / f"{who}.log").read_text()


@pytest.fixture
def screen():
    """What a person sees by the command line's own handler."""
    handler = logging.StreamHandler(io.StringIO())
    logging.getLogger().addHandler(handler)
    yield handler.stream
    logging.getLogger().removeHandler(handler)


def test_a_line_says_when_where_and_who_and_is_on_no_screen(tmp_path, capfd, screen):
    with stage_log(tmp_path, "k1", "worker-3", everything) as log:
        log.info("epoch %d of %d", 3, 74)
    with stage_log(tmp_path, "k1", "worker-3", everything) as log:
        log.error("another start")
    log.error("after the end")

    first, second = written(tmp_path, "worker-3").splitlines()
    where = f"{re.escape(socket.gethostname())} {os.getpid()} worker-3"
    assert re.fullmatch(f"{LINE}{where} INFO epoch 3 of 74", first)
    assert re.fullmatch(f"{LINE}{where} ERROR another start", second)
    assert screen.getvalue() == "" and capfd.readouterr() == ("", "")


def test_what_anybody_warns_of_is_in_the_file_and_once_on_the_screen(tmp_path, capfd, screen):
    with stage_log(tmp_path, "k2", "worker-0", everything):
        logging.getLogger("training.anything").warning("a broken checkpoint")
        logging.getLogger("training.anything").info("not of interest")
        warnings.warn("an old name", FutureWarning, stacklevel=1)
    logging.getLogger("training.anything").warning("after the end")

    text, seen = written(tmp_path, "worker-0"), screen.getvalue()
    assert len(re.findall(f"(?m)^{LINE}", text)) == 2
    assert "WARNING a broken checkpoint" in text and "FutureWarning: an old name" in text
    assert seen.count("a broken checkpoint") == 1 and seen.count("FutureWarning: an old name") == 1
    assert capfd.readouterr() == ("", "")


def test_what_ends_a_worker_is_there_with_its_traceback(tmp_path, capfd):
    def breaks() -> None:
        raise ZeroDivisionError("of ours")

    with pytest.raises(ZeroDivisionError), stage_log(tmp_path, "k3", "worker-0", everything):
        breaks()

    text = written(tmp_path, "worker-0")
    assert " ERROR " in text and "Traceback" in text and "in breaks" in text and "ZeroDivisionError: of ours" in text
    assert capfd.readouterr().err == ""


def test_two_stages_at_once_have_their_own_lines_and_those_of_no_stage_in_both(tmp_path):
    def fit(name: str) -> None:
        logging.getLogger("training.x").warning("said while %s runs", name)

    hears = {name: conductor_hears(name, in_this_process=False) for name in ("A-36", "C-36")}
    with (
        stage_log(tmp_path / "a", "a", "conductor", hears["A-36"]) as a,
        stage_log(tmp_path / "c", "c", "conductor", hears["C-36"]) as c,
    ):
        for name in ("a", "c"):
            (tmp_path / name).mkdir()
        a.info("begins A-36")
        c.info("begins C-36")
        for name in ("A-36", "C-36"):
            thread = threading.Thread(target=fit, args=(name,), name=FIT + name)
            thread.start()
            thread.join()
        logging.getLogger("training.track").warning("MLflow does not answer")

    for name, stage in (("a", "A-36"), ("c", "C-36")):
        assert [line.partition(" conductor ")[2] for line in written(tmp_path / name, "conductor").splitlines()] == [
            f"INFO begins {stage}",
            f"WARNING said while {stage} runs",
            "WARNING MLflow does not answer",
        ]


def test_a_worker_in_the_conductors_process_has_a_file_of_its_own(tmp_path):
    conducts = conductor_hears("A-36", in_this_process=True)
    with stage_log(tmp_path, "k4", "conductor", conducts), stage_log(tmp_path, "k4", "worker-0", worker_hears):
        logging.getLogger("training.track").warning("of the conductor")
        warn = logging.getLogger("training.worker").warning
        thread = threading.Thread(target=warn, args=("of the worker",), name=FIT + "A-36")
        thread.start()
        thread.join()

    (conductor,) = written(tmp_path, "conductor").splitlines()
    (worker,) = written(tmp_path, "worker-0").splitlines()
    assert conductor.endswith("of the conductor") and worker.endswith("of the worker")


def test_a_disk_that_takes_no_more_costs_lines_and_nothing_else(tmp_path, capfd):
    with stage_log(tmp_path, "k5", "worker-0", everything) as log:
        (handler,) = [one for one in log.handlers if isinstance(one, LogFile)]
        handler.path, real = type(handler.path)("/dev/full"), handler.path
        log.info("lost")
        log.info("lost too")
        handler.path = real
        log.info("there is room again")

    assert "2 lines before this one could not be written" in written(tmp_path, "worker-0")
    assert written(tmp_path, "worker-0").splitlines()[-1].endswith("INFO there is room again")
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_does_not_see_the_store_makes_no_folder_where_it_should_be(tmp_path):
    with stage_log(tmp_path / "not" / "mounted", "k6", "worker-1", everything) as log:
        log.info("nobody reads this")

    assert list(tmp_path.iterdir()) == []
    stage_logger("k6", "worker-1").error("nor this")
