"""What is said when a script cannot go on: one line on stderr, and a telling exit status."""

import io
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

STOPPING = (signal.SIGINT, signal.SIGTERM)


class InputError(ValueError):
    """Something the user gave cannot be used: a flag, a file, a folder. Exit status 2.

    The message is one line: what was wrong, what was given, what would be accepted. It may quote
    files and their names, so it is cut, and what a terminal would obey is escaped, here for
    everyone who prints it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message[:2000]))


class DivergedError(ArithmeticError):
    """The loss became NaN or infinite. Exit status 3, so that a study can tell it apart."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. Exit status 128 + signal, as a shell expects."""

    def __init__(self, number: int, saved: bool = False) -> None:
        super().__init__(number, saved)
        self.number = number
        self.saved = saved


class StopRequest:
    """Within this context SIGINT and SIGTERM are noted, not obeyed: `number` says which came.

    The training loop looks at it between two steps, where its state can be saved whole. A request
    that nobody has looked at by the end of the context is obeyed there.
    """

    def __init__(self) -> None:
        self.number = 0

    def _note(self, number: int, frame) -> None:
        self.number = number

    def __enter__(self) -> "StopRequest":
        self._before = {n: signal.signal(n, self._note) for n in STOPPING}
        return self

    def __exit__(self, exception, *_) -> None:
        if self.number:  # further ones must not disturb the end that has begun
            _ignore_signals()
        else:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        if self.number and exception in (None, GeneratorExit, DivergedError):
            # Closing a training that waits after an epoch raises GeneratorExit in it.
            raise Stopped(self.number, saved=exception is not DivergedError)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Within this context SIGINT and SIGTERM wait for its end.

    Processes that are forked in it hold them back for ever: a terminal or a batch system sends them
    to all, but it is for the parent to obey them, which may have something to save first.
    """
    noted: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:  # the mask is of this thread alone, and another may take them
            handlers[number] = signal.signal(number, lambda number, _: noted.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if noted:
            signal.raise_signal(noted[0])


def _ignore_signals() -> None:
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def one_line(text: str) -> str:
    """The text without line ends; control characters and the like escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in " ".join(text.split())
    )


# What the host, CUDA, cuBLAS and cuDNN say when memory is short (cuDNN mostly then).
_NO_MEMORY = re.compile(
    "can't allocate memory|out of memory|ALLOC(ATION)?_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
    "|unable to find an engine"
)
# What Gloo says of a closed connection, and NCCL of a process that has gone.
_ENDED = re.compile("gloo|nccl.*(remote process|abort|time[d ]*out)", re.IGNORECASE | re.DOTALL)


def _of_the_machine(error: RuntimeError | MemoryError) -> tuple[str, int]:
    """What is said, and the exit status, where memory is short, the GPU is one that this PyTorch
    was not made for, or another process has ended.

    Raises the error again if it is of anything else.
    """
    no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    said = str(error).partition("\n")[0]
    if no_memory or _NO_MEMORY.search(str(error)):
        return (
            f"error: {said[:300] or 'out of memory'}; smaller batches (--batch_size) or images, "
            "or a smaller network, need less",
            2,
        )
    if "no kernel image is available" in str(error):
        return (
            f"error: {said}; a PyTorch made for this GPU, or --device cpu, would do",
            2,
        )
    if "does not have a deterministic implementation" in str(error):
        return f"error: {said.partition(',')[0]} on this device; leave --deterministic out", 2
    if str(error).startswith("DataLoader worker"):  # by whom it was killed it says
        return f"error: {error}; fewer --workers, or 0, need less memory", 2
    if dist.is_initialized() and _ENDED.search(str(error)):
        return (
            f"another process of this training has ended ({said}); the same "
            "command goes on from the last epoch that was saved",
            1,
        )
    raise error


def _last_words(error: BaseException) -> tuple[str, int]:
    """What is said at the end, and the exit status. Raises what is neither input nor machine."""
    # What --overwrite was to remove is gone; given again it would remove the new run.
    again = shlex.join(["python", *(word for word in sys.argv if word != "--overwrite")])
    match error:
        case InputError():
            return f"error: {error}", 2
        case DivergedError():
            return f"diverged: {error}", 3
        case Stopped():
            state = "training state saved; " if error.saved else ""
            name = signal.Signals(error.number).name
            return f"stopped by {name}; {state}to continue: {again}", 128 + error.number
        case BrokenPipeError():
            return f"nobody reads the output any more; to continue: {again}", 128 + signal.SIGPIPE
        case RuntimeError() | MemoryError():
            return _of_the_machine(error)
        case _:
            raise error


def _drop_output() -> None:
    """So that what is still to be written to a closed pipe is no error when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())


def run(main: Callable[[], int | None]) -> None:
    """Calls a script's main; ends bad input, diverged training and signals with one line."""
    received = []

    def stop(number: int, frame) -> None:
        _ignore_signals()
        received.append(Stopped(number))
        raise received[-1]

    def repeat(unraisable) -> None:
        """Python drops what is raised in a __del__, so it is raised again a moment later."""
        if isinstance(unraisable.exc_value, Stopped):
            number = unraisable.exc_value.number
            signal.signal(signal.SIGALRM, lambda *_: stop(number, None))
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            sys.__unraisablehook__(unraisable)

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without ε and Δ shows escapes
            stream.reconfigure(errors="backslashreplace")
    sys.unraisablehook = repeat
    for number in STOPPING:
        signal.signal(number, stop)
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except (Exception, Stopped) as error:
        # C++ code, as matplotlib's, makes an error of its own of what a signal raises in it.
        message, status = _last_words(received[-1] if received else error)
    with suppress(BrokenPipeError):
        print(f"{Path(sys.argv[0]).name}: {one_line(message)}", file=sys.stderr)
    _drop_output()
    if dist.is_initialized():
        # Python would take down what Gloo's threads still hold, and they may abort (pytorch/pytorch
        # 179291); leaving the group first may wait for ever for a process that has died.
        os._exit(status)
    sys.exit(status)
