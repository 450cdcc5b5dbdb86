"""How the processes of a run know of each other: who is missing at the start, who is lost later."""

from easy_jax.peers.rendezvous import EXIT_PEERS, TOKEN_VARIABLE, PeersError, processes
from easy_jax.peers.watch import Peers

__all__ = ["EXIT_PEERS", "TOKEN_VARIABLE", "Peers", "PeersError", "processes"]
