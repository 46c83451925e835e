"""One command with subcommands, a file each; thin. What is heavy is imported by the subcommand that needs it."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from nnunet_fed import __version__
from nnunet_fed.cli import certs_command
from nnunet_fed.cli.check_command import check
from nnunet_fed.cli.compare_command import compare
from nnunet_fed.cli.coordinator_command import coordinator
from nnunet_fed.cli.dataset_commands import phantom, split
from nnunet_fed.cli.digest_command import digest
from nnunet_fed.cli.export_command import export
from nnunet_fed.cli.init_command import init
from nnunet_fed.cli.option_values import repeat_option
from nnunet_fed.cli.peer_command import peer
from nnunet_fed.cli.plan_command import plan_and_preprocess
from nnunet_fed.cli.plugin_path_command import plugin_path
from nnunet_fed.cli.predict_command import predict
from nnunet_fed.cli.report_command import report
from nnunet_fed.cli.selftest_command import selftest
from nnunet_fed.cli.simulate_command import simulate
from nnunet_fed.cli.state_commands import new_attempt, rewind
from nnunet_fed.cli.status_command import status
from nnunet_fed.errors import BusyError, FederationError
from nnunet_fed.files import in_words
from nnunet_fed.logs import PlainLines

TRY_AGAIN = 75
"""Exit status (EX_TEMPFAIL of sysexits.h) of what another start may mend; 2 is what somebody has to put right."""
DEBUG_VARIABLE = "nnUNet_fed_debug"

app = typer.Typer(
    name="nnunet_fed",
    help="Train one nnU-Net at several hospitals without sharing an image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; errors end in one sentence, unless ``--debug`` asks for the traceback."""
    try:
        app(args=repeat_option(repeat_option(repeat_option(sys.argv[1:], "-c"), "-f"), "-chk"))
    except BusyError as error:
        _end(error, str(error), status=TRY_AGAIN)
    except FederationError as error:
        _end(error, str(error), status=2)
    except (KeyboardInterrupt, BrokenPipeError) as error:
        _end(error, "interrupted", status=130)
    except Exception as error:
        if isinstance(error, OSError) and (told := in_words(error)) is not None:
            _end(error, str(told), status=TRY_AGAIN if isinstance(told, BusyError) else 2)
        _end(error, f"{type(error).__name__}: {error} (nnunet_fed --debug shows where)", status=1)


def _end(error: BaseException, sentence: str, status: int) -> None:
    if os.environ.get(DEBUG_VARIABLE):
        raise error
    print(f"Error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(status)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    # gRPC's core would write a line of its own for every message that it refuses
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PlainLines())


# in the order of --help
app.command()(init)
app.command()(coordinator)
app.command()(status)
app.command()(rewind)
app.command("new-attempt")(new_attempt)
app.command("plan_and_preprocess")(plan_and_preprocess)
app.command("plugin-path")(plugin_path)
app.command()(split)
app.command()(phantom)
app.command()(check)
app.command()(digest)
app.command()(predict)
app.command()(export)
app.command()(compare)
app.command()(report)
app.command()(peer)
app.command()(simulate)
app.command()(selftest)
app.add_typer(certs_command.app)
