"""Programs beside training: `python -m mae_jax.tools.NAME --help`."""
