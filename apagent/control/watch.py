"""What one watcher has yet to read: bounded, so that a slow one costs the agent nothing."""

from __future__ import annotations

import asyncio
from collections import deque

from apagent.control.views import AgentEventView

QUEUE_SIZE = 1024
DROPPED = "dropped"


class WatchQueue:
    """A queue of events that counts what does not fit, and says so in its place."""

    def __init__(self, size: int = QUEUE_SIZE) -> None:
        self._size = size
        self._events: deque[AgentEventView] = deque()
        self._dropped = 0
        self._dropped_at = 0.0
        self._filled = asyncio.Event()

    def put(self, event: AgentEventView) -> None:
        """Add an event, or drop it where the queue is full."""
        if len(self._events) >= self._size:
            self._dropped += 1
            self._dropped_at = event.time
            return
        self._note_dropped()
        self._events.append(event)
        self._filled.set()

    async def get(self) -> AgentEventView:
        """The next event."""
        while not self._events:
            self._note_dropped()
            if not self._events:
                self._filled.clear()
                await self._filled.wait()
        return self._events.popleft()

    def _note_dropped(self) -> None:
        if self._dropped:
            self._events.append(
                AgentEventView(
                    self._dropped_at,
                    DROPPED,
                    f"{self._dropped} events dropped: this watcher reads too slowly",
                    {"count": str(self._dropped)},
                )
            )
            self._dropped = 0
