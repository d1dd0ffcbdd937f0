"""The scripts, run as a user runs them."""

import json
import os
import re
import runpy
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

ROOT = Path(__file__).parent.parent
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass
class Finished:
    out: str
    err: str


def start(script: str, *arguments, **options) -> subprocess.Popen:
    """Starts a script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(script: str, *arguments, status: int = 0) -> Finished:
    """Runs a script in a process of its own and checks how it ended."""
    process = start(script, *arguments)
    out, err = process.communicate(timeout=900)
    assert process.returncode == status, f"{script} {arguments}: {process.returncode}\n{out}\n{err}"
    return Finished(out, err)


def run_here(script: str, *arguments) -> int | None:
    """Runs a script in this process, as importing torch takes long. Returns its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, path = sys.unraisablehook, sys.path[:]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook, sys.path[:] = hook, path
    return ended.value.code


@pytest.fixture
def refused(capsys):
    """Runs a script that must refuse its input with one line, status 2 and nothing written."""

    def call(script: str, *arguments, written: Path | None = None) -> str:
        before = files(written) if written else None
        capsys.readouterr()
        status = run_here(script, *arguments)
        error = capsys.readouterr().err
        assert status == 2, error
        lines = error.strip().splitlines()
        assert len(lines) == 1, error
        assert lines[0].startswith(f"{script}: error: "), error
        if written:
            assert files(written) == before, "something was written or changed"
        return lines[0]

    return call


def stopped_script(folder: Path, method: str, loss: str, step: int) -> str:
    """A script of a user's own, of which a process is sent SIGTERM in that one of its steps."""
    script = folder / "Own-loss.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.nn.functional as F
from utils.arguments import training_parser
from utils.errors import run
from utils.training import Method, train_method

steps = 0

def make_loss(trial):
    def loss(logits, batch):
        global steps
        steps, labels = steps + 1, batch.labels
        if steps == {step}:
            os.kill(os.getpid(), signal.SIGTERM)
        return {loss}
    return loss

run(lambda: train_method(Method({method!r}, training_parser("").parse_args(), make_loss)))
""")
    return str(script)


class Forks:
    """Scripts in forks of one process. See fork_server.py for the options."""

    def __init__(self, log: Path, root: Path = ROOT) -> None:
        self.log = log
        self.running: int | None = None
        self.server = subprocess.Popen(
            [sys.executable, root / "tests/fork_server.py"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.server.stdout.readline() == "ready\n"

    def start(self, script: str, *arguments, **options) -> int:
        """Returns the process id."""
        self.end_leftover()
        request = {"argv": [script, *map(str, arguments)], "log": str(self.log), **options}
        self.log.unlink(missing_ok=True)
        print(json.dumps(request), file=self.server.stdin, flush=True)
        self.running = int(self.server.stdout.readline())
        return self.running

    def end(self) -> int:
        """Waits for the script started last. Returns its status, negative after a signal; one that
        hangs is killed."""
        hangs = threading.Timer(600, os.kill, (self.running, signal.SIGKILL))
        hangs.start()
        status = int(self.server.stdout.readline())
        hangs.cancel()
        self.running = None
        return status

    def end_leftover(self) -> None:
        """Ends the script that a failed test has not waited for, so that the next one is not
        answered with its status."""
        if self.running is not None:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(self.running, signal.SIGKILL)
            self.end()

    def close(self) -> None:
        self.end_leftover()
        self.server.stdin.close()
        assert self.server.wait(timeout=60) == 0

    def run(self, script: str, *arguments, status: int = 0, **options) -> str:
        """Runs a script, checks how it ended, and returns what it said."""
        self.start(script, *arguments, **options)
        assert self.end() == status, self.said
        return self.said

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < end, f"no {text!r} in: {self.said}"
            time.sleep(0.002)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("log") / "log")
    yield forks
    forks.close()


def memory(kind: str = "VmRSS") -> float:
    """MiB that this process has (VmRSS), or the most that it had (VmHWM), by Linux's /proc."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{kind}:\s*(\d+) kB", status)[1]) / 1024


def peak_memory() -> Callable[[], float]:
    """Returns a function: the most MiB that this process has had from now on, over what it has."""
    Path("/proc/self/clear_refs").write_text("5")  # its peak is what it has now
    before = memory()
    return lambda: memory("VmHWM") - before


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def idx(array: np.ndarray) -> bytes:
    """MNIST's format: 0, 0, type 8 (uint8), number of dimensions, the dimensions, the values."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what is in it; locks aside, which hold nothing."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["weights"]


def same_bits(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same network, bit for bit."""
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The same examples each time, however slow the machine is.
settings.register_profile(
    "tests", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


def pytest_configure(config):
    """All but `pytest -m cuda` is of the CPU: the scripts would take a GPU by themselves, and what
    is promised of its bits and digits is less."""
    chosen = config.option.markexpr
    if "cuda" not in chosen or "not cuda" in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["no_proxy"] = "127.0.0.1"  # servers of the tests are not behind any


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session")
def fashion_mnist() -> None:
    """Real Fashion-MNIST; CI installs it, and must not pass without it."""
    if not FASHION_MNIST.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"no {FASHION_MNIST}: apt-get install dataset-fashion-mnist")
        pytest.skip("real Fashion-MNIST needs Debian's package dataset-fashion-mnist")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors on a busy machine: threads that wait for each other cost more than they do.

    Here, and in the scripts that the tests start.
    """
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
