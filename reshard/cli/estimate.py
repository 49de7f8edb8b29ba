"""`reshard estimate`."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from reshard.cli.options import ADDRESS, Debug, Format, Index, Pad, Revision, parse_list
from reshard.cli.output import Output, Table
from reshard.cli.parts import PartsOfSizes, parse_parts_of_sizes

if TYPE_CHECKING:
    from rich.text import Text

    from reshard.checkpoint.description import Checkpoint
    from reshard.estimate.document import Estimate, FixedRows, SchemeEstimate, Size
    from reshard.estimate.sizes import Wanted
    from reshard.model.parts import Part

    Parts = list[tuple[Part | None, list[int]]]

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
    part: PartsOfSizes = None,
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

    For a device that a profile describes; one size is recommended and, of several parts, which to split.
    """
    output = Output(form, quiet=True, debug=debug)
    with output.errors():
        from reshard.errors import UsageError
        from reshard.source.address import parse_local_target

        if measure:
            others = (path, config, tp, part, scheme, max_tokens, override, svg, revision, index)
            if any(given is not None for given in others):
                raise UsageError("--measure prints this machine's profile and takes no PATH and no option but --format")
            _measure(output)
            return
        if path is not None and config is not None:
            raise UsageError("PATH and --config FILE: give one of them")
        from reshard.estimate.profile import load_profile
        from reshard.estimate.sizes import Options
        from reshard.estimate.sizes import estimate as estimate_sizes

        as_bf16 = "--weights bf16" if config is None else "--scheme bf16"
        options = Options(batch, _REDUCE_BYTES[reduce_dtype], pad, max_tokens, tensor_parallel_size, as_bf16)
        picture = None if svg is None else parse_local_target(svg, "--svg")
        parts = parse_parts_of_sizes(part, tp)
        profile = load_profile(device, override or ())
        if config is not None:
            for option, value in (("--revision", revision), ("--index", index)):
                if value is not None:
                    raise UsageError(f"{option} goes with a checkpoint's files, which {config} is not")
            if weights != "keep":
                raise UsageError("--weights goes with PATH; of a config.json, --scheme names the schemes to compare")
            wanted = _of_config(config, parse_list(scheme or _OF_A_CONFIG, "--scheme"), parts)
        elif path is not None:
            wanted = _of_source(output, path, revision, index, scheme, parse_list(weights, "--weights"), parts)
        else:
            raise UsageError("nothing to estimate: give a PATH, or --config FILE")
        for line in dict.fromkeys(line for each in wanted for line in each.checkpoint.warnings):
            output.warn(line)
        found = estimate_sizes(wanted, profile, options)
        if picture is not None:
            _draw(picture, found)
        output.document(found, lambda: _lines(found))


def _measure(output: Output) -> None:
    from reshard.estimate.measure import measured_profile, to_toml

    profile = measured_profile()
    output.document(profile.model_dump(exclude_none=True), lambda: to_toml(profile).rstrip().splitlines())


def _of_config(config: Path, schemes: list[str], parts: "Parts") -> "list[Wanted]":
    """What a config.json describes, by scheme; BF16 is that, whatever type of floats the file says."""
    from reshard.checkpoint.config_only import config_checkpoint, read_config
    from reshard.convert.rules import BF16, KEEP, converted
    from reshard.estimate.sizes import Wanted
    from reshard.model.naming import CONFIG
    from reshard.model.parts import DENSE_FFN
    from reshard.schemes.table import scheme_by_option

    parsed = read_config(config)
    model = config.resolve().parent.name if config.name == CONFIG else config.stem
    names = dict.fromkeys(map(scheme_by_option, schemes))
    found = []
    for name in names:
        for part, sizes in parts:
            described = config_checkpoint(parsed, model, name, part or DENSE_FFN)
            found.append(Wanted(name, converted(described, BF16 if name == BF16 else KEEP), sizes))
    return found


