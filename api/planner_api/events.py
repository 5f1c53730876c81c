"""A job's events as server-sent events."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import ServerSentEvent
from starlette.concurrency import run_in_threadpool

from planner.jobs import JobEvent
from planner.specs.variants import variant_label
from planner.store import Store


async def event_stream(
    store: Store, job_id: str, *, after: int, poll_s: float, stopping: threading.Event
) -> AsyncIterator[ServerSentEvent]:
    """Every event of the job after sequence ``after``, as it comes; ends with the job or with the service.

    ``poll_s`` is the time between two looks at the store, in seconds.
    """
    while not stopping.is_set():
        events, is_last = await run_in_threadpool(_look, store, job_id, after)
        for event in events:
            after = event.sequence
            yield ServerSentEvent(
                id=str(event.sequence),
                event=event.kind,
                data=json.dumps({**_labelled(event), "at": event.created_at.isoformat()}, separators=(",", ":")),
            )
        if is_last:
            return
        await asyncio.sleep(poll_s)


def _labelled(event: JobEvent) -> dict[str, Any]:
    """With the variant's name as people read it, where the event is of one."""
    variant = event.data.get("variant")
    return {**event.data, "label": variant_label(variant)} if variant else {**event.data}


def _look(store: Store, job_id: str, after: int) -> tuple[list[JobEvent], bool]:
    # The state first: what a final job's events are is then settled before they are read, so none is missed.
    is_last = store.get_job(job_id).state.is_final
    return store.events_after(job_id, after), is_last
