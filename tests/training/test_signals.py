"""SIGTERM and Ctrl-C: noted while work is worth saving, obeyed at once elsewhere."""

import os
import signal

import pytest

from llm_jax.training.signals import Stop, Stopped, stopping

BOTH = [(signal.SIGTERM, 0), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_deferred_until_the_loop_obeys(number, code, capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--workdir=a b"])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as leaving, stopping() as stop:
        assert not stop.requested
        with stop.deferred():
            os.kill(os.getpid(), number)
            assert stop.requested  # and nothing was raised
            assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        raise Stopped(" at step 7 of 9")
    assert leaving.value.code == code and signal.getsignal(number) == before
    name = signal.Signals(number).name
    note, last = capfd.readouterr().err.splitlines()
    assert note == f"{name}: saving after this dispatch; a second signal ends at once"
    how = "to go on, the same command: python train.py '--workdir=a b'"
    assert last == f"stopped by {name} at step 7 of 9; {how}"


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
    assert not issubclass(Stopped, Exception) and not Stop().requested
