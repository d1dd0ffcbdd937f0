"""Whose folder is it? One process at a time, one configuration, nothing half-written.

A run's folder holds the files of RUN_FILES; config.json says what they were made with, and nothing
made with other settings is ever mixed with them.
"""

import json
import reprlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import filelock
import torch

from utils import checkpoint, distributed
from utils.errors import InputError

RUN_FILES = ("config.json", "metrics.json", "best.pt", "last.pt", "history.csv", "search.csv")
START_ANEW = "give another --output_dir, or let its script start anew with --overwrite"


def run_path(output_dir: str | Path, dataset: str, model: str, method: str, seed: int) -> Path:
    return Path(output_dir, dataset, model, method, f"seed{seed}")


def selected_network(protocol: str) -> str:
    """The network in a run's folder that has not been trained on the validation split."""
    return "best.pt" if protocol == "ils" else "selection/best.pt"


class InUse(InputError):
    """Another process is training in the folder."""


@contextmanager
def held(folder: Path, settings: dict, device: torch.device, overwrite: bool = False):
    """Holds the folder for this process, with the settings written down in its config.json.

    Of the processes of one training the first holds it, and the others wait until it does.
    Raises InUse, or InputError if the folder cannot be written or holds another configuration.
    """
    with ExitStack() as stack:
        if distributed.is_first():
            if not stack.enter_context(exclusive(folder / ".lock", wait=False)):
                raise InUse(f"another process is training in {folder}; wait for its end")
            _prepare(folder, settings, overwrite)
        distributed.wait_for_all()
        # What a finished run says of its making stays as it is.
        if not (folder / "metrics.json").exists():
            made_by = checkpoint.environment(device)
            content = {"settings": settings, "environment": made_by}
            checkpoint.write_json(folder / "config.json", content)
        yield
        distributed.wait_for_all()


@contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a file lock. Without wait: yields whether it got it."""
    lock = filelock.FileLock(path, timeout=-1 if wait else 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        pass
    except (OSError, NotImplementedError) as error:  # the latter: no locks on this file system
        raise InputError(f"cannot use the output folder {path.parent}: {error}") from None
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _prepare(folder: Path, settings: dict, overwrite: bool) -> None:
    for place in (folder, *folder.glob("candidates/*"), *folder.glob("selection")):
        checkpoint.remove_temporaries(place)
    if overwrite:
        _remove_run(folder)
        return
    check(folder, settings)


def _changed_code(config: Path) -> list[str]:
    """The files of this process that were others when the run was made."""
    made_by = read_json(config).get("environment") if config.exists() else None
    there = made_by.get("code") if isinstance(made_by, dict) else None
    if not isinstance(there, dict):  # of a run without it
        return []
    return [name for name, digest in checkpoint.code().items() if there.get(name, digest) != digest]


def check(folder: Path, settings: dict) -> None:
    """Raises InputError if the folder holds a run, finished or not, of other settings.

    A run of the same settings, but of other code, is pointed out.
    """
    if any((folder / name).exists() for name in RUN_FILES):
        check_settings(folder / "config.json", settings)
        if changed := _changed_code(folder / "config.json"):
            print(
                f"warning: since {folder} was trained, or begun, {', '.join(changed)} changed; "
                f"{START_ANEW}",
                file=sys.stderr,
            )


def _remove_run(folder: Path) -> None:
    """Removes an earlier run, in an order that leaves something usable wherever it is killed.

    Until all last.pt are gone the old run is finished or can go on; from then on the same settings
    start anew. config.json is not removed but replaced, after everything that belongs to it.
    """
    try:
        for path in (folder / "last.pt", *folder.glob("candidates/*/last.pt")):
            path.unlink(missing_ok=True)
        for name in ("metrics.json", "best.pt", "history.csv", "search.csv"):
            (folder / name).unlink(missing_ok=True)
        for inside in (folder / "candidates", folder / "selection"):
            if inside.exists():
                shutil.rmtree(inside)
    except OSError as error:
        raise InputError(f"cannot remove the earlier run in {folder}: {error}") from None


def read_json(path: Path) -> dict:
    """What write_json wrote. Raises InputError for anything else."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")  # to read a pipe would never end
        if path.stat().st_size > 2**24:
            raise ValueError("it is too large")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise TypeError("it holds no dictionary")
        return content
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged ({type(error).__name__}: {error}); {START_ANEW}")


def check_settings(config: Path, settings: dict) -> None:
    here = _flat(settings)
    try:
        there = _flat(read_json(config).get("settings"))
    except RecursionError as error:
        raise damaged(config, error) from None
    for name in here | there:
        if here.get(name) != there.get(name):
            raise InputError(
                f"{config.parent} holds another configuration: {name} is "
                f"{reprlib.repr(there.get(name))} there and {reprlib.repr(here.get(name))} here; "
                f"{START_ANEW}"
            )


def _flat(settings, prefix: str = "") -> dict:
    """{"recipe": {"lr": 0.1}} as {"recipe.lr": 0.1}, values as JSON has them."""
    if not isinstance(settings, dict):
        return {prefix: json.loads(json.dumps(settings))}
    inside = [_flat(value, f"{prefix}.{key}".lstrip(".")) for key, value in settings.items()]
    return {key: value for part in inside for key, value in part.items()}
