"""`python -m top_jax` is the command `top-jax`."""

from top_jax.cli.main import main

if __name__ == "__main__":  # not in worker processes, which import this file
    main()
