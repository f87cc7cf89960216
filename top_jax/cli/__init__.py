"""The commands, one thin file each: `python -m top_jax.cli.<command> --help`."""
