"""``python -m attnpool_kernels.zoo fit | test | predict | configs``: see ``--help``.

What cannot be ends in one line on stderr. The exit code is 2 for an option, 143 after SIGTERM, 130
after Ctrl-C, and 1 for a file that cannot be read or written, a checkpoint that does not fit, a
training that fails.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

PROGRAM = "python -m attnpool_kernels.zoo"
HELP = {
    "fit": "train a model",
    "test": "errors of a trained model",
    "predict": "a table for a file of molecules, of any size",
    "configs": "list the packaged configurations",
}


EXAMPLES = {
    "fit": "fit --config qm7b_small_abp --data.path qm7b.npz --output runs/small",
    "test": "test --ckpt_path runs/small",
    "predict": "predict molecules.xyz runs/small --output table.csv",
    "configs": "configs qm9 abp",
}
MORE = f"""  {PROGRAM} configs qm9_schnet_abp > mine.yaml
  torchrun --nproc_per_node 4 -m attnpool_kernels.zoo predict molecules.xyz RUN --output table.csv

COMMAND --help lists the options of a command; ATTNPOOL_TRACEBACK=1 shows where an error is from."""
PREDICT = """What a model predicts for a file of molecules of any size: memory does not grow.

A command that was interrupted goes on where it was. Under torchrun the processes share the work."""
# How the types of Python are called in --help; what may be left out says so by having no default.
TYPES = {
    r"type: Optional\[dict\[str, Any\]\]": "mapping",
    r"type: (?:Optional\[)?Sequence\[(\w+)\]\]?": r"list of \1",
    r"type: (?:Optional\[)?Literal\[(.*?)\]\]?": r"one of \1",
    r"type: bool( \| null)?": "true or false",
    r" \| null": "",
    r"type: ": "",
    r", default: (null|\(\))": "",
}


def plain_types(text: str) -> str:
    """A help text in which types are in words."""
    for pattern, words in TYPES.items():
        text = re.sub(pattern, words, text)
    return text


def plain_error(text: str) -> str:
    """An error in one line; those of wrong types as those of our own checks."""
    text = " ".join(text.split())
    for pattern in (
        r'Parser key "(?P<name>[^"]+)": Does not validate .*?Subtypes: \[(?P<kinds>.*?)\] Errors:'
        r".* Given value: (?P<value>.*)",
        r'Parser key "(?P<name>[^"]+)": Expected a (?P<kinds>.*?)\. Got value: (?P<value>.*)',
    ):
        if found := re.fullmatch(pattern, text):
            kinds = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", found["kinds"])
            kinds = kinds.replace("NoneType", "null").replace("collections.abc.", "")
            kinds = re.sub(r"dict\[.*?\]|\bdict\b", "a mapping", kinds)
            kinds = re.sub(r"\bSequence\b(?:\[(\w+)\])?", r"a list of \1", kinds)
            kinds = kinds.replace("a list of ,", "a list,").removesuffix(" of ")
            return f"{found['name']} must be {' or '.join(kinds.split(', '))}, got {found['value']}"
    return text


def titled(parser: ArgumentParser, *titles: str) -> None:
    """Names the last groups of options: the summaries of classes and functions are no titles."""
    for group, title in zip(parser._action_groups[-len(titles) :], titles):
        group.title = title


def config(name: str) -> str:
    """A file, or the text of the packaged configuration of that name; OptionError."""
    if Path(name).is_file():
        return name
    from . import grid
    from .trainer import OptionError

    if name in grid.OLD or name in grid.names():
        return grid.text(name)
    near = difflib.get_close_matches(name, [*grid.names(), *grid.OLD], n=3)
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise OptionError(f"config must be a file or a name that `configs` lists, got {name!r}{hint}")


def with_configs(argv: Sequence[str]) -> list[str]:
    """The arguments with the names of packaged configurations replaced by their texts."""
    found = list(argv)
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            found[i + 1] = config(argv[i + 1])
        elif argument.startswith("--config="):
            found[i] = "--config=" + config(argument.removeprefix("--config="))
    return found


def parsers() -> dict[str, ArgumentParser]:
    """The command line, by "", and those of its commands, from signatures and docstrings."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    from . import run
    from .data import MoleculeData
    from .task import PoolingTask

    # Else a mapping with a class_path, anywhere in a configuration, calls what it names.
    set_parsing_settings(import_path_denylist=["*"])

    class Help(DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text  # examples have lines of their own

        def _expand_help(self, action: Any) -> str:
            return plain_types(super()._expand_help(action))

    def command(name: str, arguments: str, description: str) -> ArgumentParser:
        return ArgumentParser(
            usage=f"{PROGRAM} {name} {arguments}",
            description=description,
            epilog=f"example:\n  {PROGRAM} {EXAMPLES[name]}",
            formatter_class=Help,
            exit_on_error=False,
        )

    fit = command(
        "fit", "--config NAME|FILE [options]", "Trains a model; keeps the best by validation loss."
    )
    fit.add_argument(
        "--config",
        action="config",
        help="YAML file or name of a packaged configuration; what follows it overrides it",
    )
    fit.add_function_arguments(run.fit, skip={"task", "data", "trainer", "config"})
    fit.add_argument("--seed", type=int, default=0, help="of the weights and of the order")
    fit.add_class_arguments(PoolingTask, "task")
    fit.add_class_arguments(MoleculeData, "data", skip={"dataset"})
    fit.add_argument("--data.dataset", type=str, required=True, help="name of the data set")
    fit.add_class_arguments(run.TrainerOptions, "trainer")
    titled(fit, "the run", "the model and its loss", "the data", "the training")
    fit.link_arguments("task.targets", "data.targets")
    fit.link_arguments("seed", "data.seed")

    test = command(
        "test", "--ckpt_path RUN|FILE [options]", "Errors on the molecules that are for testing."
    )
    test.add_function_arguments(run.evaluate, skip={"trainer"})
    test.add_class_arguments(run.TrainerOptions, "trainer", skip=run.FIT_ONLY)
    titled(test, "the test", "where it runs")

    predict = command("predict", "MOLECULES RUN|FILE [options]", PREDICT)
    predict.add_function_arguments(run.predict, as_positional=True)
    titled(predict, "the table")

    parser = ArgumentParser(
        prog=PROGRAM,
        description="Trains, tests and applies models of molecules with any pooling.",
        epilog="\n".join(["examples:", *(f"  {PROGRAM} {x}" for x in EXAMPLES.values()), MORE]),
        formatter_class=Help,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    configs = command(
        "configs", "[NAME|WORD ...]", "The packaged configurations: all, one, or those that match."
    )
    configs.add_argument(
        "words", nargs="*", type=str, help="a name, to print it; or parts of names, * and ? too"
    )
    made = {"fit": fit, "test": test, "predict": predict, "configs": configs}
    for name, made_command in made.items():
        commands.add_subcommand(name, made_command, help=HELP[name])
    return {"": parser, **made}


def quiet() -> None:
    """Silences what Lightning says that is no news here, and nothing else."""
    # Devices that are absent, seeds, and offers of the vendor's services are infos.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The folder of a run holds its checkpoints and its configuration by design.
    warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty")
    # torch has renamed what Lightning asks for; the answer is the same.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")
    # Small trials on a GPU machine's CPU are meant.
    warnings.filterwarnings("ignore", r"(GPU|MPS) available but not used")
    # An epoch without validation before the first one with it has no best model yet.
    warnings.filterwarnings("ignore", r"`ModelCheckpoint\(monitor='val/loss'\)` could not find")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["configs"] and not any(x.startswith("-") for x in argv):
            from . import grid

            print(grid.listing(argv[1:]))  # at once: nothing heavy has been imported
            return 0
        argv = with_configs(argv)
        quiet()
        return _run(argv)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if os.environ.get("ATTNPOOL_TRACEBACK"):
            raise
        text = plain_error(str(error))
        if not isinstance(error, ValueError | OSError | ImportError):  # none of our own checks
            first = (str(error).strip() or "no reason given").splitlines()[0]
            text = f"{type(error).__name__}: {first} (ATTNPOOL_TRACEBACK=1 shows where)"
        print(f"error: {text}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def _run(argv: list[str]) -> int:
    from jsonargparse import ArgumentError
    from lightning.pytorch import seed_everything
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from . import grid, run
    from .trainer import of_options

    made = parsers()
    with of_options(ArgumentError, ValueError, TypeError):
        found = made[""].parse_args(argv)
        command = found.subcommand
        options = found[command]
        if command == "fit":
            seed_everything(options.seed, workers=True)  # before the weights are made
        given = vars(made[command].instantiate(options))
    quiet()  # SchNetPack, where it has been imported, has set the loggers anew
    try:
        if command == "configs":
            print(grid.listing(options.words))
        elif command == "predict":
            run.predict(**options.as_dict())
        elif command == "test":
            run.evaluate(**given)
        else:
            folder = run.run_folder(given["task"], given["data"], options.output)
            if options.ckpt_path is not None and run.in_folder(options.ckpt_path, folder):
                options.ckpt_path = None  # the run that resumes is the one that it resumes
            config = made["fit"].dump(options, skip_default=False)
            kept = {k: x for k, x in given.items() if k not in ("config", "seed")}
            run.fit(**kept, config=config)
    except SIGTERMException:
        if run.first_process():
            print(
                "error: stopped by SIGTERM; fit goes on after the last whole epoch with "
                "--ckpt_path last",
                file=sys.stderr,
            )
        return 128 + signal.SIGTERM
    return 0


if __name__ == "__main__":
    sys.exit(main())
