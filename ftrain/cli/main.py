"""The command line: `ftrain SUBCOMMAND --option value ...`.

A subcommand is a frozen dataclass of options, and a function from these to the exit code. Its file is loaded when it is
asked for, as some need packages that a base install has not.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro
from tyro.extras import subcommand_cli_from_dict

from ftrain.analysis.cuda_allocator import prefer_expandable_segments
from ftrain.cli.config_file import with_config

Run = Callable[[Any], int]


@dataclass(frozen=True)
class Subcommand:
    """Where a subcommand is (`module`, whose `COMMANDS` has its options and its function), and what it is about.

    `group`: it has commands of its own.
    """

    module: str
    about: str
    group: bool = False

    def commands(self) -> Mapping[str, tuple[type, Run]]:
        """Options and function of each of its commands. ValueError where a package that it needs is not installed."""
        found: Mapping[str, tuple[type, Run]] = import_module(self.module).COMMANDS
        return found


SUBCOMMANDS: dict[str, Subcommand] = {
    "train": Subcommand("ftrain.cli.trainings", "train a model that exists on data that exists", group=True),
    "data": Subcommand("ftrain.cli.data", "count and show what is in data files", group=True),
    "encode": Subcommand("ftrain.cli.encode", "latents, texts and conditions of a folder of videos, for training"),
    "generate": Subcommand("ftrain.cli.generate", "answer prompts with a model's folder, and an adapter"),
    "sample": Subcommand("ftrain.cli.sample", "films of a video pipeline, with or without an adapter"),
    "eval": Subcommand("ftrain.cli.eval", "the mean loss of a model on data files"),
    "merge": Subcommand("ftrain.cli.merge", "write a model's folder with an adapter merged into it"),
    "export": Subcommand("ftrain.cli.export", "write the folders of a run from its last checkpoint"),
    "report": Subcommand("ftrain.cli.report", "what a run trained, how its numbers went, and where it ended"),
    "params": Subcommand("ftrain.cli.params", "count a model's parameters, and show those that a glob names"),
    "check": Subcommand("ftrain.cli.check", "compare a folder's model with the plain module that it comes from"),
    "plan": Subcommand("ftrain.cli.plan", "search the layouts of the step of a model's folder, or of an experiment"),
    "convert": Subcommand("ftrain.cli.convert", "weights from and to Hugging Face's format"),
    "replay": Subcommand("ftrain.cli.replay", "run a step of a run again"),
    "launch": Subcommand("ftrain.cli.launch", "write the files that start a command on many nodes", group=True),
    "doctor": Subcommand("ftrain.cli.doctor", "what is installed, what this machine has, and what is missing"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0, or 2 after a line about what the user can fix.

    `arguments`: default those of the process. Unknown or malformed options end the process with SystemExit, as `--help`
    does. CUDA's allocator gets expandable segments, unless the environment sets it.
    """
    prefer_expandable_segments()
    logging.getLogger("absl").setLevel(logging.ERROR)  # grain warns at each start that JAX is absent
    _see_experiments()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in SUBCOMMANDS:
        _explain(words)
    try:
        options, run = parse(words)
        return run(options)
    except (ValueError, OSError) as error:
        print(f"ftrain: {error}", file=sys.stderr)
        return 2


def parse(words: Sequence[str]) -> tuple[Any, Run]:
    """The options of a command line that begins with a subcommand, and the function that they are for.

    ValueError for a configuration file that does not fit; SystemExit for options that are not understood.
    """
    name, *rest = words
    subcommand = SUBCOMMANDS[name]
    commands = subcommand.commands()
    if not subcommand.group:
        kind, run = commands[name]
        return tyro.cli(kind, prog=f"ftrain {name}", args=with_config(kind, rest)), run
    if rest[:1] and rest[0] in commands:
        rest = [rest[0], *with_config(commands[rest[0]][0], rest[1:])]
    kinds: dict[str, Callable[..., Any]] = {command: kind for command, (kind, _) in commands.items()}
    options = subcommand_cli_from_dict(kinds, prog=f"ftrain {name}", args=rest, description=subcommand.about)
    return options, next(run for kind, run in commands.values() if type(options) is kind)


def _explain(words: Sequence[str]) -> None:
    """Print what there is, and end the process."""
    asked = words[:1] in (["--help"], ["-h"])
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {subcommand.about}" for name, subcommand in SUBCOMMANDS.items()]
    unknown = f"ftrain: there is no subcommand {words[0]!r}\n" if words and not asked else ""
    text = f"{unknown}usage: ftrain SUBCOMMAND [options]; ftrain SUBCOMMAND --help explains them\n\n" + "\n".join(lines)
    print(text, file=sys.stdout if asked else sys.stderr)
    raise SystemExit(0 if asked else 2)


def _see_experiments() -> None:
    """Make the experiments of a checkout importable; they are not installed."""
    root = Path(__file__).resolve().parents[2]
    if (root / "experiments" / "__init__.py").is_file() and str(root) not in sys.path:
        sys.path.append(str(root))


if __name__ == "__main__":
    sys.exit(main())
