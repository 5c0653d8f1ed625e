"""The `scanwire` command.

Worker processes load this module again, so importing it does nothing and loads little: each command imports what it
needs.
"""

import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands.datasets import data_app
from app.commands.journal import journal_app
from app.commands.operating import operating_app

if TYPE_CHECKING:
    from app.client import Client

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_PORT = 8000
COMPLETED, FAILED, REFUSED, UNREACHABLE, CANCELLED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 3, 4, 130, 141
STATE_CODES = {"completed": COMPLETED, "cancelled": CANCELLED}
EXTERNAL = "external"
EXIT_CODES = (
    "Exit codes: 0 completed · 1 the scan failed or was lost · 2 wrong usage, or the server refused · "
    "3 no server can be reached · 4 the scan was cancelled · 130 Ctrl-C · 141 the reader of a pipe left."
)
ENVIRONMENT = "The environment variable SCANWIRE_API_KEY is the key for a server that asks for one."

app = typer.Typer(
    name="scanwire",
    help="Runs long scans and pushes what they find.",
    epilog=f"{EXIT_CODES}\n\n{ENVIRONMENT}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(operating_app)
app.add_typer(journal_app, name="journal")

Url = Annotated[str, typer.Option("--url", envvar="SCANWIRE_URL", help="Address of the server. " + ENVIRONMENT)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout, for pipes.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="TCP port to serve on.")]


def main() -> None:
    """Runs the command line; the exit codes are those of `scanwire --help`."""
    app(prog_name="scanwire")


def _version(is_wanted: bool) -> None:
    if is_wanted:
        from app import __version__

        typer.echo(f"scanwire {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


# Serving


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Port = DEFAULT_PORT,
    prices: Annotated[str | None, typer.Option(help="Price file (Parquet); the real sample when left out.")] = None,
    state_dir: Annotated[str | None, typer.Option(help="Where the journal is kept.")] = None,
    takeover: Annotated[
        bool, typer.Option("--takeover", help="Ask the server on this state directory to end, and go on in its place.")
    ] = False,
) -> None:
    """Serve until Ctrl-C or SIGTERM. All other settings are SCANWIRE_* environment variables."""
    from app.commands.environment import CommandFailed
    from app.commands.launch import run_server

    try:
        run_server(host, port, prices, state_dir, takes_over=takeover)
    except CommandFailed as error:
        _fail(str(error), REFUSED)


@app.command()
def demo(port: Port = DEFAULT_PORT) -> None:
    """Serve the sample prices, run a scan over them before your eyes, and go on serving."""
    from app.commands.demo import run_demo
    from app.commands.environment import CommandFailed

    try:
        run_demo(port)
    except CommandFailed as error:
        _fail(str(error), REFUSED)


@app.command()
def key(name: Annotated[str, typer.Argument(help="Who the key is for.")]) -> None:
    """Make a random API key, and the setting that lets it in. The server keeps only its hash."""
    import secrets

    from app.core.settings import hash_key

    if not name or set(name) & set(":, \t\n"):
        _fail("The name of a key has no colon, comma or space.", REFUSED)
    api_key = secrets.token_urlsafe(32)
    typer.echo(f"The key, for the client (it is shown this once):\n  SCANWIRE_API_KEY={api_key}")
    typer.echo(f"For the server (separate several with commas):\n  SCANWIRE_API_KEYS={name}:{hash_key(api_key)}")


