"""Files, fingerprints, checksums, checks of configurations, logs and progress on the terminal.

Imports nothing else of easy_jax. What several processes agree on is in `parallel`.
"""