def _of_source(
    output: Output,
    path: str,
    revision: str | None,
    index: str | None,
    scheme: str | None,
    weights: list[str],
    parts: "Parts",
) -> "list[Wanted]":
    """Parts of a checkpoint, or the sets of several, as they are and as they could be converted."""
    from reshard.convert import Weights
    from reshard.convert.rules import converted
    from reshard.errors import UsageError
    from reshard.estimate.sizes import Wanted
    from reshard.plan.manifest_builder import scheme_name
    from reshard.source.open import SeveralSets, describe, open_source

    known = get_args(Weights)
    for word in weights:
        if word not in known:
            raise UsageError(f"--weights {word}: there are {', '.join(known)}")

    def read(address: str, wanted: "Parts") -> "list[tuple[Checkpoint, list[int]]]":
        with open_source(address, revision, index=index, notify=output.warn) as source:
            described = [(describe(source, scheme, part), sizes) for part, sizes in wanted]
            source.check_unchanged()
        return described

    try:
        checkpoints = read(path, parts)
    except SeveralSets as sets:
        checkpoints = [
            one
            for part, sizes in parts
            for address in (sets.addresses.values() if part is None else [sets.of(part)])
            for one in read(address, [(part, sizes)])
        ]
    found = {}
    for word in weights:
        made = [(converted(one, word), sizes) for one, sizes in checkpoints]
        name = scheme_name(made[0][0].layers)
        found[name] = [Wanted(name, one, sizes) for one, sizes in made]
    return list(chain.from_iterable(found.values()))


def _lines(found: "Estimate") -> "Iterator[str | Table | Text]":
    from reshard.cli.chart import chart
    from reshard.estimate.profile import GIB

    yield f"{found.title}: {found.subtitle}"
    yield ""
    runs = (">sent", ">as int8", ">messages", ">ms/step", ">as int8")
    each = [(one, size) for one in found.schemes for size in one.sizes]
    yield Table(
        ("scheme", ">tp", ">holds GiB", ">saves GiB", *runs, ">tiles", ">blocks"),
        [_row(one.label, size, found.batch) for one, size in each],
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
    if any(one.label != one.scheme for one in found.schemes):
        yield from ("", "collectives: bytes that a rank sends for a token, each call; calls: of each, a step", "")
        names = (">all_gather", ">all_to_all", ">reduce_scatter")
        yield Table(("scheme", ">tp", ">calls", *names), [_collectives(one, size) for one, size in each])
    rows = [_fixed(one.label, size.tp_size, size.fixed_rows) for one, size in each if size.fixed_rows]
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
        yield f"{one.label}: choose {'none' if one.recommended is None else f'tp {one.recommended}'}"
        yield from (f"  {reason}" for reason in one.reasons)
    for chosen in found.chosen:
        split = ", ".join(f"{part}={size}" for part, size in chosen.tp_sizes.items()) or "nothing"
        gain = f"{chosen.saved_seconds * 1e3:.3f} ms less a step, {chosen.saved_bytes / GIB:.3f} GiB saved"
        yield from ("", f"{chosen.scheme}: of these parts split {split}: {gain}")
        yield from (f"  {other}" for other in chosen.others)


def _collectives(one: "SchemeEstimate", size: "Size") -> list[str]:
    run = size.runs
    sent = (
        run.gather_bytes_per_token_layer,
        run.exchange_bytes_per_token_layer,
        run.scatter_bytes_per_token_layer,
    )
    calls = one.layers if any(sent) else 0
    return [one.label, str(size.tp_size), str(calls), *(f"{each:,}" if each else "-" for each in sent)]


def _row(scheme: str, size: "Size", tokens: int) -> list[str]:
    from reshard.estimate.profile import GIB

    plain, int8 = size.gathered_as_bf16, size.gathered_as_int8
    runs = (plain, None if int8 == plain else int8)
    words = {None: "-", True: "yes", False: "no"}
    sent = [f"{run.sent_bytes_per_layer / tokens:,.0f}" if run else "-" for run in runs]
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
