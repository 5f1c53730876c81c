"""The gate before hardware is rented: does this batch size fit on that GPU type?

Stored measurements answer first, the virtual GPU otherwise; a prediction answers only where its whole interval is on
one side of the capacity. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from planner.devices import Device
from planner.endurance import leak_of
from planner.errors import InvalidArgument, InvalidSpec
from planner.evidence import PlanStore, StoredTrial
from planner.gpus import Gpu, find_gpu
from planner.processes import ChildError
from planner.selection import usable_capacity
from planner.specs.model import Spec
from planner.specs.variants import Variant
from planner.trials import Environment, Outcome, Source, Trial
from planner.units import format_bytes
from planner.verdicts import VariantVerdict, Verdict, VerdictKind
from planner.virtual.device import VirtualDevice

__all__ = ["Verdict", "preflight"]


def preflight(
    spec: Spec,
    gpu: str,
    batch_size: int,
    *,
    capacity_bytes: int | None = None,
    store: PlanStore | None = None,
    make_predictor: Callable[[Gpu, int], Device] = VirtualDevice,
) -> Verdict:
    """The verdict on every variant of ``spec`` at ``batch_size`` on the GPU type ``gpu``.

    ``capacity_bytes`` is by default what the type leaves after its context. ``make_predictor`` makes the virtual GPU of
    a type and a capacity; it is used only for variants that no stored measurement decides.

    Raises ``InvalidInput`` for a spec, type, batch size or capacity that is wrong, ``ModelError`` for a model that
    cannot be run, ``StoreError``, ``DeviceUnavailable`` without torch.
    """
    if batch_size < 1:
        raise InvalidArgument(f"{batch_size} is not a batch size: it must be at least 1", field="batch_size")
    kind = find_gpu(gpu)
    capacity, notes = usable_capacity(kind, capacity_bytes, real=False)
    usable = spec.usable_bytes(capacity)
    if usable < capacity:
        notes = (*notes, f"{format_bytes(usable)} of {format_bytes(capacity)} may be used beside search.headroom")
    device = make_predictor(kind, usable)
    here = device.environment(spec)
    verdicts = []
    for variant in spec.variants.product():
        stored = _stored(store, spec, variant, kind)
        comparable = [found for found in stored if not differences(found.environment, here)]
        leaking = [found for found in comparable if leak_of(found.trial, found.capacity_bytes) is not None]
        sound = [found for found in comparable if found not in leaking]
        decided = judge_measured(variant, sound, batch_size, usable) or judge_leaking(
            variant, leaking, batch_size, usable
        )
        if decided is None:
            near = near_matches([found for found in stored if found not in comparable], here, batch_size, usable)
            decided = _doubted(_predict(device, spec, variant, batch_size, near), leaking)
        elif _rests_on_a_size_near_by(decided, batch_size):
            decided = _contradicted(decided, _predict(device, spec, variant, batch_size, ()), usable)
        verdicts.append(decided)
    return Verdict(
        spec_hash=spec.hash,
        spec_name=spec.name,
        model=spec.model.name,
        gpu=kind.name,
        batch_size=batch_size,
        capacity_bytes=capacity,
        variants=tuple(verdicts),
        notes=notes,
    )


def differences(measured: Environment, here: Environment) -> list[str]:
    """In what a measurement's environment differs from this one, as far as a machine without that GPU can know.

    The driver and the CUDA of the machine that will run the work are not known before it is rented; torch and the
    modelling libraries are those of the project, so they are compared, torch without its build (``+cu130``, ``+cpu``).
    """
    libraries = sorted({*measured.library_versions, *here.library_versions})
    pairs = [
        ("torch", measured.torch_version.partition("+")[0], here.torch_version.partition("+")[0]),
        *((name, measured.library_versions.get(name), here.library_versions.get(name)) for name in libraries),
        ("allocator settings", measured.allocator_conf or "none", here.allocator_conf or "none"),
    ]
    found = [f"{name} {theirs} (here {ours})" for name, theirs, ours in pairs if theirs != ours]
    return found + (["other user code"] if measured.code_hash != here.code_hash else [])


def judge_measured(
    variant: Variant, evidence: Sequence[StoredTrial], batch_size: int, capacity_bytes: int
) -> VariantVerdict | None:
    """The verdict that measurements give: a run at least as large that fitted in at most as much memory, or one at most
    as large that ran out of at least as much. ``None`` where they say nothing, or contradict each other."""
    fits = [
        found
        for found in evidence
        if found.trial.fits and found.trial.batch_size >= batch_size and found.capacity_bytes <= capacity_bytes
    ]
    ooms = [
        found
        for found in evidence
        if found.trial.outcome is Outcome.OOM
        and found.trial.batch_size <= batch_size
        and found.capacity_bytes >= capacity_bytes
    ]
    exact = [
        found
        for found in (*fits, *ooms)
        if found.trial.batch_size == batch_size and found.capacity_bytes == capacity_bytes
    ]
    if {found.trial.outcome for found in exact} == {Outcome.FITS}:
        ooms = []
    elif {found.trial.outcome for found in exact} == {Outcome.OOM}:
        fits = []
    if bool(fits) == bool(ooms):
        return None
    # The nearest run is the strongest evidence.
    best = min(
        fits or ooms,
        key=lambda found: (abs(found.trial.batch_size - batch_size), abs(found.capacity_bytes - capacity_bytes)),
    )
    trial, seen = best.trial, best.environment
    did = "fitted" if trial.fits else "ran out of memory"
    return VariantVerdict(
        variant=variant,
        kind=VerdictKind.FITS if trial.fits else VerdictKind.DOES_NOT_FIT,
        reason=(
            f"measured: batch size {trial.batch_size} {did} in {format_bytes(best.capacity_bytes)} on a "
            f"{seen.gpu_name or seen.gpu} (driver {seen.driver_version}, torch {seen.torch_version})"
        ),
        source=Source.MEASURED,
        stored=True,
        evidence_batch_size=trial.batch_size,
        peaks=trial.peaks,
    )


def judge_leaking(
    variant: Variant, evidence: Sequence[StoredTrial], batch_size: int, capacity_bytes: int
) -> VariantVerdict | None:
    """What trials that leak say: that their few steps fitted is no evidence that training will."""
    found = judge_measured(variant, evidence, batch_size, capacity_bytes)
    if found is None:
        return None
    leaks = [leak_of(stored.trial, capacity_bytes) for stored in evidence]
    words = next((leak.sentence() for leak in leaks if leak and leak.batch_size == found.evidence_batch_size), "a leak")
    return replace(found, kind=VerdictKind.UNKNOWN, reason=f"{found.reason}, but there is {words}")


def _doubted(predicted: VariantVerdict, leaking: Sequence[StoredTrial]) -> VariantVerdict:
    """A prediction beside measured trials of other sizes that leak: what leaks at one size may leak at any."""
    leak = next((leak_of(found.trial, found.capacity_bytes) for found in leaking), None)
    if predicted.kind is not VerdictKind.FITS or leak is None:
        return predicted
    reason = f"{predicted.reason}, but there is, measured, {leak.sentence()}"
    return replace(predicted, kind=VerdictKind.UNKNOWN, reason=reason)


def _rests_on_a_size_near_by(measured: VariantVerdict, batch_size: int) -> bool:
    """Whether "fits" was measured at a larger batch size, of less than twice as many samples.

    Fragmentation can let a larger batch fit where a smaller one runs out of memory: gpt2 in fp32 with checkpointing
    under 16 GiB on an H200 ran out at 18, and is predicted to fit at 22. What a block is rounded up by cannot make up
    for half of the samples.
    """
    size = measured.evidence_batch_size
    return measured.kind is VerdictKind.FITS and size is not None and batch_size < size < 2 * batch_size


def _contradicted(measured: VariantVerdict, predicted: VariantVerdict, capacity_bytes: int) -> VariantVerdict:
    """A larger size's measured "fits" beside a prediction of the asked one: where that runs out, neither decides."""
    if predicted.peaks is None or predicted.peaks.reserved_bytes <= capacity_bytes:
        return measured
    return replace(measured, kind=VerdictKind.UNKNOWN, reason=f"{measured.reason}, but {predicted.reason}")


