"""What the environment may say to a server, and what it may not."""

import pytest
from pydantic import ValidationError

from app.commands.environment import CommandFailed, read_settings
from app.core.settings import Settings


def test_a_mistyped_setting_is_refused_by_name_with_the_one_that_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANWIRE_MAX_RUNING", "4")
    with pytest.raises(ValidationError, match="SCANWIRE_MAX_RUNING is not a setting"):
        Settings()
    monkeypatch.setenv("SCANWIRE_ZZZ", "1")
    with pytest.raises(CommandFailed) as refusal:
        read_settings()
    assert str(refusal.value).splitlines()[1:] == [
        "  SCANWIRE_MAX_RUNING is not a setting; did you mean SCANWIRE_MAX_RUNNING? "
        "SCANWIRE_ZZZ is not a setting; unset it."
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SCANWIRE_URL", "http://127.0.0.1:8000"),
        ("SCANWIRE_API_KEY", "k1"),
        ("SCANWIRE_TEST_REQUIRE", "all"),
        # Kubernetes, for a service that is called scanwire.
        ("SCANWIRE_SERVICE_HOST", "10.0.0.1"),
        ("SCANWIRE_SERVICE_PORT_HTTP", "8000"),
        ("SCANWIRE_PORT", "tcp://10.0.0.1:8000"),
        ("SCANWIRE_PORT_8000_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_what_is_meant_for_others_is_let_be(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    read_settings()


def test_a_setting_may_be_written_in_small_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("scanwire_max_running", "4")
    assert read_settings().max_running == 4
