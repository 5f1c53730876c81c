"""A spec on its way to a process of this very program, which need not check it again.

What checks documents is a second's work to import on a slow machine, and a process that runs trials or traces is
waited for.
"""

from __future__ import annotations

import base64
import pickle

from planner.specs.model import Spec


def packed(spec: Spec) -> str:
    return base64.b64encode(pickle.dumps(spec)).decode()


def unpacked(text: str) -> Spec:
    """Of what ``packed`` returned and nothing else: unpickling runs what it is given."""
    spec = pickle.loads(base64.b64decode(text))  # noqa: S301 - from this very program
    assert isinstance(spec, Spec)
    return spec
