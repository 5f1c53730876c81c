"""The worker: claims a job, works it through the same code as the command line, and records what happened.

Three threads have a part in a job: the one that claimed it waits, one renews the claim, one runs the sweep. Whatever
goes wrong in a job ends that job, never the worker.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import structlog

from planner.errors import Conflict, PlannerError, StoreError
from planner.jobs import Claim, JobKind, JobState
from planner.planning import plan_sweep
from planner.progress import Progress, VariantFinished
from planner.selection import Selected, choose_device
from planner.specs.document import parse_spec
from planner.store import Store
from planner.targets import check_targets
from planner.trials import Plan, PlanStatus
from planner_workers.events import event_of
from planner_workers.lease import Lease

Choose = Callable[[str | None, int | None, bool, str | None], Selected]

STOP_GRACE_S: Final = 5.0
"""How long a stopping worker waits for the running trial before it leaves the job to the next worker."""

_log = structlog.get_logger(__name__)


class Worker:
    """Works jobs of ``store``, one at a time. ``run`` is its life; use one worker for each GPU.

    ``kinds`` and ``gpus`` restrict the jobs that it takes. ``allowed_targets`` are the module prefixes whose user code
    a job may name. ``lease_s`` is how long the store keeps a job for a worker that has fallen silent, ``poll_s`` how
    often an idle one looks for work. ``choose`` picks the device; a test passes its own.
    """

    def __init__(
        self,
        store: Store,
        *,
        name: str | None = None,
        kinds: Collection[JobKind] | None = None,
        gpus: Collection[str] | None = None,
        allowed_targets: Sequence[str] = (),
        lease_s: float = 60.0,
        poll_s: float = 1.0,
        choose: Choose = choose_device,
    ) -> None:
        self.store = store
        self.name = name or f"{socket.gethostname()}-{os.getpid()}"
        self._kinds = kinds
        self._gpus = gpus
        self._allowed_targets = tuple(allowed_targets)
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._choose = choose

    def run(self, stop: threading.Event) -> None:
        """Work until ``stop`` is set. The job that is running then goes back to the queue."""
        _log.info("worker started", worker=self.name)
        while not stop.is_set():
            try:
                claim = self.store.claim_job(self.name, kinds=self._kinds, gpus=self._gpus, lease_s=self._lease_s)
            except StoreError as error:
                # A database that restarts must not end the fleet; it is asked again.
                _log.warning("the store does not answer", worker=self.name, error=str(error))
                claim = None
            if claim is None:
                stop.wait(self._poll_s)
            else:
                self.work(claim, stop)
        _log.info("worker stopped", worker=self.name)

    def work(self, claim: Claim, stop: threading.Event) -> None:
        """Work one claimed job to its end, or until ``stop``. Raises nothing."""
        log = _log.bind(worker=self.name, job=claim.job.id, attempt=claim.job.attempt)
        log.info("job started")
        with Lease(self.store, claim, lease_s=self._lease_s) as lease:
            done = threading.Event()

            def should_stop() -> bool:
                lease.renew()  # asked between trials: a cancellation is seen at once, not at the next heartbeat
                return stop.is_set() or lease.is_over

            def sweep() -> None:
                try:
                    self._sweep(claim, lease, should_stop, stop)
                finally:
                    done.set()

            # A trial takes up to minutes and is only asked to stop between trials; a worker that is told to go must
            # not wait for it. Its child processes die with this one.
            thread = threading.Thread(target=sweep, name=f"job-{claim.job.id}", daemon=True)
            thread.start()
            while not done.wait(0.2):
                if stop.is_set() and not done.wait(STOP_GRACE_S):
                    self._abandon(claim)
                    break
        log.info("job left", finished=done.is_set())

    def _abandon(self, claim: Claim) -> None:
        """Give the job back although its sweep still runs: what that still writes is refused."""
        try:
            self.store.release_job(claim)
        except (Conflict, StoreError) as error:
            _log.warning("the job was not given back: its lease runs out", job=claim.job.id, error=str(error))

    def _sweep(self, claim: Claim, lease: Lease, should_stop: Callable[[], bool], stop: threading.Event) -> None:
        plans: list[Plan] = []
        error: Mapping[str, Any] | None = None
        state, complete = JobState.SUCCEEDED, False
        try:
            complete = self._plan(claim, plans, should_stop)
        except PlannerError as failure:
            state, error = JobState.FAILED, failure.as_dict()
        except Exception as failure:  # noqa: BLE001 - the border of a job: user code and drivers can raise anything
            _log.error("job crashed", job=claim.job.id, exc_info=failure)
            defect = PlannerError(f"internal error: {type(failure).__name__}: {failure}")
            state, error = JobState.FAILED, defect.as_dict()
        if lease.is_lost:
            return
        if lease.cancel_requested and not complete:
            state, error = JobState.CANCELLED, None
        elif complete and not any(plan.status is PlanStatus.PLANNED for plan in plans):
            # Not one variant could be answered: the first one's reason is the job's.
            state, error = JobState.FAILED, plans[0].error
        try:
            if stop.is_set() and not complete and state is not JobState.CANCELLED:
                self.store.release_job(claim)
            else:
                self.store.finish_job(claim, state, error, [plan.id for plan in plans if plan.id is not None])
        except (Conflict, StoreError) as failure:
            # Taken over by another worker, or the store is gone: the lease runs out and the job is worked again.
            _log.warning("the end of the job was not recorded", job=claim.job.id, error=str(failure))

    def _plan(self, claim: Claim, plans: list[Plan], should_stop: Callable[[], bool]) -> bool:
        """Work the request, and whether that was all of it. Each plan goes into ``plans`` when it is finished, so that
        what is done outlives a failure."""
        request = claim.job.request
        spec = parse_spec(request.spec)
        check_targets(spec, self._allowed_targets)
        selected = self._choose(request.gpu, request.capacity_bytes, request.kind is JobKind.PREDICT, request.on)
        for note in selected.notes:
            self.store.append_event(claim, "note", {"text": note})

        def listen(progress: Progress) -> None:
            if isinstance(progress, VariantFinished):
                plans.append(progress.plan)
            event = event_of(progress)
            if event is not None:
                self.store.append_event(claim, *event)

        plan_sweep(
            spec,
            selected.device,
            store=self.store,
            batch_size=request.batch_size,
            fresh=request.fresh,
            predict_start=selected.predictor,
            listener=listen,
            should_stop=should_stop,
            worker=self.name,
        )
        return len(plans) == len(spec.variants.product())
