"""The process behind a real GPU: torch, the user's model on the CPU, and a fork for each trial.

CUDA is touched only in forks. Two precautions keep that true: asking whether there is a GPU goes through NVML
(``PYTORCH_NVML_BASED_CUDA_CHECK``), and torch computes on one thread, because GNU's OpenMP hangs in a fork of a process
whose thread pool it had started.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planner.errors import DeviceUnavailable, ModelError
from planner.runtime.ranks import run_ranks
from planner.runtime.zygote import Zygote
from planner.specs.model import Spec
from planner.specs.packing import packed, unpacked

if TYPE_CHECKING:
    from planner.runtime.trial import TrialProcess


@dataclass(slots=True)
class Built:
    spec: Spec
    model: Any
    """A ``torch.nn.Module`` on the CPU. A trial may change it: it has a copy of the whole process."""
    process: TrialProcess | None = None
    """In a fork."""


def build(spec_text: str) -> Built:
    """Import torch and the modelling library and build the model.

    Raises ``DeviceUnavailable`` for a torch without CUDA, and what ``planner.training.build_model`` raises.
    """
    import torch

    if torch.version.cuda is None:
        raise DeviceUnavailable(
            f"the installed torch {torch.__version__} cannot drive this GPU: it was built without CUDA; "
            "install a CUDA build, or use planner predict"
        )
    torch.set_num_threads(1)
    # What a trial would import by itself; the first optimizer of a process imports torch._dynamo (torch/_compile.py).
    import torch._dynamo

    importlib.import_module("planner.runtime.trial")
    from planner.training import build_model
    from planner.training.repeated_draws import repeated_draws

    spec = unpacked(spec_text)
    with repeated_draws():
        model = build_model(spec)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ModelError(
            "the model uses the GPU while it is built; build it on the CPU, it is moved later", field="model"
        )
    return Built(spec, model)


def start(
    built: Built,
    *,
    variant: Mapping[str, Any],
    capacity_bytes: int,
    gpu_uuids: Sequence[str],
    used_before_bytes: int | None,
    **of_the_trial: Any,
) -> Mapping[str, Any]:
    """In a fork: start CUDA on the one GPU (``TrialProcess.start``)."""
    return _process(built).start(
        variant=variant, capacity_bytes=capacity_bytes, gpu_uuid=gpu_uuids[0], used_before_bytes=used_before_bytes
    )


def run_trial(
    built: Built, *, gpu_uuids: Sequence[str], settle: Callable[[], bool], **request: Any
) -> Mapping[str, Any]:
    """In a fork: the trial on ``gpu_uuids``; with several of them by ranks, which are processes of their own."""
    if len(gpu_uuids) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu_uuids)
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where this process found the user's code
        return run_ranks(
            ["-m", "planner.runtime.rank"],
            len(gpu_uuids),
            {**request, "spec": packed(built.spec), "gpu_uuids": list(gpu_uuids)},
        )
    return _process(built).run(gpu_uuid=gpu_uuids[0], settle=settle, **request)


def _process(built: Built) -> TrialProcess:
    from planner.runtime.trial import TrialProcess

    if built.process is None:
        built.process = TrialProcess(built.spec, built.model)
    return built.process


def main() -> None:
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    Zygote(build, start, run_trial).serve()


if __name__ == "__main__":
    main()
