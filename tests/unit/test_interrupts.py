import hashlib
import os
import signal
import threading

import pytest

from megatron_gppo.interrupts import Interrupts


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_heard_while_the_main_thread_is_outside_of_python(signum: signal.Signals) -> None:
    told: list[signal.Signals | None] = []
    done = threading.Event()

    def on_request() -> None:
        told.append(interrupts.requested)
        done.set()

    before = signal.getsignal(signum)
    with Interrupts(on_request) as interrupts:
        threading.Timer(0.1, os.kill, (os.getpid(), signum)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # seconds in C, and no signal cuts it short
        assert done.wait(10)
        os.kill(os.getpid(), signum)  # not the second Ctrl-C yet: torchrun passes on the first
    assert told == [None], "before the handler could run, and once"
    assert interrupts.requested is signum
    assert signal.getsignal(signum) == before


def test_other_signals_are_no_request() -> None:
    told: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: told.append("handler"))
    try:
        with Interrupts(lambda: told.append("request")) as interrupts:
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told == ["handler"]
    assert interrupts.requested is None


def test_a_second_interrupt_is_a_keyboard_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_gppo.interrupts.SECOND_INTERRUPT_AFTER_S", 0.0)
    with Interrupts(lambda: None):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
