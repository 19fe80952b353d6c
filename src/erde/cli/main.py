"""The command line. Everything but typer is imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
import typer.core

from erde.cli import about, bundles, runs, serving, sharing, studies
from erde.common.errors import UserError, printable

# typer brings its own copy of click, or uses the real one: either way this is the base of usage errors.
ClickException: type[Any] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


class SystemRefusalError(Exception):
    """Carries an OSError past typer, which would end a broken pipe with exit code 1."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            raise SystemRefusalError(error) from error


app = typer.Typer(
    name="erde",
    cls=_Commands,
    help="Early-exit image classifiers: distilled exit by exit, certified, and run without torch.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from erde.common.environment import erde_version

        print(f"erde {erde_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script: one line and exit code 2 for bad input; a traceback is a bug of erde's."""
    _open_closed_streams()
    if os.environ.get("WORLD_SIZE", "1") == "1":  # torchrun ends its processes itself
        signal.signal(signal.SIGTERM, _on_termination)
    try:
        if "" in sys.argv[1:]:
            raise UserError("one of the arguments is empty: is a variable of the shell not set?")
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except TerminationError:
        _print_stopped()
        # The parent process sees the signal that ended this one.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit as stopped:
        # rich ends with 1, which nothing else here does, where the reader of its output went away.
        sys.exit(141 if stopped.code == 1 else stopped.code)
    except SystemRefusalError as refusal:
        _refused_by_system(refusal.error)
    except OSError as error:
        _refused_by_system(error)
    except UserError as error:
        _fail(str(error))
    except ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # it has printed the help
            sys.exit(2)
        _fail(f"{error.format_message()} (see --help)")
    except (KeyboardInterrupt, typer.Abort):
        _print_stopped()
        sys.exit(130)
    except ModuleNotFoundError as error:
        extra = {
            "scipy": "analysis",
            "plotly": "analysis",
            "jinja2": "analysis",
            "matplotlib": "analysis",
            "starlette": "serve",
            "uvicorn": "serve",
            "httptools": "serve",
            "grpc": "serve",
            "google": "serve",
        }.get(str(error.name).split(".")[0], "train")
        if str(error.name).split(".")[0] == "erde":
            raise
        _fail(f"this command needs {error.name}, which is not installed: pip install 'erde[{extra}]'")
    if code == 130:  # typer turns an interrupt into this code, without a word
        _print_stopped()
    # typer's own 1: a shell whose completion it does not know.
    sys.exit(2 if code == 1 else code if isinstance(code, int) else 0)


class TerminationError(BaseException):
    """SIGTERM: no error, like an interrupt from the keyboard; unfinished files are removed."""


def _on_termination(*_: object) -> None:
    if hasattr(signal, "SIGCHLD"):
        # The whole group may have been told to stop. Torch would raise an error for each worker that ends; without any
        # function Python would complain of a signal that came just before.
        signal.signal(signal.SIGCHLD, lambda *_: None)
    raise TerminationError


def _open_closed_streams() -> None:
    """Open /dev/null for streams closed from the start: the next file would get their number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _print_stopped() -> None:
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    advice = {
        "run": "; it continues with --resume",
        "train": "; it continues with --resume",
        "study": "; it continues with --resume",
        "accelerate": "; it continues with --resume",
        "ledger": "; the same command continues it",
        "distill": "; the same command continues it",
        "export": "; the same command continues it",
        "predict": "; with --out it continues with --resume",
    }
    with contextlib.suppress(OSError):
        print(f"stopped{advice.get(command, '')}", file=sys.stderr)


def _refused_by_system(error: OSError) -> None:
    """Report an error of the system (a disk, a permission, a name) in one line; a closed pipe is no error."""
    try:
        # Python flushes again at its end: without stdout it would fail there.
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    places = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error) or type(error).__name__
    _fail(f"{f'{places}: ' if places else ''}{reason}: choose a place that can be read and written")


def _fail(message: str) -> None:
    message = message if len(message) <= 2000 else f"{message[:2000]}..."
    # All processes of torchrun meet the same bad input: one line is enough. Once they are connected, an error may
    # be one process's own, from its part of the images or its memory.
    parallel = sys.modules.get("erde.training.parallel")
    if os.environ.get("LOCAL_RANK", "0") == "0" or (parallel is not None and parallel.processes() > 1):
        with contextlib.suppress(OSError):
            print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)


def _command(function: Callable[..., None], example: str, name: str | None = None) -> None:
    app.command(name, epilog=f"Example: {example}")(function)


# The order of the commands in --help: a run, saved logits, bundles, what there is.
_command(runs.run, "erde run digits train.epochs=20 --out runs/demo")
_command(runs.train, "erde train cifar10-subset --out runs/a")
_command(runs.distill, "erde distill runs/a --arm erde")
_command(runs.export, "erde export runs/a --plain student.onnx --arm erde")
_command(runs.calibrate, "erde calibrate runs/a/bundle --data photos/ --max-risk 0.5% --confidence 95%")
_command(runs.evaluate, "erde evaluate runs/a --json")
_command(runs.compare, "erde compare runs/a runs/b --out comparison.html")
_command(studies.study, "erde study study.yaml --out runs/study --minutes 60")
_command(studies.ledger, "erde ledger benchmarks/ledger.yaml --minutes 9 --table results/ledger.md")
_command(bundles.predict, "erde predict runs/a/bundle photos/ --out answers.csv")
_command(bundles.accelerate, "erde accelerate model.onnx --images photos/ --out fast --minutes 60")
_command(bundles.cascade, "erde cascade front/bundle model.onnx --data photos/ --max-risk 1% --out chain")
_command(bundles.bench, "erde bench runs/a/bundle --out bench.json")
_command(serving.serve, "erde serve runs/a/bundle digits=other/bundle --http-port 8000")
_command(serving.demo, "erde demo runs/a/bundle --serve")
_command(sharing.push, "erde push runs/a/bundle me/digits --private")
_command(sharing.pull, "erde pull me/digits --out digits")
app.add_typer(bundles.bundle_app, name="bundle")
_command(about.cost, "erde cost timm/efficientnet_b0 --exits 4")
_command(about.list_names, "erde list recipes", "list")


if __name__ == "__main__":
    main()
