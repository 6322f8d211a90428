"""How this process starts a server under a guard (guard.py), which ends it whenever this process does."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL


def guarded(command: Sequence[str], log: IO[bytes], env: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    """Starts the guard of `command`, in a session of its own; whoever ends it, ends the server and all that it started."""
    guard = [sys.executable, "-I", str(Path(__file__).with_name("guard.py")), str(os.getpid()), str(GRACE_SECONDS)]
    return subprocess.Popen(
        [*guard, *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
    )
