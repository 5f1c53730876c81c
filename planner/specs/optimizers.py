"""Optimizers that a spec can name: the classes of torch.optim in lower case, listed without importing torch.

Argument names are checked against the class's signature where the optimizer is made, since they differ between versions.
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

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "lbfgs": "it needs a closure that evaluates the model several times in one step; write that step yourself and name it in train.step",
        "muon": "it takes only 2-D parameters, not a whole model; write a step that splits them and name it in train.step",
        "sparseadam": "it takes only sparse gradients; write a step that splits the parameters and name it in train.step",
    }
)  # fmt: skip
"""Names of torch.optim that cannot optimize a whole model in a plain loop, each with the reason."""
