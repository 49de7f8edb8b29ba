"""`reshard estimate`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from reshard.cli.options import ADDRESS, Debug, Format, Index, Pad, Revision, parse_list, parse_sizes
from reshard.cli.output import Output, Table

if TYPE_CHECKING:
    from rich.text import Text

    from reshard.checkpoint.description import Checkpoint
    from reshard.estimate.document import Estimate, FixedRows, Size

_REDUCE_BYTES = {"bfloat16": 2, "float32": 4}
_OF_A_CONFIG = "bf16,w8a8_dynamic"  # a config.json often names no scheme that a device would run


def estimate(
    path: Annotated[
        str | None, typer.Argument(metavar="[PATH]", help=f"A checkpoint or a shard set. {ADDRESS} Or --config.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A Hugging Face config.json, where no checkpoint is at hand.")
    ] = None,
    tp: Annotated[str | None, typer.Option("--tp", help="Group sizes, such as 1,2,4,8.")] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME..]",
            help="With PATH as split takes it: what the quantized weights are, where nothing beside the files says it. "
            f"With --config the schemes to compare ({_OF_A_CONFIG}).",
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(metavar="keep|bf16|w8a8[,..]", help="With PATH: compare its weights as split --weights has them."),
    ] = "keep",
    batch: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Tokens that each data-parallel rank brings to a decode step.")
    ] = 24,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_000_000, help="Rows that every rank sends, whatever it has: the plugin's key max_tokens."
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, max=99_999, help="The engine's: so many ranks of a group hold the same tokens.")
    ] = 1,
    device: Annotated[str, typer.Option(help="A device profile's name, or its .toml file.")] = "atlas-a2-376t",
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the profile; again for more."),
    ] = None,
    reduce_dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="The type in which partial sums travel.")
    ] = "bfloat16",
    pad: Pad = False,
    svg: Annotated[str | None, typer.Option(help="Draw the estimate into this file.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine instead and print its profile (needs torch).")
    ] = False,
    revision: Revision = None,
    index: Index = None,
    form: Format = "human",
    debug: Debug = False,
) -> None:
    """Compare group sizes: bytes held and sent, time of a step.

    For a device that a profile describes; one size is recommended.
    """
    output = Output(form, quiet=True, debug=debug)
    with output.errors():
        from reshard.errors import UsageError
        from reshard.source.address import parse_local_target

        if measure:
            others = (path, config, tp, scheme, max_tokens, override, svg, revision, index)
            if any(given is not None for given in others):
                raise UsageError("--measure prints this machine's profile and takes no PATH and no option but --format")
            _measure(output)
            return
        if path is not None and config is not None:
            raise UsageError("PATH and --config FILE: give one of them")
        if tp is None:
            raise UsageError("--tp is missing: give the group sizes to compare, such as --tp 1,2,4,8")
        from reshard.estimate.profile import load_profile
        from reshard.estimate.sizes import Options
        from reshard.estimate.sizes import estimate as estimate_sizes

        options = Options(batch, _REDUCE_BYTES[reduce_dtype], pad, max_tokens, tensor_parallel_size)
        picture = None if svg is None else parse_local_target(svg, "--svg")
        sizes = sorted(parse_sizes(tp))
        profile = load_profile(device, override or ())
        if config is not None:
            for option, value in (("--revision", revision), ("--index", index)):
                if value is not None:
                    raise UsageError(f"{option} goes with a checkpoint's files, which {config} is not")
            if weights != "keep":
                raise UsageError("--weights goes with PATH; of a config.json, --scheme names the schemes to compare")
            checkpoints = _of_config(config, parse_list(scheme or _OF_A_CONFIG, "--scheme"))
        elif path is not None:
            checkpoints = _of_source(output, path, revision, index, scheme, parse_list(weights, "--weights"))
        else:
            raise UsageError("nothing to estimate: give a PATH, or --config FILE")
        for line in next(iter(checkpoints.values())).warnings:
            output.warn(line)
        found = estimate_sizes(checkpoints, sizes, profile, options)
        if picture is not None:
            _draw(picture, found)
        output.document(found, lambda: _lines(found))


def _measure(output: Output) -> None:
    from reshard.estimate.measure import measured_profile, to_toml

    profile = measured_profile()
    output.document(profile.model_dump(exclude_none=True), lambda: to_toml(profile).rstrip().splitlines())


def _of_config(config: Path, schemes: list[str]) -> "dict[str, Checkpoint]":
    """The checkpoint that a config.json describes, by scheme."""
    from reshard.checkpoint.config_only import config_checkpoint, read_config
    from reshard.model.naming import CONFIG
    from reshard.schemes.table import scheme_by_option

    parsed = read_config(config)
    model = config.resolve().parent.name if config.name == CONFIG else config.stem
    names = dict.fromkeys(map(scheme_by_option, schemes))
    return {name: config_checkpoint(parsed, model, name) for name in names}


def _of_source(
    output: Output, path: str, revision: str | None, index: str | None, scheme: str | None, weights: list[str]
) -> "dict[str, Checkpoint]":
    """A checkpoint as it is and as it could be converted, by scheme."""
    from reshard.convert import Weights
    from reshard.convert.rules import converted
    from reshard.errors import UsageError
    from reshard.model.parts import DENSE_FFN
    from reshard.plan.manifest_builder import scheme_name
    from reshard.source.open import describe, open_source

    known = get_args(Weights)
    for word in weights:
        if word not in known:
            raise UsageError(f"--weights {word}: there are {', '.join(known)}")
    with open_source(path, revision, index=index, notify=output.warn) as source:
        checkpoint = describe(source, scheme, DENSE_FFN)
        source.check_unchanged()
    found = [converted(checkpoint, word) for word in weights]
    return {scheme_name(one.layers): one for one in found}


def _lines(found: "Estimate") -> "Iterator[str | Table | Text]":
    from reshard.cli.chart import chart

    yield f"{found.title}: {found.subtitle}"
    yield ""
    runs = (">sent", ">as int8", ">messages", ">ms/step", ">as int8")
    yield Table(
        ("scheme", ">tp", ">holds GiB", ">saves GiB", *runs, ">tiles", ">blocks"),
        [_row(one.scheme, size, found.batch) for one in found.schemes for size in one.sizes],
    )
    yield ""
    yield from chart(found)
    yield ""
    yield (
        "sent: bytes a token and layer; messages: a layer, whatever the batch; as int8: tokens quantized before the "
        "gather"
    )
    yield "tiles: whole tiles of the device; blocks: I/R a multiple of 128, as block-scaled checkpoints need"
    yield from found.notes
    rows = [
        _fixed(one.scheme, size.tp_size, size.fixed_rows)
        for one in found.schemes
        for size in one.sizes
        if size.fixed_rows
    ]
    if rows:
        yield from ("", f"fixed rows: every rank sends {found.max_tokens} for its {found.batch} tokens", "")
        pairs = (title for name in (">gathered", ">scattered", ">ms/layer", ">ms/step") for title in (name, ">exact"))
        yield Table(("scheme", ">tp", ">rows", ">unneeded", *pairs), rows)
        yield ""
        yield (
            "rows: multiplied in a layer, by every rank; unneeded: of these, for nobody; gathered, scattered: bytes "
            "that a rank sends a layer; exact: with as many rows as tokens"
        )
    for one in found.schemes:
        yield ""
        yield f"{one.scheme}: choose {'none' if one.recommended is None else f'tp {one.recommended}'}"
        yield from (f"  {reason}" for reason in one.reasons)


def _row(scheme: str, size: "Size", tokens: int) -> list[str]:
    from reshard.estimate.profile import GIB

    plain, int8 = size.gathered_as_bf16, size.gathered_as_int8
    runs = (plain, None if int8 == plain else int8)
    words = {None: "-", True: "yes", False: "no"}
    sent = [
        f"{(run.gather_bytes_per_layer + run.scatter_bytes_per_layer) / tokens:,.0f}" if run else "-" for run in runs
    ]
    return [
        scheme,
        f"{size.tp_size}{' padded' if size.padded else ''}",
        f"{size.held_bytes / GIB:.3f}",
        f"{size.saved_bytes / GIB:.3f}",
        *sent,
        str(plain.messages_per_layer),
        *(f"{run.step_seconds * 1e3:.3f}" if run else "-" for run in runs),
        words[size.alignment.tiles],
        words[size.alignment.blocks],
    ]


def _fixed(scheme: str, tp_size: int, rows: "FixedRows") -> list[str]:
    runs = (rows.fixed, rows.exact)
    return [
        scheme,
        str(tp_size),
        f"{rows.fixed.rows_per_layer:,}",
        f"{rows.unneeded_rows_per_layer:,}",
        *(f"{run.gather_bytes_per_layer:,}" for run in runs),
        *(f"{run.scatter_bytes_per_layer:,}" for run in runs),
        *(f"{run.layer_seconds * 1e3:.3f}" for run in runs),
        *(f"{run.step_seconds * 1e3:.3f}" for run in runs),
    ]


def _draw(file: Path, found: "Estimate") -> None:
    from reshard.errors import OutputError
    from reshard.estimate.svg import picture

    try:
        file.write_text(picture(found), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror}") from error
