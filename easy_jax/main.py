"""The command line by its old name: `python -m easy_jax.main`; it is in `easy_jax.cli`."""

from easy_jax.cli.main import cli

__all__ = ["cli"]

if __name__ == "__main__":
    cli()
