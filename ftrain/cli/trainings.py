"""The subcommands of `ftrain train`: the tasks of language models, and video."""

from ftrain.cli import train, train_video

COMMANDS = {**train.COMMANDS, **train_video.COMMANDS}
