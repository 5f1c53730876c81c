"""Optimizers that a spec can name: the classes of torch.optim in lower case, listed without importing torch.

Argument names differ between versions of torch: they are checked where the optimizer is made, against its signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

OPTIMIZERS: tuple[str, ...] = (
    "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd",
    "sgd-momentum",
)  # fmt: skip
"""``sgd-momentum`` is shorthand for ``sgd`` with ``momentum: 0.9``."""

SGD_MOMENTUM = 0.9
"""The usual value (Krizhevsky et al. 2012); memory depends only on its being more than 0."""

_OWN_STEP = "write that step yourself and name it in train.step"

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "lbfgs": f"it needs a closure that evaluates the model several times in one step; {_OWN_STEP}",
        "muon": f"it takes only 2-D parameters, not those of a whole model; {_OWN_STEP}",
        "sparseadam": f"it takes only sparse gradients, not those of a whole model; {_OWN_STEP}",
    }
)
"""Names of torch.optim that cannot optimize a whole model in a plain loop, each with the reason."""
