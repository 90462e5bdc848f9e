"""The exception tree. `main()` of every stage turns these into one line and an exit code.

DistillError               1   a check failed or a stage could not finish
  InputError               2   bad input or configuration: names the file, key or flag
    ConfigError            2   a YAML key or value
    PackageError           2   a Core ML package that is malformed, truncated or hostile
      ModelTypeError       2   a sound Core ML model, but not an ML Program
    DatasetError           2   a dataset, with file and line
    CheckpointError        2   a checkpoint or exported program
    UnsupportedOpError     2   an operator without an implementation, with its nearest kin
  Paused                  75   stopped early, can be resumed
Skipped                    -   not an error: a check that this machine cannot make, with its reason
"""

from __future__ import annotations

import _thread
import contextlib
import difflib
import errno
import functools
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator


class DistillError(Exception):
    """Base of everything this project raises on purpose."""

    exit_code = 1


class InputError(DistillError):
    """Bad input or configuration. The message is one line that names the thing."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration file, key or value that cannot be used."""


class PackageError(InputError):
    """A Core ML package that is malformed, truncated, hostile or a placeholder."""


class ModelTypeError(PackageError):
    """A Core ML model of another type than ML Program."""


class DatasetError(InputError):
    """A dataset that breaks its schema; the message names file and line."""


class CheckpointError(InputError):
    """A checkpoint, Hugging Face folder or exported program that cannot be used."""


_MOST_KIN = 50  # looking for kin takes time


class UnsupportedOpError(InputError):
    """Operators that no handler exists for."""

    def __init__(self, what: str, missing: Iterable[str], known: Iterable[str]) -> None:
        names = sorted(set(missing))
        self.missing = names
        known = sorted(known)
        parts = []
        for name in names[:_MOST_KIN]:
            kin = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            parts.append(f"{name} (nearest known: {', '.join(kin)})" if kin else name)
        more = f"; and {len(names) - _MOST_KIN} more" if len(names) > _MOST_KIN else ""
        super().__init__(f"{what}: no implementation of {'; '.join(parts)}{more}")


GO_ON = "run the same command again to go on"


class Paused(DistillError):
    """The work stopped early and nothing is lost; running the same command again resumes it."""

    exit_code = 75


class Skipped(Exception):
    """A check that cannot be made here. Never counted as passed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Terminated(SystemExit):
    """SIGTERM, as an exception: it unwinds the stack, so that temporary files go."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def stage_main(body: Callable[..., int]) -> Callable[..., int]:
    """Turn a stage's `body(argv) -> int` into its `main`: errors become one line on stderr and an exit code.

    Ctrl-C exits 130 and SIGTERM 143, after the temporary files are gone. The only broad handler in the project.
    `DISTILL_DEBUG=1` lets the traceback through.
    """

    @functools.wraps(body)
    def main(argv: list[str] | None = None) -> int:
        if os.environ.get("DISTILL_DEBUG"):
            return body(argv)
        try:
            with _stoppable():
                return body(argv)
        except DistillError as error:
            print(f"{'paused' if isinstance(error, Paused) else 'error'}: {error}", file=sys.stderr)
            return error.exit_code
        except Skipped as skipped:
            print(f"SKIPPED: {skipped.reason}")
            return 0
        except BrokenPipeError:
            # the reader of our output went away (`| head`): not our error, and nothing is left to tell it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            print(f"error: {describe_os_error(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Terminated as stopped:
            print("terminated", file=sys.stderr)
            return int(str(stopped.code))

    return main


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """The first SIGTERM raises Terminated, a second one acts as ever. A handler that is there already is kept.

    Python drops what is raised inside a finaliser or a weak reference's callback. A Ctrl-C or SIGTERM that came there
    is asked for again, a moment later.
    """
    main = threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    before = sys.unraisablehook

    def unwind(number: int, frame: types.FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    def ask_again(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt | Terminated):
            before(dropped)
            return
        number = signal.SIGTERM if issubclass(dropped.exc_type, Terminated) else signal.SIGINT
        if number == signal.SIGTERM:
            signal.signal(number, unwind)
        again = threading.Timer(0.01, _thread.interrupt_main, [number])
        again.daemon = True
        again.start()

    if ours:
        signal.signal(signal.SIGTERM, unwind)
    if main:
        sys.unraisablehook = ask_again
    try:
        yield
    finally:
        if main:
            sys.unraisablehook = before
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def describe_os_error(error: OSError, path: object = None) -> str:
    """One line for an operating-system error: the file it concerns, then what went wrong."""
    name = error.filename or path
    reason = "no space left on device" if error.errno == errno.ENOSPC else (error.strerror or str(error))
    return f"{name}: {reason}" if name else reason
