"""Run a script: a user error ends it with one line and exit code 2."""

import atexit
import contextlib
import faulthandler
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

from peft_pretraining.errors import UserError

Arguments = TypeVar("Arguments")
USER_ERROR = 2  # exit code, that of argparse
INTERRUPTED = 130  # exit code after Ctrl-C, that of shells
# torchrun ends the other ranks as soon as rank 0 has failed. Waiting this long before printing
# means that an error that all ranks have is printed by rank 0 only.
SECONDS_FOR_RANK_0 = 5


def run_script(main: Callable[..., None], *arguments: object) -> int:
    """Run a script's main function.

    Args:
        main: the function.
        arguments: what it is called with.

    Returns:
        The exit code: 0, or 2 if the function raised UserError, whose message is then printed as
        one line, without a traceback, or 130 after Ctrl-C, or 1 after another exception, whose
        traceback is printed.
    """
    # The stacks of all threads are printed if the process crashes, also when NCCL ends it because
    # another rank does not answer.
    with contextlib.suppress(io.UnsupportedOperation, AttributeError):  # stderr is no file
        faulthandler.enable()
    try:
        main(*arguments)
    except UserError as error:
        return _report(error)
    except SystemExit as stopped:  # after a signal
        return stopped.code if isinstance(stopped.code, int) else 0
    except KeyboardInterrupt:
        # A training that has begun takes Ctrl-C as a request to save and stop.
        _print_error("stopped by Ctrl-C before the training began")
        return INTERRUPTED
    except Exception:
        # It is not passed on, because then the process would end without `end`.
        _print_error(traceback.format_exc().rstrip())
        return 1
    return 0


def end(code: int) -> NoReturn:
    """End this process; under torchrun without the destructors of C++ libraries.

    Those of gloo's threads abort about 3 of 100 processes of a group ("terminate called without an
    active exception", torch 2.14), after all work is done. torchrun would then report a failure,
    and end the other ranks.

    Args:
        code: the exit code.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # It is called when threads that are not daemons have ended, such as one that writes a
        # checkpoint.
        atexit.register(_leave, code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """Call everything else that was registered for the exit, and end the process."""
    atexit.unregister(_leave)
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def parse_or_exit(parse: Callable[[], Arguments]) -> Arguments:
    """Return the parsed arguments, or end the process as `run_script` does.

    A script calls this before its slow imports, so that `--help` and a mistyped flag are answered
    at once.

    Args:
        parse: parses the command line and raises UserError for a mistake in it.
    """
    try:
        return parse()
    except UserError as error:
        sys.exit(_report(error))


def _report(error: UserError) -> int:
    """Print a user error in one line, on rank 0 if all ranks have it. Return the exit code."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(SECONDS_FOR_RANK_0)
    where = f" on rank {rank}" if rank else ""
    sentence = f"error{where}: {error}"
    _print_error(sentence)
    _tell_torchrun(sentence)
    return USER_ERROR


def _print_error(text: str) -> None:
    """Print to stderr, if that is possible: it may be a file on the disk that is full."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # full, closed, or there is none
        print(text, file=sys.stderr, flush=True)


def _tell_torchrun(sentence: str) -> None:
    """Hand the sentence to torchrun, which prints a traceback of its own and then this file.

    So the sentence is the last text on the screen. The file's format is that of
    torch.distributed.elastic's error handler, which is not imported because that takes seconds.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    details = {"timestamp": str(int(time.time()))}
    message = {"message": f"none\n\n{sentence}\n", "extraInfo": details}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf8") as file:
        json.dump({"message": message}, file)
