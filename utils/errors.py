"""What is said when a script cannot go on: one line on stderr, and a telling exit status."""

import shlex
import signal
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the user gave cannot be used: a flag, a file, a folder. Exit status 2.

    The message is one line: what was wrong, what was given, what would be accepted.
    """


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

    The training loop looks at it between two steps, where its state can be saved whole.
    """

    def __init__(self) -> None:
        self.number = 0

    def _note(self, number: int, frame) -> None:
        self.number = number

    def __enter__(self) -> "StopRequest":
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run(main: Callable[[], int | None]) -> None:
    """Calls a script's main; ends bad input, diverged training and signals with one line."""

    def stop(number: int, frame) -> None:
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        sys.exit(main())
    except InputError as error:
        message, status = f"error: {error}", 2
    except DivergedError as error:
        message, status = f"diverged: {error}", 3
    except Stopped as stopped:
        state = "training state saved; " if stopped.saved else ""
        again = shlex.join(["python", *sys.argv])
        message = f"stopped by {signal.Signals(stopped.number).name}; {state}to continue: {again}"
        status = 128 + stopped.number
    print(f"{sys.argv[0]}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
