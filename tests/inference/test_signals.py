"""The first signal ends a run in order, the second at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from gradrun.core.errors import Interrupted
from gradrun.inference.signals import GracefulShutdown
from tests.conftest import ROOT

BOTH = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


@BOTH
def test_the_first_signal_raises_keyboard_interrupt(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with GracefulShutdown() as shutdown:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert shutdown.exit_code == code
    assert signal.getsignal(number) is before


@BOTH
def test_a_signal_in_a_deferred_block_raises_at_its_end(number: int, code: int) -> None:
    done = []
    with GracefulShutdown() as shutdown, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with shutdown.deferred():
            with shutdown.deferred():
                os.kill(os.getpid(), number)
                done.append("inner")
            done.append("outer")
        done.append("never")
    assert done == ["inner", "outer"]
    assert shutdown.exit_code == code


@BOTH
def test_an_uncaught_signal_becomes_an_interrupted_error_with_its_exit_code(
    number: int, code: int
) -> None:
    with pytest.raises(Interrupted) as ended, GracefulShutdown():
        os.kill(os.getpid(), number)
    assert ended.value.exit_code == code


def test_a_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from gradrun.inference.signals import GracefulShutdown\n"
        "with GracefulShutdown() as shutdown:\n"
        "    with shutdown.deferred():\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        print('still running', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('never')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (143, "still running\n")


def test_handlers_set_by_the_caller_are_not_replaced() -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with GracefulShutdown():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_it_has_no_effect_in_another_thread() -> None:
    failed = []

    def work() -> None:
        try:
            with GracefulShutdown() as shutdown, shutdown.deferred():
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []
