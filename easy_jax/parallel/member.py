"""What makes a process a member of a run, and how it proves that over an open port.

All processes share a key: of the token that the launcher gives them (`EASY_JAX_RUN_TOKEN`), else of
what they run, so that the processes of one run find each other without any setting. The key is
never sent. Each side sends a random challenge and proves that it has the key by a keyed hash
(HMAC-SHA256) of both challenges and its message. A key of what they run keeps mistakes apart,
such as a process of another run; only a token keeps out who wants to come in.
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
_MAX_WORDS = 2000  # characters of a command line in a message
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
    """A random text that nobody has proven anything with before."""
    return secrets.token_hex(16)


@dataclasses.dataclass(frozen=True)
class Member:
    """A process of a run.

    Args:
      index, count: which of the processes this is, and how many there are.
      run: JSON of what all have in common, such as version and command line.
      token: the launcher's, or empty.
    """

    index: int
    count: int
    run: str
    token: str = dataclasses.field(default="", repr=False)

    def hello(self) -> dict[str, Any]:
        """What the process says of itself; its command is cut, the digest is of all of it."""
        return {
            "hello": self.index,
            "count": self.count,
            "run": printable(self.run, _MAX_WORDS),
            "digest": hashlib.sha256(self.run.encode()).hexdigest(),
            "has_token": bool(self.token),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def proof(self, role: str, *parts: Any) -> str:
        """Proves that whoever sends the parts, in this role, has the key of the run."""
        text = f"token {self.token}" if self.token else f"run {self.run}"
        key = hashlib.sha256(text.encode()).digest()
        return hmac.new(
            key, json.dumps([role, *parts], sort_keys=True).encode(), "sha256"
        ).hexdigest()

    def is_proof(self, proof: Any, role: str, *parts: Any) -> bool:
        """Whether that proves it."""
        return isinstance(proof, str) and hmac.compare_digest(
            proof.encode(errors="replace"), self.proof(role, *parts).encode()
        )

    def difference(self, hello: dict[str, Any]) -> tuple[str, str]:
        """Why another process cannot be of this run: nothing, if it can.

        Args:
          hello: what it says of itself (`is_hello`).

        Returns:
          The reason, and what this process has in its place, which is told only to members:
          what they run is the key of those without a token.
        """
        ours = self.hello()
        if hello["count"] != self.count:
            return f"is one of {printable(hello['count'], 20)} processes", f"is one of {self.count}"
        if hello["has_token"] != ours["has_token"]:
            has, ours_has = ("a" if there["has_token"] else "no" for there in (hello, ours))
            return f"has {has} token in {TOKEN_VARIABLE}", f"has {ours_has} token"
        if hello["digest"] != ours["digest"]:
            run = printable(hello["run"], _MAX_WORDS)
            return f"runs another command or version, {run}", f"runs {ours['run']}"
        return "", ""


def is_hello(message: dict[str, Any]) -> bool:
    """Whether a message is one, whoever sends it."""
    types = {name: type(value) for name, value in message.items()}  # a bool is no number
    return types == _FIELDS and 0 <= message["hello"] < 1 << 20


def name_of(hello: dict[str, Any]) -> str:
    """How messages name a process that has said hello."""
    host, pid = (printable(hello[field], 100) for field in ("host", "pid"))
    return f"process {hello['hello']} ({host}, pid {pid})"
