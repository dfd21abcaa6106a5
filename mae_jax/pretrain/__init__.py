"""Pre-training methods: one module each, with a `make(**fields)` that `config.model` feeds."""
