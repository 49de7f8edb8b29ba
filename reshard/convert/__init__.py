"""Other weights out of a checkpoint's own: `--weights`."""
