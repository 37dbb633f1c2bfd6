"""`python -m mor_jax COMMAND`, as `mor COMMAND`."""

from mor_jax.cli.main import main

if __name__ == "__main__":
    main()
