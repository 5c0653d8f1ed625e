"""Log lines for people (console) or for machines (JSON, one object a line)."""

import json
import logging
import sys
import time
from typing import Any, Literal, TextIO

# What every record has; anything else was given as `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
# Fields that are never written out, whoever put them there.
_SECRET = frozenset(("key", "api_key", "token", "authorization", "password", "secret", "cookie"))
_HIDDEN = "[hidden]"


def configure_logging(format: Literal["console", "json"], *, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Sends all log records of this process to `stream` (stderr when not given), one line each.

    The `extra` fields of a record, such as `action`, come with it; secrets among them are hidden.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else ConsoleFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    # Every request that a client in this process makes is not news.
    for chatty in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _read_extra(record: logging.LogRecord) -> dict[str, Any]:
    extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    return {name: _HIDDEN if name.lower() in _SECRET else value for name, value in extra.items()}


class JsonFormatter(logging.Formatter):
    """`{"time", "level", "logger", "message", …extra, "exception"}`; the time is UTC, RFC 3339 with milliseconds."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in _read_extra(record).items() if name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class ConsoleFormatter(logging.Formatter):
    """Time of day, level, what happened, and the extra fields behind it."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extra = " ".join(f"{name}={value}" for name, value in _read_extra(record).items())
        text = f"{clock} {record.levelname:<7} {record.getMessage()}" + (f"  [{extra}]" if extra else "")
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text
