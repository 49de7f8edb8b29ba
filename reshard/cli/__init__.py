"""The command line. Heavy modules are imported inside commands, so that `--help` costs what Typer costs."""
