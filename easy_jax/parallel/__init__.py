"""Device meshes and shardings, the processes of a run, their rendezvous and the lock of a workdir.

This package does not depend on models or data.
"""
