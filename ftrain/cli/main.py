"""The command line: `ftrain SUBCOMMAND --option value ...`."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tyro.extras import subcommand_cli_from_dict

from ftrain.analysis.cuda_allocator import prefer_expandable_segments
from ftrain.cli import plan, replay
from ftrain.cli.config_file import with_config
from ftrain.hf import convert

# A subcommand is a frozen dataclass of options, and a function from these to the exit code.
SUBCOMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "convert": (convert.Convert, convert.run),
    "plan": (plan.PlanOptions, plan.run),
    "replay": (replay.Replay, replay.run),
}


# Commands that have commands of their own, in files that need packages which a base install has not.
GROUPS: dict[str, str] = {
    "train": "train a model that exists on data that exists",
    "data": "look at data files",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0, or 2 after a line about what the user can fix.

    `arguments`: default those of the process. Unknown or malformed options end the process with SystemExit, as `--help`
    does. CUDA's allocator gets expandable segments, unless the environment sets it.
    """
    prefer_expandable_segments()
    _see_experiments()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _group(words[0], words[1:]) if words[:1] and words[0] in GROUPS else _single(words)
    except (ValueError, OSError) as error:
        print(f"ftrain: {error}", file=sys.stderr)
        return 2


def _single(words: Sequence[str]) -> int:
    further = "; ".join(f"`ftrain {name}`: {about}" for name, about in GROUPS.items())
    kinds: dict[str, Callable[..., Any]] = {name: kind for name, (kind, _) in SUBCOMMANDS.items()}
    options = subcommand_cli_from_dict(kinds, prog="ftrain", args=words, description=f"Also {further} (--help).")
    run = next(run for kind, run in SUBCOMMANDS.values() if type(options) is kind)
    return run(options)


def _group(name: str, words: list[str]) -> int:
    """`ftrain NAME COMMAND ...`; options may come from a file (`--config`)."""
    commands: dict[str, tuple[type, Callable[[Any], int]]] = import_module(f"ftrain.cli.{name}").COMMANDS
    if words[:1] and words[0] in commands:
        words = [words[0], *with_config(commands[words[0]][0], words[1:])]
    kinds: dict[str, Callable[..., Any]] = {command: kind for command, (kind, _) in commands.items()}
    options = subcommand_cli_from_dict(kinds, prog=f"ftrain {name}", args=words, description=GROUPS[name].capitalize())
    run = next(run for kind, run in commands.values() if type(options) is kind)
    return run(options)


def _see_experiments() -> None:
    """Make the experiments of a checkout importable; they are not installed."""
    root = Path(__file__).resolve().parents[2]
    if (root / "experiments" / "__init__.py").is_file() and str(root) not in sys.path:
        sys.path.append(str(root))


if __name__ == "__main__":
    sys.exit(main())