# Scans


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Every parameter of the scanner is a flag too, such as --gap-pct-min 0.08; "
    "`scanwire scanners NAME` lists them. " + EXIT_CODES,
)
def scan(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A scanner; `scanwire scanners` lists them.")],
    start: Annotated[str | None, typer.Option(help="First day of matches, YYYY-MM-DD.")] = None,
    end: Annotated[str | None, typer.Option(help="Last day of matches, YYYY-MM-DD.")] = None,
    symbols: Annotated[str | None, typer.Option(help="Only these, such as AAPL,MSFT.")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition, such as 'gap_pct > 0.08'.")] = None,
    preset: Annotated[str | None, typer.Option(help="Values to start from, such as relaxed.")] = None,
    param: Annotated[list[str] | None, typer.Option(help="Any parameter as KEY=VALUE; repeatable.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run it, though the same scan exists.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Submit, print the id, and leave.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Run a scan and show what it finds, live. Ctrl-C leaves it running."""
    if name == EXTERNAL:
        from app.commands.environment import name_command

        _fail(
            "A scan of `external` is worked on elsewhere: there is nothing to run here. Post what your program finds "
            f'with: your-program | {name_command()} publish --title "…"',
            REFUSED,
        )
    given = {"start": start, "end": end, "where": where, "preset": preset}
    params: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if symbols is not None:
        params["symbols"] = [symbol.strip() for symbol in symbols.split(",") if symbol.strip()]
    own = [option for parameter in context.command.params for option in parameter.opts if option.startswith("--")]

    async def run(client: "Client", watching: list[str]) -> int:
        if param or context.args:
            params.update(await _read_params(client, name, context.args, param or [], own))
        submitted = await client.submit(name, params, reuse="never" if fresh else "auto")
        snapshot = submitted.submitted or {}
        watching.append(submitted.id)
        if detach:
            typer.echo(_dump(snapshot) if as_json else submitted.id)
            return COMPLETED
        if snapshot.get("joined"):
            _say(f"The same scan exists already; this is it ({snapshot['state']}). --fresh runs it anew.")
        return await _watch(client, [submitted.id], as_json, {submitted.id: name})

    _finish(_call(run, url))


@app.command(
    epilog='A line is an event, such as {"type":"progress","done":1}, {"type":"matches","rows":[…]} or '
    '{"type":"end","state":"completed"}; an object without a type is one match. ' + EXIT_CODES
)
def publish(
    title: Annotated[str, typer.Option(help="What it is, for people.")],
    total: Annotated[int | None, typer.Option(min=0, help="Units of work, if that is known.")] = None,
    unit: Annotated[str, typer.Option(help="What `done` and the total count.")] = "steps",
    url: Url = DEFAULT_URL,
) -> None:
    """Publish lines of JSON from standard input as a scan, as they come. Its id and address are the first line out.

    At the end of the input the scan is completed, by a bad line it failed, by Ctrl-C it is cancelled.
    """

    async def run(client: "Client", watching: list[str]) -> int:
        from app.commands.publish import publish_input

        return STATE_CODES.get(await publish_input(client, title, total, unit), FAILED)

    _finish(_call(run, url))


@app.command(epilog=EXIT_CODES)
def watch(
    ids: Annotated[list[str], typer.Argument(help="Ids of scans.")], as_json: Json = False, url: Url = DEFAULT_URL
) -> None:
    """Show scans from their first event to their end. Ctrl-C leaves them running."""
    ids = list(dict.fromkeys(ids))

    async def run(client: "Client", watching: list[str]) -> int:
        watching += ids
        return await _watch(client, ids, as_json, {})

    _finish(_call(run, url))


@app.command(epilog=EXIT_CODES)
def cancel(
    id: Annotated[str, typer.Argument(help="Id of a scan.")], as_json: Json = False, url: Url = DEFAULT_URL
) -> None:
    """Cancel a scan; what it found is kept."""

    async def run(client: "Client", watching: list[str]) -> int:
        snapshot = await client.scan(id).cancel()
        found = f"{snapshot['matches']:,} match{'es' * (snapshot['matches'] != 1)}"
        typer.echo(_dump(snapshot) if as_json else f"{snapshot['scanner']} {snapshot['state']}, {found} kept")
        return COMPLETED

    _finish(_call(run, url))


@app.command("list", epilog=EXIT_CODES)
def list_scans(
    limit: Annotated[int, typer.Option(min=1, help="Show no more than this.")] = 20,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Your scans, newest first."""

    async def run(client: "Client", watching: list[str]) -> int:
        snapshots = await client.list(limit)
        if as_json:
            for snapshot in snapshots:
                typer.echo(_dump(snapshot))
            return COMPLETED
        from app.commands.listings import print_scans

        print_scans(snapshots)
        return COMPLETED

    _finish(_call(run, url))


@app.command(epilog=EXIT_CODES)
def scanners(
    name: Annotated[str | None, typer.Argument(help="Show the parameters of this one.")] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """The scanners that there are, or the parameters of one."""

    async def run(client: "Client", watching: list[str]) -> int:
        from app.commands.listings import print_scanner, print_scanners

        known = await client.scanners()
        chosen = known if name is None else [_find_scanner(known, name)]
        if as_json:
            for scanner in chosen:
                typer.echo(_dump(scanner))
        elif name is None:
            print_scanners(known)
        else:
            print_scanner(chosen[0])
        return COMPLETED

    _finish(_call(run, url))


# What commands share


def _call(run: "Callable[[Client, list[str]], Coroutine[Any, Any, int]]", url: str) -> int:
    """The exit code of a command that talks to a server; says what went wrong in one sentence."""
    import asyncio

    from app.client import Client, ClientError, RequestRefused, ResultLost
    from app.commands.environment import CommandFailed, name_command

    watching: list[str] = []

    async def connect() -> int:
        async with Client(url, os.environ.get("SCANWIRE_API_KEY") or None) as client:
            return await run(client, watching)

    try:
        return asyncio.run(connect())
    except BrokenPipeError:  # the reader of the pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        if watching:
            back = f"{name_command()} watch {' '.join(watching)}" + (f" --url {url}" if url != DEFAULT_URL else "")
            _say(f"\n{'The scan goes' if len(watching) == 1 else 'The scans go'} on. Come back with: {back}")
        return INTERRUPTED
    except RequestRefused as error:
        is_told = error.retry_after_s is None or "Try again in" in str(error)
        _say(f"Refused: {error}" + ("" if is_told else f" Try again in {error.retry_after_s:,.0f} s."))
        return REFUSED
    except CommandFailed as error:
        _say(str(error))
        return REFUSED
    except ResultLost as error:
        _say(str(error))
        return FAILED
    except ClientError as error:
        _say(str(error))
        return UNREACHABLE


async def _read_params(
    client: "Client", name: str, words: Sequence[str], assignments: Sequence[str], own: Sequence[str]
) -> dict[str, Any]:
    from app.commands.flags import read_assignments, read_flags

    schema = _find_scanner(await client.scanners(), name)["params"]
    return read_assignments(assignments, schema) | read_flags(words, schema, own)


def _find_scanner(known: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    import difflib

    from app.commands.environment import CommandFailed

    for scanner in known:
        if scanner["name"] == name:
            return scanner
    names = [scanner["name"] for scanner in known]
    near = difflib.get_close_matches(name, names, n=1)
    advice = f"did you mean {near[0]}? There" if near else "there"
    raise CommandFailed(f"There is no scanner {name!r}; {advice} are: {', '.join(names)}.")


async def _watch(client: "Client", ids: Sequence[str], as_json: bool, names: dict[str, str]) -> int:
    from app.commands.terminal import ScanView, choose_display, show_events

    views = [ScanView(id, names.get(id, "scan")) for id in ids]
    display = choose_display(views, as_json=as_json)
    await show_events(views, display, client.watch(ids))
    worst = (FAILED, CANCELLED, COMPLETED)
    return min((STATE_CODES.get(view.state, FAILED) for view in views), key=worst.index)


def _dump(value: Any) -> str:
    import orjson

    return orjson.dumps(value).decode()


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _fail(text: str, code: int) -> None:
    _say(text)
    raise typer.Exit(code)


def _finish(code: int) -> None:
    raise typer.Exit(code)
