"""The processes of a run as threads of one process, for the rendezvous and the watch."""

import json
import queue
import socket
import threading

from processes import free_port

from easy_jax.parallel.member import Member
from easy_jax.parallel.rendezvous import PeersError
from easy_jax.parallel.watch import Peers

TIMEOUT = 6.0


class Run:
    """The processes of a run as threads; whatever would end one goes into `ended`."""

    def __init__(self, count, timeout=TIMEOUT):
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.count = count
        self.timeout = timeout
        self.ended = queue.Queue()

    def peer(self, index, count=None, run="same", token=""):
        return Peers(
            self.address,
            count or self.count,
            index,
            timeout=self.timeout,
            run=run,
            token=token,
            end=lambda *why: self.ended.put((index, *why)),
        )

    def connect(self):
        """A connection to process 0 of somebody else."""
        return socket.create_connection(("127.0.0.1", self.port))

    def member(self, index):
        return Member(index, self.count, json.dumps("same"))

    def hello(self, link, index):
        """What a process says, in bytes: for those that the tests speak for themselves."""
        theirs = json.loads(link.recv(10_000))["challenge"]
        hello = {**self.member(index).hello(), "challenge": "mine"}
        proof = self.member(index).proof("hello", theirs, hello)
        return json.dumps({**hello, "proof": proof}).encode() + b"\n"

    def lead(self, server):
        """Plays process 0 for the next that connects; returns the connection, and its `go`."""
        link, _ = server.accept()
        link.sendall(b'{"challenge": "mine"}\n')
        theirs = json.loads(link.recv(10_000))["challenge"]
        proof = self.member(0).proof("go", "mine", theirs)
        return link, json.dumps({"go": True, "proof": proof}).encode() + b"\n"

    def together(self, *makers):
        """What each maker gives or raises, all started at the same time."""
        results = [None] * len(makers)

        def go(place, make):
            try:
                results[place] = make()
            except PeersError as error:
                results[place] = error

        threads = [threading.Thread(target=go, args=item) for item in enumerate(makers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def all(self):
        return self.together(*(lambda i=i: self.peer(i) for i in range(self.count)))

    def ends(self, count):
        found = [self.ended.get(timeout=3 * self.timeout) for _ in range(count)]
        return {index: (code, why) for index, code, why in found}


def leave(peers):
    for peer in reversed(peers):  # process 0 waits for the others' farewell
        peer.close()
