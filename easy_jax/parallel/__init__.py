"""Device meshes and shardings, the processes of a run, their rendezvous and the lock of a workdir.

Knows neither models nor data.
"""
