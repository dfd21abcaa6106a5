"""The one exception that means "the user can mend this"."""


class ConfigError(ValueError):
    """A mistake in the configuration, the command line or the data that its message names.

    The message is one line: the field, what was expected and what came. `mae_jax.main` prints it
    and exits with status 2; everything else is a crash. It is a `ValueError`, so that users of the
    library can catch it without knowing this module.
    """
