"""`ftrain convert`: weights from Hugging Face's format to a checkpoint, and back (`ftrain.hf.convert`)."""

from ftrain.hf.convert import Convert, run

COMMANDS = {"convert": (Convert, run)}
