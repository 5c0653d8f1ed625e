"""What the commands take from the environment: settings, and where price files lie."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.core.settings import Settings


class CommandFailed(Exception):
    """Why a command cannot do what was asked, and what to do about it, in words for whoever typed it."""


def name_command() -> str:
    """How to call this command again from the same directory: `scanwire` if that finds it, else as it was called."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m app"
    found = shutil.which("scanwire")
    is_found = found is not None and called.exists() and called.samefile(found)
    return "scanwire" if is_found else shlex.quote(sys.argv[0])


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
        raise CommandFailed(f"The sample prices are not made yet; `{name_command()} demo` makes them.")
    return path
