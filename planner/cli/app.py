"""The ``planner`` command: its subcommands, and the one place where errors become exit statuses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from planner.cli import catalogue, doctor, explain, gate, jobs, plans, service, sweep
from planner.cli.exits import ExitStatus, status_of_error
from planner.cli.parts import Parts
from planner.cli.signals import Interrupted
from planner.cli.terminal import note, print_error
from planner.errors import InvalidArgument, PlannerError

app = typer.Typer(
    name="planner",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Will this training run fit, with which batch size, on which GPU, how fast?",
)
app.command("probe")(sweep.probe)
app.command("predict")(sweep.predict)
app.command("explain")(explain.explain)
app.command("preflight")(gate.preflight)
app.command("gpus")(catalogue.gpus)
app.command("doctor")(doctor.doctor)
app.add_typer(jobs.app, name="jobs")
app.add_typer(plans.app, name="plans")
app.command("serve")(service.serve)
app.command("worker")(service.worker)

# typer carries click inside in newer versions and imports it in older ones: the base of all usage errors is reached
# through the one class that both show.
_UsageError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _print_version(wanted: bool) -> None:
    if wanted:
        from planner import __version__

        sys.stdout.write(f"planner {__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def run(arguments: Sequence[str] | None = None, parts: Parts | None = None) -> int:
    """Run one command and answer its exit status.

    ``arguments`` are those after ``planner`` (default: the process's own). ``parts`` is what commands are made of.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug, as_json = "--debug" in words, "--json" in words
    command = typer.main.get_command(app)
    try:
        status = command.main(args=words, prog_name="planner", standalone_mode=False, obj=parts or Parts())
    except PlannerError as error:
        if debug:
            raise
        print_error(error, as_json=as_json)
        return status_of_error(error, preflight="preflight" in words[:1])
    except Interrupted as stop:
        note("interrupted")
        return stop.exit_status
    except typer.Abort:
        return 128 + 2
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`): nothing is left to be said, not even at interpreter exit.
        sys.stdout = None
        return ExitStatus.OK
    except Exception as error:
        if debug:
            raise
        if isinstance(error, _UsageError):
            print_error(_usage(error), as_json=as_json)
        else:
            print_error(_defect(error), as_json=as_json)
        return ExitStatus.ERROR
    return int(status or 0)


def _usage(error: Exception) -> InvalidArgument:
    message = str(getattr(error, "format_message", lambda: error)()) or "a command is missing; see planner --help"
    words = message.rstrip(".")[:1].lower() + message.rstrip(".")[1:]
    if words == "missing command" and (context := getattr(error, "ctx", None)) is not None:
        words = f"{words}: one of {', '.join(context.command.list_commands(context))}"
    return InvalidArgument(words)


def _defect(error: Exception) -> PlannerError:
    return PlannerError(f"internal error, please report it: {type(error).__name__}: {error} (--debug shows where)")
