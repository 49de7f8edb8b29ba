"""A checkpoint's dense layers, described."""
