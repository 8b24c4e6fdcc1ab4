"""Processes as threads: they meet, agree, and notice who is gone."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_jax import cli
from llm_jax.errors import TryAgain, UserError
from llm_jax.hosts.team import Team


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def meet():
    """Gives {index: Team or what it raised} for the processes that come, and what each was told of losses."""
    teams = []

    def run(count, who=None, wait=10.0):
        port, losses = free_port(), {i: [] for i in range(count)}

        def one(index):
            try:
                team = Team("localhost", port, count, index, losses[index].append, wait)
                teams.append(team)
                return team
            except UserError as error:
                return error

        with ThreadPoolExecutor(count) as pool:
            who = range(count) if who is None else who
            return dict(zip(who, pool.map(one, who), strict=True)), losses

    yield run
    for team in teams:
        team.close(failed="the test is over")


def on_all(teams, work):
    with ThreadPoolExecutor(len(teams)) as pool:
        return list(pool.map(work, teams.values()))


def eventually(true):
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


def test_gather_in_the_order_of_the_processes(meet):
    teams, _ = meet(4)
    for turn in range(3):
        found = on_all(teams, lambda team: team.gather("x", [team.index, turn]))  # noqa: B023
        assert found == [[[i, turn] for i in range(4)]] * 4


def test_names_do_not_wait_for_one_another(meet):
    """A slow gather in one thread holds up none of another name."""
    teams, _ = meet(2)
    slow = threading.Thread(target=lambda: teams[0].gather("save", 0), daemon=True)
    slow.start()
    assert on_all(teams, lambda team: team.gather("step", team.index)) == [[0, 1]] * 2
    assert slow.is_alive()
    teams[1].gather("save", 1)
    slow.join(timeout=60)
    assert not slow.is_alive()


@pytest.mark.parametrize("gone", [0, 2])
def test_a_killed_process_is_named_to_all_others(meet, gone):
    teams, losses = meet(3)
    teams[gone]._ended = True  # a killed process says nothing more
    for link in teams[gone]._links.values():  # and the system closes its sockets
        link._connection.shutdown(socket.SHUT_RDWR)
    others = [i for i in range(3) if i != gone]
    eventually(lambda: all(losses[i] for i in others))
    for i in others:
        assert len(losses[i]) == 1 and losses[i][0].startswith(f"process {gone} of 3 ended: its connection")


def test_a_process_killed_with_messages_unread_is_told_of_like_any_other(meet):
    """The system then resets its connections instead of closing them."""
    teams, losses = meet(2)

    class Reset:
        def receive(self):
            raise ConnectionResetError(104, "Connection reset by peer")

    teams[0]._listen(1, Reset())
    eventually(lambda: losses[0])
    assert losses[0][0].startswith("process 1 of 2 ended: its connection closed")


def test_why_a_process_failed_is_told(meet):
    teams, losses = meet(3)
    teams[1].close(failed="the disk is full")
    eventually(lambda: losses[0] and losses[2])
    assert losses[0] == losses[2] == ["process 1 of 3 ended: the disk is full"]
    assert losses[1] == []


def test_those_who_fail_together_are_not_told(meet):
    teams, losses = meet(3)
    on_all(teams, lambda team: team.close(failed="no such file"))
    time.sleep(1.5)
    assert losses == {0: [], 1: [], 2: []}


def test_a_clean_end_waits_for_all(meet):
    teams, losses = meet(3)
    early = threading.Thread(target=teams[1].close, daemon=True)
    early.start()
    time.sleep(0.2)
    assert early.is_alive()
    on_all({i: teams[i] for i in (0, 2)}, lambda team: team.close())
    early.join(timeout=60)
    assert not early.is_alive() and losses == {0: [], 1: [], 2: []}


def test_missing_processes_are_named_to_those_who_came(meet):
    found, _ = meet(4, who=[0, 2], wait=0.5)
    for error in found.values():
        assert str(error).startswith("processes 1, 3 of 4 did not come within 0 s")
        assert isinstance(error, TryAgain)


def test_process_0_missing(meet):
    found, _ = meet(2, who=[1], wait=0.5)
    assert "process 0 of 2 did not answer at localhost:" in str(found[1])
    assert isinstance(found[1], TryAgain)


@pytest.mark.parametrize("error, code", [(UserError("bad input"), 2), (TryAgain("too late"), 3)])
def test_a_scheduler_can_tell_bad_input_from_bad_luck(error, code, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.main(fail)
    assert stop.value.code == code and capsys.readouterr().err == f"error: {error}\n"


def test_a_stranger_who_knocks_is_ignored():
    port, got = free_port(), []
    lead = threading.Thread(target=lambda: got.append(Team("", port, 2, 0, print, 10.0)))
    lead.start()
    eventually(lambda: _knock(port))
    member = Team("localhost", port, 2, 1, print, 10.0)
    lead.join(timeout=60)
    for team in (member, *got):
        team.close(failed="over")
    assert len(got) == 1


def _knock(port):
    try:
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    except OSError:
        return False
    return True
