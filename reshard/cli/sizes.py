"""Group sizes on the command line."""


def parse_sizes(text: str | None) -> tuple[int, ...]:
    """What `--tp 4,8` lists, each size once. Raises UsageError for anything else."""
    from reshard.errors import UsageError
    from reshard.model.naming import MAX_TP_SIZE

    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (
            part.isascii() and part.isdigit() and len(part) <= len(str(MAX_TP_SIZE)) and 1 <= int(part) <= MAX_TP_SIZE
        ):
            raise UsageError(f"--tp {text}: {part!r} is no group size; write them as 4,8, each from 1 to {MAX_TP_SIZE}")
    return tuple(dict.fromkeys(int(part) for part in parts))
