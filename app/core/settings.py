"""Every bound of the service, with its unit in its name. Read from `SCANWIRE_*` environment variables."""

import difflib
import hashlib
import os
import re
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "scanwire"


PREFIX = "SCANWIRE_"
JOURNAL_NAME = "journal.db"  # in the state directory
# What else may be in the environment: of the commands that talk to a server, of the tests, and what Kubernetes and
# Docker set for a service that is called scanwire.
_NOT_SETTINGS = re.compile(rf"{PREFIX}(URL|API_KEY|TEST_.*|(.+_)?(SERVICE_(HOST|PORT)|PORT_[0-9]+_(TCP|UDP))(_.*)?)")
_LINK = ("tcp://", "udp://")

Commas = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """Settings of one server. An unknown or wrong value is refused at start, by name.

    Lists are written with commas: `SCANWIRE_ALLOWED_HOSTS=scan.example.org,localhost`.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    # Where things are kept.
    state_dir: Path = Field(default_factory=_state_dir, description="journal and sample prices are kept here")
    prices: Path | None = Field(None, description="Parquet price file; the real sample when not set")

    # Running scans.
    max_running: int = Field(2, ge=1, le=1000, description="scans that run at the same time (slots)")
    max_queued: int = Field(16, ge=0, le=100_000, description="scans that may wait; 0 refuses when the slots are full")
    max_active_per_client: int = Field(8, ge=1, description="scans of one client that may be queued or running")
    workers: int = Field(default_factory=lambda: os.cpu_count() or 2, ge=1, le=256, description="worker processes")
    worker_memory_mb: int = Field(
        2048, ge=0, description="memory of one worker process; 0 for no bound. A chunk as large as they come takes 300"
    )
    chunk_deadline_s: float = Field(60, gt=0, description="a worker that has a chunk for longer is killed")
    scan_deadline_s: float = Field(300, gt=0, description="a scan that runs longer is failed")
    chunk_rows: int = Field(200_000, ge=1, description="price rows in one chunk, about")
    reuse_s: float = Field(300, ge=0, description="a finished scan answers the same request this long")
    max_skipped: int = Field(1000, ge=0, description="symbols with skipped rows named in the end of a scan")
    max_matches: int = Field(100_000, ge=1, description="match rows kept for one scan; more are counted, not kept")

    # External scans: their work is done elsewhere.
    max_external: int = Field(1000, ge=0, description="external scans that are active, in all")
    producer_timeout_s: float = Field(60, gt=0, description="an external scan whose producer is silent so long is lost")
    max_events_body_bytes: int = Field(2**20, ge=128, description="one request body of a producer")
    max_events_per_request: int = Field(5000, ge=2, description="events and match rows in one request of a producer")
    max_row_bytes: int = Field(16_384, ge=16, description="one match row of a producer, as JSON")
    max_rows_bytes: int = Field(64 * 2**20, ge=16, description="match rows kept for one external scan, as JSON")

    # Prices for charts.
    max_price_rows: int = Field(2000, ge=1, description="price rows in one answer")
    price_wait_s: float = Field(10, gt=0, description="reading prices for an answer may take so long, then is refused")

    # What is kept.
    durability: Literal["process", "power"] = Field(
        "process", description="what a commit outlives: the process, or a power cut too (a flush of the disk each)"
    )
    retention_s: float = Field(3600, gt=0, description="events and matches are kept this long after the end")
    tombstone_s: float = Field(86_400, ge=0, description="the end and snapshot are kept this much longer")
    max_scans_kept: int = Field(10_000, ge=1, description="finished scans kept; the oldest go first")
    log_memory_bytes: int = Field(64 * 2**20, ge=0, description="events of finished scans held in memory, in all")
    idempotency_s: float = Field(86_400, gt=0, description="an Idempotency-Key is remembered this long")
    max_idempotency_keys: int = Field(10_000, ge=1, description="idempotency keys remembered in all")

    commit_wait_s: float = Field(10, gt=0, description="a request waits this long for the journal, then is refused")

    # Peers.
    head_wait_s: float = Field(10, gt=0, description="a request head must be there within this time")
    body_wait_s: float = Field(20, gt=0, description="a request body must be there within this time")
    max_head_bytes: int = Field(32_768, ge=1024, description="address and header fields of one request")
    max_connections: int = Field(25_000, ge=1, description="open connections in all")
    max_connections_per_client: int = Field(
        1000, ge=1, description="open connections from one address; loopback and trusted proxies hold as many as come"
    )
    min_send_bytes_per_s: int = Field(1024, ge=0, description="an answer that is taken more slowly is cut off")
    max_pings_per_heartbeat: int = Field(100, ge=1, description="pings of one WebSocket between two heartbeats")
    max_fragments_per_message: int = Field(1000, ge=1, description="fragments of one WebSocket message")

    # Limits of one client: a bucket each, as <amount> per <period>.
    submit_per_min: float = Field(2, gt=0)
    submit_heavy_per_hour: float = Field(10, gt=0)
    heavy_rows: int = Field(1_000_000, ge=1, description="a scan over more price rows than this is heavy")
    read_per_s: float = Field(5, gt=0)
    read_burst: int = Field(20, ge=1)
    connect_per_s: float = Field(2, gt=0)
    connect_burst: int = Field(10, ge=1)
    message_per_s: float = Field(10, gt=0)
    message_burst: int = Field(50, ge=1)
    legacy_execute_per_min: float = Field(100, gt=0, description="POST /api/scan/execute, whose clients send many")
    max_buckets: int = Field(100_000, ge=16, description="token buckets held in all")
    max_streams_per_client: int = Field(32, ge=1)
    max_streams: int = Field(20_000, ge=1, description="open streams in all")
    max_scans_per_stream: int = Field(100, ge=1, description="scans that one connection may watch")

    # Push.
    heartbeat_s: float = Field(15, gt=0)
    retry_ms: int = Field(2000, ge=0, description="the wait a browser is told to make before it reconnects")
    progress_per_s: float = Field(20, gt=0, description="progress events of one scan shown in a second")
    batch_ms: float = Field(0, ge=0, description="new events wait this long for others to share a write with")
    batch_max_ms: float = Field(20, ge=0, description="the longest that load makes them wait")
    high_water_bytes: int = Field(
        65_536, ge=1024, description="a transport that holds more is behind; of a stream that was level, with anything"
    )
    io_uring: bool = Field(True, description="what goes to many takes one system call, where the kernel allows it")
    stall_s: float = Field(30, gt=0, description="a stream that is behind for this long is cut off")
    # Proxies, nginx among them, give an answer 60 s to begin.
    long_poll_max_s: float = Field(50, gt=0, description="a long poll is held open for this long at the most")
    max_message_bytes: int = Field(65_536, ge=128, description="one WebSocket message in")
    max_body_bytes: int = Field(65_536, ge=128, description="one request body")

    # Clients of old, under /api.
    legacy_wait_s: float = Field(
        20, ge=0, le=600, description="POST /api/scan/execute waits this long for the end, and answers with the rows"
    )
    legacy_memory_bytes: int = Field(
        16 * 2**20, ge=0, description="rows of finished scans held in memory in the form of old, in all"
    )

    # Reaper.
    reap_every_s: float = Field(5, gt=0)
    max_sessions: int = Field(100_000, ge=1, description="sessions held in all")
    session_idle_s: float = Field(90, gt=0, description="a client that polled is gone after this silence")
    queued_unwatched_s: float = Field(300, gt=0, description="a queued scan nobody watched for this long is cancelled")

    # Stop, and the watch over the event loop.
    drain_s: float = Field(10, ge=0, description="a stop gives scans and streams this long, and ends within 2 s more")
    takeover_wait_s: float = Field(60, gt=0, description="--takeover waits this long for the other process to end")

    block_report_ms: float = Field(250, ge=1, description="an event loop blocked for longer is logged, with its stack")

    # Who may ask.
    allowed_hosts: Commas = Field(("localhost", "127.0.0.1", "[::1]"), description="Host names served; * for any")
    allowed_origins: Commas = Field((), description="Origins beside the server's own; * for any")
    trusted_proxies: Commas = Field((), description="networks whose X-Forwarded-For is believed")
    api_keys: Commas = Field((), description="name:sha256-hex of each key; when set, a key is necessary")
    operator_keys: Commas = Field((), description="name:sha256-hex; these open /v1/operations as well")

    log_format: Literal["console", "json"] = "console"

    # Diagnosis: what is measured over the window is held against its target; 1.5 times as much is an incident.
    diagnose_every_s: float = Field(5, gt=0)
    diagnosis_window_s: float = Field(300, gt=0)
    memory_window_s: float = Field(3600, gt=0, description="growth of memory is measured over this time")
    target_scan_s: float = Field(30, gt=0, description="p95 of the duration of scans")
    target_answer_s: float = Field(2, gt=0, description="p95 of the time to the head of an answer")
    target_push_lag_s: float = Field(0.25, gt=0, description="p99 of the way of an event to those who wait for it")
    target_queue_wait_s: float = Field(30, gt=0, description="p95 of the wait for a slot")
    target_loop_lag_s: float = Field(0.2, gt=0, description="p99 of how late the event loop is")
    target_memory_growth_mb_per_h: float = Field(200, gt=0)
    target_poll_share: float = Field(0.5, gt=0, le=1, description="polls among polls and pushed events")
    target_refusal_share: float = Field(0.1, gt=0, le=1, description="refusals by a limit among all answers")
    target_chunk_s: float = Field(10, gt=0, description="p95 of the time of one chunk")
    early_polls_max: int = Field(60, ge=1, description="polls ahead of their time by one client in the window")
    storm_connects_min: int = Field(200, ge=1, description="fewer opened streams in the window are no storm")
    incident_resolve_s: float = Field(60, gt=0, description="an incident that is not seen for so long is over")
    max_operations_events: int = Field(1000, ge=1, description="events of /v1/operations/events that are kept")

    # A webhook: incidents and emergencies are posted to this address too, signed with the secret.
    webhook_url: str | None = Field(None, pattern="^https?://", description="where to; nowhere when not set")
    webhook_secret: SecretStr | None = Field(None, description="signs each post: `Scanwire-Signature`, HMAC-SHA-256")
    webhook_wait_s: float = Field(10, gt=0, description="one try of one post")
    webhook_tries: int = Field(5, ge=1, description="of one post, each twice as long after the last")
    webhook_backoff_s: float = Field(1, gt=0, description="until the second try")
    max_webhook_waiting: int = Field(100, ge=1, description="posts that wait; the oldest are given up first")

    # Emergency: while it lasts, these hold in place of the usual limits.
    emergency_calm_s: float = Field(120, gt=0, description="it is lifted after so long without anything urgent")
    emergency_submit_per_min: float = Field(1, gt=0)
    emergency_read_per_s: float = Field(1, gt=0)
    emergency_read_burst: int = Field(5, ge=1)
    emergency_hint_factor: float = Field(3, ge=1, description="poll hints are so many times as long")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: object) -> object:
        known = [f"{PREFIX}{name.upper()}" for name in cls.model_fields]
        wrong = []
        for name, value in os.environ.items():
            is_ours = name.upper().startswith(PREFIX) and not value.startswith(_LINK)
            if is_ours and name.upper() not in known and not _NOT_SETTINGS.fullmatch(name.upper()):
                near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)
                wrong.append(f"{name} is not a setting; " + (f"did you mean {near[0]}?" if near else "unset it."))
        if wrong:
            raise ValueError(" ".join(wrong))
        return values

    @field_validator("allowed_hosts", "allowed_origins", "trusted_proxies", "api_keys", "operator_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                (IPv6Network if ":" in network else IPv4Network)(network)
            except ValueError as error:
                raise ValueError(f"{network!r} is not a network such as 10.0.0.0/8: {error}") from None
        return value

    @field_validator("api_keys", "operator_keys")
    @classmethod
    def _hashed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            name, _, digest = entry.partition(":")
            if not name or len(digest) != 64 or not set(digest.lower()) <= set("0123456789abcdef"):
                raise ValueError(f"{name!r} is not name:sha256-hex; make one with `scanwire key NAME`")
        return value


def hash_key(key: str) -> str:
    """The form in which an API key is kept: SHA-256 in hex. A key has 128 random bits, so no salt is needed."""
    return hashlib.sha256(key.encode()).hexdigest()
