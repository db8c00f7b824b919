"""The command line: ``seekr-peft demo | run | compare | doctor | report | inspect | repair | export``, one call each.

Heavy imports are inside the commands, so that ``--help`` answers at once.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .errors import ConfigError, SeekrError, printable, shown
from .files.paths import reason
from .terminal import TerminalConsole, clean_terminal
from .training.stopping import listening

app = typer.Typer(
    name="seekr-peft",
    help="Continual learning with LoRA/QLoRA: train task after task and keep the earlier ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# readable: what cannot be read is told as other errors are, in one line.
RunDirectory = Annotated[Path, typer.Argument(help="A run directory.", show_default=False, readable=False)]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"seekr-peft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Continual learning with LoRA/QLoRA: train task after task and keep the earlier ones."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the three runs and the page.")] = Path("runs/demo"),
) -> None:
    """Show it: four contradicting tasks, three methods, measured here in a few minutes. Needs no network."""
    _quiet()
    from .demo.run import run_demo

    run_demo(out)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value, as in training.learning_rate=1e-4", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint or finished task.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="As --resume, from the last undamaged task; see the command repair.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Only check the recipe; load nothing.")] = False,
) -> None:
    """Train the tasks of RECIPE one after another; ends with the accuracy matrix, OP and BWT."""
    if check:
        from .recipe import load_recipe

        found = load_recipe(recipe, overrides or [])
        _say(f"{recipe} is fine.")
        settings = ", ".join(f"{key} {value}" for key, value in found.settings_of_others().items())
        if settings:
            _say(f"settings of other packages' methods: {settings}")
        return
    _quiet()
    from .run.runner import run_recipe

    if repair:
        from .recipe import load_recipe

        _repair(Path(load_recipe(recipe, overrides or []).output_dir))
    run_recipe(recipe, overrides or [], resume=resume or repair)


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, as for run", show_default=False)
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods, or variants of the recipe's compare section: a,b,c.", show_default=False),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds: 0,1,2 (the default).", show_default=False)] = None,
    orders: Annotated[
        str | None,
        typer.Option(help="How many orders of the tasks (default 1), or the orders: a,b,c;c,b,a.", show_default=False),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check all recipes and count the runs.")] = False,
    gather: Annotated[bool, typer.Option("--gather", help="Only gather the runs that are finished.")] = False,
) -> None:
    """Is it worth it? Run several methods on the same tasks, seeds and orders; ends with one table and one page.

    Stopped at any moment, the same command goes on. Started in several terminals, it shares the runs among them. With
    --methods, --seeds or --orders the table and the page are about these alone.
    """
    _quiet()
    from .compare import compare as compare_methods
    from .compare import plan_comparison

    settings: dict[str, Any] = {
        "methods": [method.strip() for method in methods.split(",")] if methods else None,
        "seeds": _whole_numbers("--seeds", seeds),
        "orders": _orders(orders),
    }
    if check:
        plan = plan_comparison(recipe, overrides or [], **settings)
        _say(f"{recipe} is fine: {len(plan.jobs)} runs into {plan.directory}.")
        return
    compare_methods(recipe, overrides or [], run=not gather, **settings)


@app.command()
def doctor(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, as for run", show_default=False)
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GB at hand (default: this machine's GPU, or its RAM).", show_default=False)
    ] = None,
) -> None:
    """Predict the peak memory and the size of the replay memory of RECIPE, before anything is loaded."""
    _quiet()
    from .doctor.advice import render_footprint
    from .recipe import load_recipe

    fits = render_footprint(load_recipe(recipe, overrides or []), TerminalConsole(), memory)
    raise typer.Exit(0 if fits else 1)


@app.command()
def report(
    run_directory: RunDirectory,
    out: Annotated[Path | None, typer.Option(help="Where to write the page (default: RUN/report.html).")] = None,
) -> None:
    """Write the run's self-contained page: matrix, retention, heads, losses, memory."""
    from .report import write_report

    _say(write_report(run_directory, out))


@app.command()
def inspect(
    run_directory: RunDirectory,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every stored file; status 2 and a line each when some are damaged.")
    ] = False,
) -> None:
    """Print what a run directory holds: tasks, teachers, memory, heads, matrix."""
    if verify:
        from .run.repair import verify as verify_files

        _say(verify_files(run_directory))
        return
    from .report import render_inspection

    render_inspection(run_directory, TerminalConsole())


@app.command()
def repair(run_directory: RunDirectory) -> None:
    """Take a run whose files were damaged back to its last undamaged task; nothing is deleted.

    What is damaged, and what was made from it, is moved into RUN/damaged-1.
    """
    _repair(run_directory)


@app.command()
def export(
    run_directory: RunDirectory,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
) -> None:
    """Copy the run's consolidated adapter as a plain PEFT adapter that needs nothing of this package."""
    from .run.export import export_adapter

    _say(export_adapter(run_directory, out))


def _repair(directory: Path) -> None:
    from .run.repair import repair as repair_directory

    for sentence in repair_directory(directory).sentences(directory):
        _say(sentence)


def _whole_numbers(option: str, text: str | None) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise ConfigError(
            f"{option} must be whole numbers with commas between, as in 0,1,2, got {shown(text)}."
        ) from None


def _orders(text: str | None) -> int | list[list[str]] | None:
    if not text:
        return None
    return (
        # No more digits than anybody has orders: Python does not read thousands.
        int(text.strip()[:20])
        if text.strip().isdecimal()
        else [[name.strip() for name in order.split(",")] for order in text.split(";")]
    )


def _say(text: object) -> None:
    typer.echo(printable(str(text)))


def _quiet() -> None:
    """Our own bars replace those of transformers; its warnings stay, but for one that nobody can heed."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    transformers.logging.disable_progress_bar()


def main() -> None:
    """Entry point: a mistake of the user's is one line per problem and status 2, a bug keeps its traceback."""
    # bitsandbytes warns at import about a CPU kernel that training does not use; whatever loads it, loads it later.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        with clean_terminal(), listening():
            app()
    except ConfigError as error:
        _refuse(*error.problems)
    except SeekrError as error:
        _refuse(str(error))
    except BrokenPipeError:
        _end_quietly()
    except OSError as error:
        _refuse(f"{error.filename or 'a file'}: {reason(error)}; check that path.")
    except ValueError as error:
        if not _is_about_a_name(error):
            raise
        _refuse(f"a path holds what no file name can ({error}); check the paths that were given.")


def _refuse(*problems: str) -> NoReturn:
    for problem in problems:
        typer.echo(f"seekr-peft: {printable(problem)}", err=True)
    raise SystemExit(2) from None


def _is_about_a_name(error: ValueError) -> bool:
    """Whether the operating system was given a path with NUL, or with half a character, in it: Python has no class for
    the one, and for the other one that says more than that."""
    return "embedded null" in str(error) or (isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason)


def _end_quietly() -> NoReturn:
    """The reader of the output (``| head``) has gone. What is left for it must not fail once more as Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(1)


if __name__ == "__main__":
    main()
