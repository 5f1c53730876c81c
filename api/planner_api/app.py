"""The service's application: ``create_app`` composes it; nothing happens at import time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

from planner import __version__
from planner.store import Store
from planner_api import pages, problems
from planner_api.metrics import Metrics
from planner_api.middleware import RequestMetrics, SecurityHeaders
from planner_api.openapi import add_spec_schema
from planner_api.routers import gpus, health, jobs, plans, preflight
from planner_api.service import Dispatcher, Predictions, Service
from planner_api.settings import Settings
from planner_api.templating import templates

_DESCRIPTION = """Will this training run fit, with which batch size, on which GPU, how fast and at what cost?

Errors are RFC 9457 problem documents with a stable `code`."""


def create_app(store: Store, settings: Settings | None = None, *, dispatcher: Dispatcher | None = None) -> FastAPI:
    """The ASGI application over an open ``store``, which stays the caller's to close.

    ``dispatcher`` is the worker that runs in this process, if one does: ``/readyz`` watches it.
    """
    settings = settings or Settings()
    service = Service(
        store=store,
        settings=settings,
        metrics=Metrics(store),
        predictions=Predictions(
            concurrency=settings.preflight_concurrency,
            queue=settings.preflight_queue,
            timeout_s=settings.preflight_timeout_s,
        ),
        dispatcher=dispatcher,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.stopping.set()
        service.predictions.close()

    app = FastAPI(
        title="planner",
        version=__version__,
        summary="Batch sizes and GPU memory, before you rent",
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    problems.install(app)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestMetrics, metrics=service.metrics)
    for module in (jobs, preflight, plans, gpus, health):
        app.include_router(module.router)
    app.include_router(pages.router)
    _serve_assets(app)
    _serve_docs(app)
    _describe(app)
    return app


def _serve_assets(app: FastAPI) -> None:
    """Scripts and styles, all from installed packages: a page needs no other host."""
    here = Path(__file__).parent / "static"
    app.mount("/static", StaticFiles(directory=here), name="static")
    app.mount("/assets/plotly", StaticFiles(directory=Path(str(files("plotly") / "package_data"))), name="plotly")
    app.mount("/assets/docs", StaticFiles(directory=Path(str(files("fastapi_offline") / "static"))), name="swagger")


def _serve_docs(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return templates.TemplateResponse(request, "docs.html", {"title": f"{app.title} {app.version}: API"})


def _describe(app: FastAPI) -> None:
    """Put the schemas of problems and specs into the OpenAPI document, in place of FastAPI's own validation errors."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = generate()
            schemas = schema["components"]["schemas"]
            schemas["Problem"] = problems.Problem.model_json_schema()
            schemas.pop("HTTPValidationError", None)
            schemas.pop("ValidationError", None)
            add_spec_schema(schemas)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
