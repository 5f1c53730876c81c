"""``planner serve`` and ``planner worker``: the HTTP service, and what works its jobs."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.options import Debug, StoreUrl
from planner.cli.parts import parts_of
from planner.cli.terminal import note
from planner.errors import InvalidArgument

if TYPE_CHECKING:
    from planner_api.settings import Settings


def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option("--host", metavar="NAME", help="Address to listen on.")] = None,
    port: Annotated[
        int | None, typer.Option("--port", metavar="N", min=0, max=65535, help="Port to listen on; 0 = any free one.")
    ] = None,
    no_worker: Annotated[
        bool, typer.Option("--no-worker", help="Only answer HTTP: jobs wait for a `planner worker` on the same store.")
    ] = False,
    store: StoreUrl = None,
    debug: Debug = False,
) -> int:
    """Start the HTTP service with its pages, and with a worker of its own for this machine's GPU or a virtual one."""
    with _server_extra():
        import uvicorn
        from planner_api.app import create_app
        from planner_workers.worker import Worker

    settings = _settings()
    log_to_stderr()
    with (
        parts_of(context).open_store(store) as opened,
        _listen(host or settings.host, port, settings) as listening,
        _stopped_by_signals() as stop,
    ):
        address, chosen = listening.getsockname()[:2]
        note(f"planner listens on http://{f'[{address}]' if ':' in address else address}:{chosen}, store {opened.url}")
        thread = None
        if not no_worker:
            worker = Worker(opened, allowed_targets=settings.allowed_prefixes)
            thread = threading.Thread(target=worker.run, args=(stop,), name="dispatcher", daemon=True)
            thread.start()
        app = create_app(opened, settings, dispatcher=thread)
        # uvicorn ends on SIGINT and SIGTERM after the requests in flight, then raises the signal again: that sets
        # ``stop``. An open event stream must not hold it up.
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listening])
        stop.set()
        if thread is not None:
            thread.join(timeout=10)
    return 0


def worker(
    context: typer.Context,
    predict_only: Annotated[
        bool,
        typer.Option(
            "--predict-only",
            envvar="PLANNER_PREDICT_ONLY",
            help="Leave the jobs that ask for a measurement to workers with a GPU.",
        ),
    ] = False,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="Take measuring jobs for this GPU type; may be repeated; default: this machine's, or all.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="TEXT", help="Name in the evidence; by default host and process.")
    ] = None,
    store: StoreUrl = None,
    debug: Debug = False,
) -> int:
    """Work the jobs of a store, one at a time, until Ctrl-C or SIGTERM. Start one worker for each GPU."""
    with _server_extra():
        from planner_workers.worker import Worker

    from planner.gpus import find_gpu
    from planner.jobs import JobKind
    from planner.local_gpus import local_gpus

    settings = _settings()
    log_to_stderr()
    types = {find_gpu(each).name for each in gpu} if gpu else {card.gpu.name for card in local_gpus()}
    with parts_of(context).open_store(store) as opened, _stopped_by_signals() as stop:
        working = Worker(
            opened,
            name=name,
            kinds={JobKind.PREDICT} if predict_only else None,
            gpus=types or None,
            allowed_targets=settings.allowed_prefixes,
        )
        note(f"worker {working.name} takes jobs from {opened.url}")
        working.run(stop)
    return 0


def log_to_stderr() -> None:
    """Structured logs on standard error: coloured lines on a terminal, one JSON object a line elsewhere."""
    import structlog

    is_terminal = sys.stderr.isatty()
    render: Any = structlog.dev.ConsoleRenderer() if is_terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if is_terminal else [structlog.processors.format_exc_info]),
            render,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _settings() -> Settings:
    from planner_api.settings import Settings
    from pydantic import ValidationError

    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        field = f"PLANNER_{str(first['loc'][0]).upper()}"
        raise InvalidArgument(f"{first['input']!r}: {first['msg'].lower()}", field=field) from error


@contextlib.contextmanager
def _server_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise InvalidArgument(
            f"the service needs the module {error.name}: install it with: pip install 'planner[server]'"
        ) from error


@contextlib.contextmanager
def _listen(host: str, port: int | None, settings: Settings) -> Iterator[socket.socket]:
    """A socket that is bound, so that a port in use is one clear error before anything is started."""
    wanted = settings.port if port is None else port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, wanted, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InvalidArgument(f"{host!r} is no address of this machine: {error.strerror}", field="host") from error
    try:
        listening = socket.create_server(address[:2], family=family, reuse_port=False)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidArgument(f"cannot listen on {host}:{wanted}: {reason}", field="port") from error
    with listening:
        yield listening


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second signal has its ordinary effect."""
    stop = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signum, before[signum])

    before = {int(number): signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
