"""The rendezvous and the watch, between threads: who is missing, doubled, lost, silent, stuck."""

import json
import re
import socket
import time

import pytest
from peer_threads import TIMEOUT, Run, leave

from easy_jax.parallel.rendezvous import EXIT_PEERS, PeersError


@pytest.mark.slow
def test_all_come_and_all_leave():
    run = Run(3)
    peers = run.all()
    time.sleep(1.2 * TIMEOUT)  # beats keep them together
    leave(peers)
    time.sleep(0.5)
    assert run.ended.empty()


@pytest.mark.slow
def test_the_missing_are_named_to_all_that_came():
    run = Run(5)
    start = time.monotonic()
    errors = run.together(lambda: run.peer(0), lambda: run.peer(2), lambda: run.peer(4))
    assert time.monotonic() - start < 2 * TIMEOUT
    for error in errors:
        assert "processes 1, 3 of 5 did not connect within 6 s" in str(error)


@pytest.mark.slow
def test_no_process_0():
    run = Run(2)
    with pytest.raises(
        PeersError, match=rf"process 1 did not find process 0 at {run.address} within"
    ):
        run.peer(1)


@pytest.mark.slow
def test_a_late_process_0_has_its_time():
    run = Run(2)

    def late():
        time.sleep(0.5 * TIMEOUT)
        return run.peer(0)

    peers = run.together(late, lambda: run.peer(1))
    leave(peers)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"index": 1}, "process 1 .* and process 1 .* have the same process id"),
        ({"index": 0}, "process 0 .* and process 0 .* have the same process id"),
        ({"index": 2, "count": 4}, "process 2 .* is one of 4 processes; process 0 is one of 3"),
    ],
)
def test_a_mistake_of_a_member_ends_all_at_once(other, message):
    run = Run(3)
    start = time.monotonic()

    def wrong():
        time.sleep(0.3)
        if other["index"] == 0:  # it says so itself, whatever it listens to
            with run.connect() as link:
                link.sendall(run.hello(link, 0))
                return PeersError(json.loads(link.recv(10_000))["reason"])
        return run.peer(**other)

    for error in run.together(lambda: run.peer(0), lambda: run.peer(1), wrong):
        assert isinstance(error, PeersError)
        assert re.search(message, str(error)), error
    assert time.monotonic() - start < 0.5 * TIMEOUT


def test_a_member_by_token_with_another_command_ends_all_at_once():
    run = Run(3)
    start = time.monotonic()

    def wrong():
        time.sleep(0.3)  # process 1 has come by then: only who is there can be told
        return run.peer(2, token="secret", run="other")

    errors = run.together(
        lambda: run.peer(0, token="secret"), lambda: run.peer(1, token="secret"), wrong
    )
    for error in errors:
        message = 'process 2 .* runs another command or version, "other"; process 0 runs "same"'
        assert re.search(message, str(error)), error
    assert time.monotonic() - start < 0.5 * TIMEOUT


@pytest.mark.slow
def test_who_says_nothing_keeps_nobody_waiting():
    run = Run(2)
    start = time.monotonic()

    def others():
        time.sleep(0.3)
        with run.connect() as line:
            line.sendall(b'{"hello"')
            peer = run.peer(1)
        return peer

    peers = run.together(lambda: run.peer(0), others)
    assert time.monotonic() - start < 0.5 * TIMEOUT
    leave(peers)


@pytest.mark.slow
def test_a_greeting_in_two_pieces():
    run = Run(3)

    def slow():
        time.sleep(0.3)
        with run.connect() as line:
            hello = run.hello(line, 1)
            line.sendall(hello[:10])
            time.sleep(0.5)
            line.sendall(hello[10:])
            return json.loads(line.recv(10_000))

    first, answer, last = run.together(lambda: run.peer(0), slow, lambda: run.peer(2))
    assert answer["go"] is True
    leave([first, last])


def test_what_comes_together_with_the_call_to_go_is_heard():
    run = Run(2)

    def leader():
        with socket.create_server(("", run.port)) as server:
            line, go = run.lead(server)
            line.sendall(go + b'{"end": 7, "reason": "it is over"}\n')
            return line

    line, peer = run.together(leader, lambda: run.peer(1))
    start = time.monotonic()
    assert run.ends(1) == {1: (7, "it is over")}
    assert time.monotonic() - start < 0.3 * TIMEOUT
    peer.close()
    line.close()


@pytest.mark.slow
def test_a_process_that_starts_again_before_all_are_there():
    run = Run(2)

    def again():
        time.sleep(0.3)
        with run.connect() as line:
            line.sendall(run.hello(line, 2))
            time.sleep(0.2)
        return run.peer(2)

    run.count = 3

    def last():
        time.sleep(1.0)
        return run.peer(1)

    leave(run.together(lambda: run.peer(0), again, last))


@pytest.mark.parametrize("lost", [0, 2])
def test_a_killed_process_ends_the_others_at_once(lost):
    run = Run(4, timeout=60)
    peers = run.all()
    start = time.monotonic()
    peers[lost]._closing = True  # its thread says nothing more
    for connection in peers[lost]._connections.values():
        connection.link.shutdown(socket.SHUT_RDWR)  # what the kernel does for a killed process
    ended = run.ends(3)
    peers[lost].close()
    assert time.monotonic() - start < 30
    assert ended.keys() == {0, 1, 2, 3} - {lost}
    for code, why in ended.values():
        assert code == EXIT_PEERS
        assert f"process {lost} (" in why
        assert why.endswith("is gone; run the same command again to continue")


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_process_ends_the_others_in_time(silent):
    run = Run(3)
    lines = []

    def mute_leader():
        with socket.create_server(("", run.port)) as server:
            led = [run.lead(server) for _ in range(2)]
        for line, go in led:
            lines.append(line)
            line.sendall(go)

    def mute_follower():
        time.sleep(0.3)
        lines.append(run.connect())
        lines[0].sendall(run.hello(lines[0], 1))

    expected = {0, 1, 2} - {silent}
    mute = mute_follower if silent else mute_leader
    run.together(mute, *(lambda i=i: run.peer(i) for i in expected))
    start = time.monotonic()
    ended = run.ends(2)
    for line in lines:
        line.close()
    assert time.monotonic() - start < 2 * TIMEOUT
    assert ended.keys() == expected
    for code, why in ended.values():
        assert code == EXIT_PEERS
        assert f"no heartbeat from process {silent} (" in why


@pytest.mark.parametrize("failed", [0, 1])
def test_a_process_that_fails_says_why_to_all(failed):
    run = Run(3)
    peers = run.all()
    peers[failed].fail(2, "config.seed is -1")
    ended = run.ends(2)
    peers[failed].close()
    for index in {0, 1, 2} - {failed}:
        assert ended[index] == (2, f"process {failed} ended: config.seed is -1")


@pytest.mark.slow
def test_a_run_that_does_not_move_is_told_by_place(capsys):
    run = Run(3, timeout=2.0)
    peers = run.all()
    for index, peer in enumerate(peers):
        peer.at("step 8" if index != 1 else "step 7")
        peer.compiles(index != 1)
    told = ""
    for _ in range(200):
        told += capsys.readouterr().err
        if "step 7" in told:
            break
        time.sleep(0.1)
    leave(peers)
    assert "no process has made progress for" in told
    assert "processes 0, 2 at step 8, compiling; process 1 at step 7. Compiling a large" in told
    assert run.ended.empty()
