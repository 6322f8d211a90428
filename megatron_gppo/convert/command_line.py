"""How the conversion tools end: exit codes, and what a user is told."""

import logging
import os
import re
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from types import FrameType

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_gppo.convert.errors import ConvertError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Terminated(BaseException):
    """SIGTERM, raised like KeyboardInterrupt, so that what is half written is removed."""


def run(action: Callable[[], str], output: str) -> int:
    """Prints what the action returns, or in one line why it ended. Returns the exit status: 0, 2 for a mistake, 128 + a signal."""
    # Torch reads this with its first large tensor. Tensors come and go here, and the kernel clears their memory each time: huge
    # pages save it a third of its work.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    before = signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with logging_redirect_tqdm():
            text = action()
        _print(text)
        return 0
    except ConvertError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {error.filename or output}: {error.strerror or error}. Fix: see to its permissions and the disk",
            file=sys.stderr,
        )
        return 2
    except (KeyboardInterrupt, Terminated) as error:
        as_it_was = f"{output} is as it was. Fix: run the same command to start again"
        print(f"interrupted: {'; '.join(getattr(error, '__notes__', [as_it_was]))}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def add_common_arguments(parser: ArgumentParser) -> None:
    """Those of both directions."""
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="convert the values to this dtype; by default they stay as they are"
    )
    parser.add_argument("--verify", action="store_true", help="read everything back and compare it bit for bit")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the mapping and sizes, and stop"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output, when all is written")


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def num_bytes(text: str) -> int:
    """500MB, 5GB (powers of 1000, as in transformers), or a number of bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ArgumentTypeError(f"{text!r} is not a size, as 5GB or 500MB")
    return size


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # as of `| head`, which has read enough
        # Python flushes what is left when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated
