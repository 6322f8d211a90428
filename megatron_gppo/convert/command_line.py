"""How the conversion tools end: exit codes, and what a user is told."""

import logging
import re
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from types import FrameType

import torch

from megatron_gppo.convert.errors import ConvertError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Terminated(BaseException):
    """SIGTERM, raised like KeyboardInterrupt, so that what is half written is removed."""


def run(action: Callable[[], str], output: str) -> int:
    """Prints what the action returns, or in one line why it ended. Returns the exit status: 0, 2 for a mistake, 128 + a signal."""
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        print(action())
        return 0
    except ConvertError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as error:
        print(f"interrupted: {output} is as it was. Fix: run the same command to start again", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def add_common_arguments(parser: ArgumentParser) -> None:
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
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ArgumentTypeError(f"{text!r} is not a size, as 5GB or 500MB")
    return size


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated
