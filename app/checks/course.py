"""One run of the checks: what it was asked, and what earlier checks leave to later ones."""

import asyncio
import contextlib
import secrets
from dataclasses import dataclass, field
from typing import Any

from app.checks.probe import Probe
from app.core.event import EventType
from app.eventstream import ScanEvent
from app.follow import SSE

SOON_S = 5.0  # within which what was asked for must happen


@dataclass(slots=True, kw_only=True)
class Course:
    """The scans that the checks share: one of the market, which has ended, and one whose producer we are."""

    probe: Probe
    scanner: str
    max_scan_s: float
    max_answer_s: float
    market: dict[str, Any] = field(default_factory=dict)  # the submission of the first scan that was accepted
    market_id: str = ""
    told: dict[str, list[ScanEvent]] = field(default_factory=dict)  # durable events of the market scans
    external_id: str = ""
    legacy: dict[str, Any] = field(default_factory=dict)  # the first answer to a scan by the routes of old

    def make_submission(self) -> dict[str, Any]:
        """A scan that nobody asked for before, so that it equals no other and must run."""
        where = f"volume > {secrets.randbelow(1_000_000)}"
        return {"scanner": self.scanner, "params": {"where": where}}

    async def get_external(self) -> str:
        """The scan whose producer we are; submitted when no check has left one."""
        if not self.external_id:
            answer = await self.probe.submit_external()
            self.external_id = self.probe.read_json(answer, 202)["id"]
        return self.external_id

    async def get_market(self) -> str:
        if not self.market_id:
            self.market = self.make_submission()
            self.market_id = self.probe.read_json(await self.probe.submit(self.market), 200, 202)["id"]
            await self.follow([self.market_id])
        return self.market_id

    async def follow(self, ids: list[str]) -> None:
        """Reads the events of these scans until all have ended, or for somewhat longer than a scan may take."""
        self.told |= {scan_id: [] for scan_id in ids}
        left = set(ids)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.max_scan_s + SOON_S), self.probe.stream(SSE, ids) as events:
                async for event in events:
                    if event.scan in left and event.id is not None:
                        self.told[event.scan].append(event)
                        if event.type == EventType.END:
                            left.remove(event.scan)
                        if not left:
                            return
