"""The answer of the gate: does a run fit, says who, and how sure is that."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from planner.specs.variants import Variant
from planner.trials import Interval, Peaks, Source


class VerdictKind(StrEnum):
    FITS = "fits"
    DOES_NOT_FIT = "does_not_fit"
    UNKNOWN = "unknown"
    """Not enough evidence: the prediction's interval contains the capacity, or nothing could be predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantVerdict:
    """The verdict on one variant."""

    variant: Variant
    kind: VerdictKind
    reason: str
    """One sentence: which evidence decided, with its figures."""
    source: Source | None
    """``None`` when there is no evidence at all."""
    stored: bool = False
    evidence_batch_size: int | None = None
    """The batch size that was run or predicted: the asked one, or one that decides it (a larger one fitted)."""
    peaks: Peaks | None = None
    """Of ``evidence_batch_size``."""
    reserved_interval: Interval | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The verdict on a spec: that of its worst variant."""

    spec_hash: str
    spec_name: str | None
    model: str
    gpu: str
    batch_size: int
    capacity_bytes: int
    variants: tuple[VariantVerdict, ...]
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> VerdictKind:
        kinds = {verdict.kind for verdict in self.variants}
        for worst in (VerdictKind.DOES_NOT_FIT, VerdictKind.UNKNOWN):
            if worst in kinds:
                return worst
        return VerdictKind.FITS
