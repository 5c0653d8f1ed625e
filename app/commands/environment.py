"""What the commands take from the environment: settings, and where price files lie."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.core.settings import Settings


class CommandFailed(Exception):
    """Why a command cannot do what was asked, and what to do about it, in words for whoever typed it."""


def read_settings(**given: Any) -> "Settings":
    """The settings of the environment, overridden by what is given and not None.

    Raises CommandFailed, which names each variable that is wrong.
    """
    # Commands that only talk to a server have no need of these, and start sooner.
    from pydantic import ValidationError

    from app.core.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        wrong = [
            "".join(f"SCANWIRE_{str(name).upper()}: " for name in one["loc"][:1])
            + one["msg"].removeprefix("Value error, ")
            for one in error.errors(include_url=False, include_input=False)
        ]
        raise CommandFailed("These settings are not valid:\n  " + "\n  ".join(wrong)) from None


def find_prices() -> Path:
    """The price file that `scanwire serve` would use. Raises CommandFailed when that is the sample and not made yet."""
    from app.application import SAMPLE_NAME

    settings = read_settings()
    path = settings.prices or settings.state_dir / SAMPLE_NAME
    if settings.prices is None and not path.exists():
        raise CommandFailed("The sample prices are not made yet; `scanwire serve` and `scanwire demo` make them.")
    return path
