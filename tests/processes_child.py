"""A child that misbehaves on request, for test_processes.py."""

import ctypes
import os
import signal
import sys
import time

from planner.errors import InvalidSpec
from planner.processes import serve


def double(number):
    return {"double": 2 * number}


def where():
    return {"path": sys.path, "pid": os.getpid(), "stdin": sys.stdin.read(), "setting": os.environ.get("SETTING")}


def hang():
    time.sleep(600)


def ignore_signals_and_hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(600)


def segfault():
    ctypes.string_at(0)


def signal_self(number):
    os.kill(os.getpid(), number)
    time.sleep(600)


def leave(status):
    os._exit(status)


def sys_exit():
    sys.exit(3)


def chatter(megabytes):
    line = "x" * 1023 + "\n"
    for _ in range(megabytes * 1024):
        sys.stdout.write(line)
    print("the last words", flush=True)
    return {"printed": megabytes}


def complain():
    raise InvalidSpec("no such key", field="model.config.n_layerz", suggestion="n_layer")


def crash():
    raise RuntimeError("not expected")


def unsendable():
    return {"it": object()}


def garbage():
    os.write(reply_fd, b"\x00\xffhello\n")
    time.sleep(600)


def die_leaving_grandchild():
    """The grandchild keeps the reply pipe and the output pipe open."""
    if os.fork() == 0:
        time.sleep(600)
    os._exit(7)


def big(count):
    return {"text": "y" * count}


reply_fd = int(os.environ["PLANNER_REPLY_FD"])
if os.environ.get("DIE_AT_START"):
    raise SystemExit("cannot start")
serve({name: value for name, value in list(globals().items()) if callable(value) and name != "serve"})
