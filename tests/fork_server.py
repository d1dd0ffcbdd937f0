"""Runs scripts in forks of a process that has imported torch already, which takes seconds.

A test writes a request to stdin, one JSON object a line; it is answered with the child's process
id at once and, when the child has ended, with its exit status (negative: the signal's number).

    argv     the script and its arguments
    log      file that takes the child's stdout, and stderr behind it
    kill_at  at its n-th change of the disk the child kills itself, n from 1 on; a file that is
             being written is cut in half first
    full_at  at its n-th attempt to finish or rename a file the disk is full
    limit    largest file that the child can write, in bytes
    pause    [name of a function in utils.training, seconds] to sleep in it before it goes on
"""

import errno
import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import sklearn.datasets  # noqa: E402, F401
import torch  # noqa: E402

from utils import teacher, training  # noqa: E402, F401


def count_changes(target: int, kill: bool) -> None:
    """Has os.fsync and whatever renames or removes files count up to the target, and then end.

    Removing counts when it is done, as it may find nothing to remove.
    """
    done = 0

    def counted(function):
        def call(*arguments, **keywords):
            nonlocal done
            if function in (unlink, rmdir):
                function(*arguments, **keywords)
            done += 1
            if done == target and not kill:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if done == target:
                if function is fsync:
                    os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return None if function in (unlink, rmdir) else function(*arguments, **keywords)

        return call

    fsync, unlink, rmdir = os.fsync, os.unlink, os.rmdir
    for name in ("fsync", "replace", *(("unlink", "rmdir") if kill else ())):
        setattr(os, name, counted(getattr(os, name)))


def pause(name: str, seconds: float) -> None:
    function = getattr(training, name)

    def slow(*arguments, **keywords):
        print(f"pausing in {name}", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
        return function(*arguments, **keywords)

    setattr(training, name, slow)


def child(request: dict) -> int:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(0)
    if "kill_at" in request:
        count_changes(request["kill_at"], kill=True)
    if "full_at" in request:
        count_changes(request["full_at"], kill=False)
    if "limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    if "pause" in request:
        pause(*request["pause"])
    sys.argv = request["argv"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    torch.set_num_threads(1)  # a fork has only the thread that forks
    print("ready", flush=True)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            status = child(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
