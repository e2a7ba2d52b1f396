"""The package's own errors: each message says what is wrong, where, and what to do."""


class VQVAEError(Exception):
    """Base of every error a user can mend; scripts print it as one line and exit with status 2."""


class ConfigError(VQVAEError):
    """A flag or a field of config.json has a value that cannot work."""


class DataError(VQVAEError):
    """The images cannot be found or read."""


class WeightsError(VQVAEError):
    """A file of pre-trained weights cannot be used."""


class CheckpointError(VQVAEError):
    """A run's checkpoint cannot be written or read."""


class DivergenceError(VQVAEError):
    """The training loss is no longer finite."""


class PeerError(VQVAEError):
    """Another process of the same run has ended or cannot be reached."""


def require(condition: bool, name: str, found: object, expected: str) -> None:
    """Raises ConfigError where a flag or an argument, ``name``, is not as expected."""
    if not condition:
        raise ConfigError(f"{name} is {found!r}, but must be {expected}")
