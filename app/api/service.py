"""The parts of the running service, as request handlers reach them."""

from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from app.core.settings import Settings
from app.engine.admission import Admission
from app.engine.external import Producers
from app.engine.limits import Limits
from app.engine.reaper import Reaper
from app.engine.runner import Runner
from app.engine.sessions import Sessions
from app.log.eventlog import EventLog
from app.market.store import Store
from app.observe.lookout import Lookout
from app.observe.metrics import Metrics
from app.push.hub import Hub


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    settings: Settings
    store: Store
    log: EventLog
    hub: Hub
    limits: Limits
    sessions: Sessions
    runner: Runner
    producers: Producers
    admission: Admission
    reaper: Reaper
    metrics: Metrics
    lookout: Lookout
    note_answer: Callable[[float], None]  # seconds that one took


def get_service(connection: HTTPConnection) -> Service:
    service: Service = connection.app.state.service
    return service


def get_client(connection: HTTPConnection) -> str:
    """Who limits are charged to."""
    client: str = connection.scope["state"]["client"]
    return client