def near_matches(
    others: Sequence[StoredTrial], here: Environment, batch_size: int, capacity_bytes: int
) -> tuple[str, ...]:
    """Measurements of the same work that would have decided in another environment, named as what they are."""
    notes: dict[str, None] = {}
    for found in others:
        verdict = judge_measured(Variant(), [found], batch_size, capacity_bytes)
        if verdict is not None:
            notes[f"near match, not used: {verdict.reason}; {', '.join(differences(found.environment, here))}"] = None
    return tuple(notes)[:3]


def judge_predicted(variant: Variant, trial: Trial, capacity_bytes: int, notes: Sequence[str]) -> VariantVerdict:
    """ "Fits" needs the upper end of the interval to fit, "does not fit" the lower end not to."""
    interval = trial.reserved_interval
    limit = format_bytes(capacity_bytes)
    if interval is None:
        kind, reason = VerdictKind.UNKNOWN, f"predicted without an interval: {trial.error or 'nothing to go by'}"
    else:
        needs = f"predicted: needs {format_bytes(interval.low_bytes)} to {format_bytes(interval.high_bytes)}"
        leak = leak_of(trial, capacity_bytes)
        if interval.high_bytes <= capacity_bytes and leak is not None:
            kind, reason = VerdictKind.UNKNOWN, f"{needs}, within {limit}, but there is {leak.sentence()}"
        elif interval.is_around(capacity_bytes):
            kind, reason = VerdictKind.UNKNOWN, f"{needs}, too close to {limit} to say; measure it with planner probe"
        elif interval.high_bytes <= capacity_bytes:
            kind, reason = VerdictKind.FITS, f"{needs}, within {limit}"
        else:
            kind, reason = VerdictKind.DOES_NOT_FIT, f"{needs}, more than {limit}"
    return VariantVerdict(
        variant=variant,
        kind=kind,
        reason=reason,
        source=Source.PREDICTED,
        evidence_batch_size=trial.batch_size,
        peaks=trial.peaks,
        reserved_interval=interval,
        notes=(*(str(note) for note in trial.details.get("notes", ())), *notes),
    )


def _stored(store: PlanStore | None, spec: Spec, variant: Variant, gpu: Gpu) -> list[StoredTrial]:
    if store is None:
        return []
    found = store.find_trials(spec.hash, variant, gpu=gpu.name, source=Source.MEASURED)
    # What ran in a process whose GPU had been used before says less than what a new run will see.
    return [stored for stored in found if stored.trial.fresh_process and stored.trial.outcome is not Outcome.FAILED]


def _predict(device: Device, spec: Spec, variant: Variant, batch_size: int, near: Sequence[str]) -> VariantVerdict:
    try:
        with device.open(spec, variant) as runner:
            trial = runner.run(batch_size, fresh=True)
    except InvalidSpec as error:
        if not (error.field or "").startswith("variants."):
            raise
        reason = f"nothing is known of this variant: {error.message}"
    except ChildError as error:  # it was killed or hung: that says nothing about the work
        reason = f"the prediction did not finish: {error}"
    else:
        return judge_predicted(variant, trial, device.capacity_bytes, near)
    return VariantVerdict(variant=variant, kind=VerdictKind.UNKNOWN, reason=reason, source=None, notes=tuple(near))
