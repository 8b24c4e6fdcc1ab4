"""Signals are noted while work is worth saving, obeyed at once elsewhere; time limits and notices."""

import os
import signal
import time

import pytest

import llm_jax
from llm_jax.errors import Stopped
from llm_jax.training import signals
from llm_jax.training.signals import Stop, stopping, watch_machine

BOTH = [(signal.SIGTERM, 0), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_deferred_until_the_loop_obeys(number, code, capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--workdir=a b"])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as leaving, stopping() as stop:
        assert not stop.reason
        with stop.deferred():
            os.kill(os.getpid(), number)
            assert stop.reason  # and nothing was raised
            os.kill(os.getpid(), number)  # at once: the same request
        raise Stopped(f"{stop.reason} at step 7 of 9")
    assert leaving.value.code == code and signal.getsignal(number) == before
    name = signal.Signals(number).name
    note, last = capfd.readouterr().err.splitlines()
    assert note == f"{name}: saving after this dispatch; a second signal ends at once"
    how = "to go on, the same command: python train.py '--workdir=a b'"
    assert last == f"stopped by {name} at step 7 of 9; {how}"


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_the_second_ends_at_once(number, code, monkeypatch):
    """Even where the main thread runs no handler; the exit code is a shell's for the signal."""
    codes = []
    monkeypatch.setattr(signals.os, "_exit", codes.append)
    monkeypatch.setattr(signals, "SAME_SECONDS", 0.2)
    with stopping() as stop, stop.deferred():
        for _ in range(2):
            os.kill(os.getpid(), number)
        time.sleep(0.1)
        assert codes == []
        time.sleep(0.2)
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        assert codes == [128 + number]


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_at_once_where_there_is_nothing_to_save(number, code):
    with pytest.raises(SystemExit) as leaving, stopping():
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")
    assert leaving.value.code == code


def test_handlers_are_removed():
    before = {number: signal.getsignal(number) for number, _ in BOTH}
    with stopping():
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
    assert before == {number: signal.getsignal(number) for number, _ in BOTH}
    with pytest.raises(KeyError), stopping():
        raise KeyError
    assert before == {number: signal.getsignal(number) for number, _ in BOTH}


def test_no_error_handler_takes_it_for_an_error():
    assert not issubclass(Stopped, Exception) and not Stop().reason


def test_a_time_limit_counts_from_the_start_of_the_process(monkeypatch):
    monkeypatch.setattr(llm_jax, "BEGAN", time.time() - 100)
    assert not Stop().reason and not Stop(max_seconds=200).reason
    assert Stop(max_seconds=90).reason == "--max-seconds=90"
    with pytest.raises(SystemExit) as leaving, stopping(90) as stop:
        raise Stopped(stop.reason)
    assert leaving.value.code == 0


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"maintenance-event": ["NONE", "NONE", "TERMINATE_ON_HOST_MAINTENANCE"]}, "TERMINATE_ON_HOST"),
        ({"preempted": ["FALSE", "TRUE"]}, "the machine's preemption"),
    ],
)
def test_a_notice_of_the_machine(answers, reason, monkeypatch):
    monkeypatch.setattr(signals, "LOOK_SECONDS", 0.0)
    stop = Stop()
    watch_machine(stop, ask=lambda name: answers[name].pop(0) if answers.get(name) else "")
    assert reason in stop.reason and not any(answers.values())
