"""The command line, one file per subcommand. `ftrain.cli.main.main` is the entry point."""

__all__ = ["main", "plan", "replay"]
