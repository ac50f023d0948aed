"""The wait that a server asks for in its Retry-After header. Does not know HTTP clients."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def seconds(value: str | None) -> float | None:
    """Return the wait, stated in seconds or as a date (RFC 9110, 10.2.3); None without one that is valid."""
    value = (value or "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # no date, or one without its zone
        return None
