"""Will this training run fit, with which batch size, on which GPU, how fast and at what cost?

``import planner`` is light: it imports neither torch nor a database.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("planner")
except PackageNotFoundError:  # a bare checkout that was never installed
    __version__ = "0+checkout"
