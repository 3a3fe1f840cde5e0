"""The systemd units hold: what systemd says of them, and what our clean stop and our secrets need of them."""

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from training.stop_switch import STOP_WAIT_S

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "deploy/systemd"


class Unit(configparser.ConfigParser):
    """A unit file: names keep their case, the last of several equal names counts, but for Environment, which we collect."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
        self.optionxform = str  # type: ignore[assignment,method-assign]
        self.read_string(path.read_text(encoding="utf-8"))


@pytest.fixture
def service() -> Unit:
    return Unit(UNITS / "vggrow-retrain@.service")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_itself_has_nothing_against_the_units(tmp_path):
    text = (UNITS / "vggrow-retrain@.service").read_text(encoding="utf-8")
    (command,) = re.findall(r"^ExecStart=(\S+)", text, flags=re.MULTILINE)
    service, timer = tmp_path / "vggrow-retrain@pets.service", tmp_path / "vggrow-retrain@pets.timer"
    service.write_text(text.replace(command, "/bin/true"))      # systemd asks whether the file is there
    shutil.copy(UNITS / "vggrow-retrain@.timer", timer)

    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", service, timer],
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert (said.returncode, said.stderr) == (0, "")


def test_a_stop_is_the_signal_and_the_time_that_a_run_needs_for_its_checkpoint(service):
    stop = service["Service"]

    assert stop["KillSignal"] == "SIGINT"
    assert stop["KillMode"] == "mixed"      # the workers hear it from their driver, not from systemd
    assert int(stop["TimeoutStopSec"]) >= STOP_WAIT_S + 20
    assert stop["TimeoutStartSec"] == "infinity" and stop["Type"] == "oneshot"
    assert stop["SuccessExitStatus"] == "130"


def test_the_service_is_nobody_special_and_writes_where_it_must_alone(service):
    hard = service["Service"]

    assert hard["User"] == "vggrow"
    assert (hard["NoNewPrivileges"], hard["ProtectSystem"], hard["CapabilityBoundingSet"]) == ("yes", "strict", "")
    assert hard["ReadWritePaths"].split() == ["/srv/vggrow"]
    assert "PrivateDevices" not in hard      # it hides GPUs
    assert "MemoryDenyWriteExecute" not in hard


def test_secrets_come_from_a_file_and_none_stands_in_a_unit(service):
    words = "\n".join(path.read_text(encoding="utf-8") for path in UNITS.iterdir())

    assert service["Service"]["EnvironmentFile"] == "-/etc/vggrow/env"
    assert not re.findall(r"(?:PASSWORD|TOKEN|SECRET)=\S", words)


def test_the_timer_catches_up_once_and_drives_the_service_of_its_own_name():
    timer = Unit(UNITS / "vggrow-retrain@.timer")

    assert timer["Timer"]["Persistent"] == "true"
    assert "Unit" not in timer["Timer"] and (UNITS / "vggrow-retrain@.service").is_file()
    assert timer["Install"]["WantedBy"] == "timers.target"


def test_cron_and_systemd_run_the_same_command(service):
    line = (UNITS / "vggrow-retrain.cron").read_text(encoding="utf-8").splitlines()[-1]
    command = line.split(" exec ")[1].split(" >> ")[0]

    assert command == service["Service"]["ExecStart"].replace("%i", "pets")
    assert re.match(r"\d+ \d+ \* \* \* vggrow ", line)
    assert subprocess.run(["bash", "-n", "-c", line.split(" vggrow ", 1)[1]]).returncode == 0
