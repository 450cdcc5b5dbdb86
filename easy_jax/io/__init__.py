"""Files, fingerprints, checksums, checks of configurations, logs and progress on the terminal.

It imports no other part of easy_jax. Communication between processes is in `parallel`.
"""
