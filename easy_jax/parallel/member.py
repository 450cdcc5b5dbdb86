"""Authentication of the processes of a run towards each other, over an open port.

All processes of a run share a key. It is derived from the token that the launcher gives them
(`EASY_JAX_RUN_TOKEN`). Without a token, it is derived from the package version and command line, so
that no setting is needed. The key is never sent: each side sends a random challenge, and the other
proves that it has the key by a keyed hash (HMAC-SHA256) of the challenges and its message.

A key without a token only protects against mistakes, such as a process of another run that connects
to the wrong port. Only a token protects against intruders, who may know the command line.
"""

import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import socket
from typing import Any

from easy_jax.parallel.connection import printable

TOKEN_VARIABLE = "EASY_JAX_RUN_TOKEN"
_MAX_RUN_LENGTH = 2000  # characters of a version and command line in a message
_FIELDS = {
    "hello": int,
    "count": int,
    "run": str,
    "digest": str,
    "has_token": bool,
    "host": str,
    "pid": int,
    "challenge": str,
    "proof": str,
}


def challenge() -> str:
    """Returns a new random text (128 bits, hexadecimal), which a proof must cover."""
    return secrets.token_hex(16)


@dataclasses.dataclass(frozen=True)
class Member:
    """A process of a run, with the key that it shares with the others.

    Args:
      index: the id of this process, from 0 to `count` - 1.
      count: number of processes of the run.
      run: JSON of what all processes have in common, such as version and command line.
      token: the secret from the launcher; empty if there is none.
    """

    index: int
    count: int
    run: str
    token: str = dataclasses.field(default="", repr=False)

    def hello(self) -> dict[str, Any]:
        """Returns the message by which this process identifies itself to another.

        `run` may be truncated in it; `digest` covers the whole.
        """
        return {
            "hello": self.index,
            "count": self.count,
            "run": printable(self.run, _MAX_RUN_LENGTH),
            "digest": hashlib.sha256(self.run.encode()).hexdigest(),
            "has_token": bool(self.token),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def proof(self, role: str, *parts: Any) -> str:
        """Returns a keyed hash, which shows that the sender of a message has the key of the run.

        Args:
          role: the purpose of the proof, so that it cannot be replayed for another one.
          *parts: JSON-serialisable values that it covers, such as challenges and the message.
        """
        text = f"token {self.token}" if self.token else f"run {self.run}"
        key = hashlib.sha256(text.encode()).digest()
        return hmac.new(
            key, json.dumps([role, *parts], sort_keys=True).encode(), "sha256"
        ).hexdigest()

    def is_proof(self, proof: Any, role: str, *parts: Any) -> bool:
        """Returns whether a received proof is the right one for the role and parts (`proof`)."""
        return isinstance(proof, str) and hmac.compare_digest(
            proof.encode(errors="replace"), self.proof(role, *parts).encode()
        )

    def difference(self, hello: dict[str, Any]) -> tuple[str, str]:
        """Describes why another process does not belong to the run of this one.

        Args:
          hello: the message of the other process, checked by `is_hello`.

        Returns:
          A phrase about the other process and one about this process; both are empty if nothing
          differs. Without a token, `run` is the key, so the second phrase must only be sent to
          processes that have proven to have the key.
        """
        ours = self.hello()
        if hello["count"] != self.count:
            return f"is one of {printable(hello['count'], 20)} processes", f"is one of {self.count}"
        if hello["has_token"] != ours["has_token"]:
            has, ours_has = ("a" if there["has_token"] else "no" for there in (hello, ours))
            return f"has {has} token in {TOKEN_VARIABLE}", f"has {ours_has} token"
        if hello["digest"] != ours["digest"]:
            run = printable(hello["run"], _MAX_RUN_LENGTH)
            return f"runs another command or version, {run}", f"runs {ours['run']}"
        return "", ""


def is_hello(message: dict[str, Any]) -> bool:
    """Returns whether a message from an unidentified sender has the form of `Member.hello`."""
    types = {name: type(value) for name, value in message.items()}  # a bool is not an int here
    return types == _FIELDS and 0 <= message["hello"] < 1 << 20


def name_of(hello: dict[str, Any]) -> str:
    """Returns a printable name for the process that sent a hello message."""
    host, pid = (printable(hello[field], 100) for field in ("host", "pid"))
    return f"process {hello['hello']} ({host}, pid {pid})"
