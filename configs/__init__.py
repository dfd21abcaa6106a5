"""One file, one experiment. Installed as `mae_jax.configs`."""
