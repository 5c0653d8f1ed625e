"""`scanwire demo`: the sample prices, a scan over them before the user's eyes, and a server that stays."""

import os
from pathlib import Path

import httpx
from rich.console import Console

from app.application import SAMPLE_NAME
from app.client import Client, ClientError
from app.commands.environment import CommandFailed, name_command, read_settings
from app.commands.holder import refuse_if_held
from app.commands.launch import Launch, describe_store, open_socket, say
from app.commands.terminal import ScanView, choose_display, show_events
from app.core.errors import PricesError
from app.core.settings import Settings
from app.market.sample import make_sample
from app.observe.logs import configure_logging

DEMO_SCANNER = "gap-up"
DEMO_PARAMS = {"start": "2005-01-01", "preset": "relaxed"}
DEFAULT_URL = "http://127.0.0.1:8000"
DEMO_SETTINGS = {
    "chunk_rows": 1,  # one chunk a symbol, so that there is something to see of a small sample
    "submit_per_min": 30,  # the demo's own scan and those that its user tries out are charged to the same address
}


def read_demo_settings() -> Settings:
    """The settings of the environment; where it has none, those that suit a demo. Raises CommandFailed."""
    return read_settings(
        **{name: value for name, value in DEMO_SETTINGS.items() if f"SCANWIRE_{name.upper()}" not in os.environ}
    )


def run_demo(port: int) -> None:
    """Serves the sample, shows a scan over it, and serves on until SIGINT or SIGTERM. Raises CommandFailed."""
    settings = read_demo_settings()
    sample = settings.state_dir / SAMPLE_NAME
    settings = settings.model_copy(update={"prices": sample})
    refuse_if_held(settings.state_dir)
    listener = open_socket("127.0.0.1", port)
    configure_logging(settings.log_format, level="WARNING")
    _make_missing_sample(sample)
    Launch(settings, listener).run(_show_demo)


def _make_missing_sample(path: Path) -> None:
    if path.exists():
        return
    try:
        with Console().status("Making the sample prices"):
            make_sample(path)
    except PricesError as error:
        raise CommandFailed(error.detail) from None


async def _show_demo(launch: Launch) -> int:
    say(f"Prices: {describe_store(launch.service.store)}")
    words = " ".join(f"--{name} {value}" for name, value in DEMO_PARAMS.items())
    command = f"{name_command()} scan {DEMO_SCANNER} {words}"
    say(f"Scan:   {command}\n")
    try:
        path = await _show_scan(launch.url)
    except ClientError as error:  # such as a key that this server wants and nobody gave
        say(f"The scan could not be shown: {error}")
        return 0
    url_flag = "" if launch.url == DEFAULT_URL else f" --url {launch.url}"
    say(
        f"""
Scanwire goes on serving until Ctrl-C.
The page:                  {launch.url}/
The API:                   {launch.url}/openapi.json
All rows of this scan:     {launch.url}{path}/matches.csv
Its events, as they come:
  curl -N -H 'Accept: text/event-stream' {launch.url}{path}/events
The same from another terminal:
  {command}{url_flag}"""
    )
    return 0


async def _show_scan(url: str) -> str:
    """Runs the scan through the server's own front door, and gives its path."""
    # A transport of its own: the server is on this machine, whatever proxy the environment names.
    transport = httpx.AsyncHTTPTransport()
    async with Client(url, os.environ.get("SCANWIRE_API_KEY") or None, transport=transport) as client:
        scan = await client.submit(DEMO_SCANNER, DEMO_PARAMS)
        views = [ScanView(scan.id, DEMO_SCANNER)]
        await show_events(views, choose_display(views, as_json=False), client.watch([scan.id]))
    return f"/v1/scans/{scan.id}"
