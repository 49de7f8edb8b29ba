"""`reshard estimate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reshard.cli.options import ADDRESS, Debug, Format, Index, Pad, Revision, parse_sizes
from reshard.cli.output import Output

if TYPE_CHECKING:
    from reshard.checkpoint.description import Checkpoint
    from reshard.estimate.fixed import FixedRows
    from reshard.estimate.profile import Profile
    from reshard.estimate.recommend import Recommendation
    from reshard.estimate.sizes import Estimate, Options, Size

_WIDTHS = {"bfloat16": 2, "float32": 4}


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
            help="Schemes, such as bf16,w8a8_dynamic: of a checkpoint keep (its own; the default), bf16, w8a8_dynamic; "
            "of a config.json any that `synth` makes (default: bf16,w8a8_dynamic)."
        ),
    ] = None,
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
            if any(
                given is not None for given in (path, config, tp, scheme, max_tokens, override, svg, revision, index)
            ):
                raise UsageError("--measure prints this machine's profile and takes no PATH and no option but --format")
            _measure(output)
            return
        if path is not None and config is not None:
            raise UsageError("PATH and --config FILE: give one of them")
        if tp is None:
            raise UsageError("--tp is missing: give the group sizes to compare, such as --tp 1,2,4,8")
        from reshard.estimate.document import document
        from reshard.estimate.fixed import fixed_rows
        from reshard.estimate.profile import load_profile
        from reshard.estimate.recommend import recommend
        from reshard.estimate.sizes import Options, estimate

        options = Options(batch, _WIDTHS[reduce_dtype], pad, max_tokens, tensor_parallel_size)
        picture_file = None if svg is None else parse_local_target(svg, "--svg")
        sizes = sorted(parse_sizes(tp))
        profile = load_profile(device, override or ())
        schemes = None if scheme is None else _words(scheme, "--scheme")
        if config is not None:
            if revision is not None:
                raise UsageError(f"--revision goes with a hub repository, which {config} is not")
            if index is not None:
                raise UsageError(f"--index goes with a checkpoint's files, which {config} is not")
            checkpoints = _of_config(output, config, schemes)
        elif path is not None:
            checkpoints = _of_source(output, path, revision, index, schemes)
        else:
            raise UsageError("nothing to estimate: give a PATH, or --config FILE")
        found = [estimate(checkpoint, name, sizes, profile, options) for name, checkpoint in checkpoints.items()]
        chosen = [recommend(profile, one) for one in found]
        costs = [
            cost
            for one, checkpoint in zip(found, checkpoints.values(), strict=True)
            for cost in fixed_rows(checkpoint, one, profile, options)
        ]
        model = next(iter(checkpoints.values()))
        if picture_file is not None:
            _draw(picture_file, _title(model, profile), _subtitle(model, options), found, chosen)
        if output.is_json:
            output.json(document(model, profile, options, found, chosen, costs))
        else:
            _show(output, model, profile, options, found, chosen, costs)


def _measure(output: Output) -> None:
    from reshard.estimate.measure import measured_profile, to_toml

    profile = measured_profile()
    if output.is_json:
        output.json(profile.model_dump(exclude_none=True))
    else:
        output.text(to_toml(profile).rstrip())


def _of_config(output: Output, config: Path, schemes: list[str] | None) -> "dict[str, Checkpoint]":
    """The checkpoint that a config.json describes, by scheme."""
    from reshard.checkpoint.config_only import promised, read_config
    from reshard.estimate.described import DEFAULT_SCHEMES, plain_scheme
    from reshard.model.naming import CONFIG

    parsed = read_config(config)
    model = config.resolve().parent.name if config.name == CONFIG else config.stem
    names = [plain_scheme(word) for word in schemes or DEFAULT_SCHEMES]
    found = {name: promised(parsed, model, name) for name in names}
    for line in next(iter(found.values())).warnings:
        output.warn(line)
    return found


def _of_source(
    output: Output, path: str, revision: str | None, index: str | None, schemes: list[str] | None
) -> "dict[str, Checkpoint]":
    """A checkpoint as it is and as it could be converted, by scheme."""
    from reshard.convert.rules import KEEP
    from reshard.estimate.described import in_scheme, plain_scheme
    from reshard.plan.manifest_builder import scheme_name
    from reshard.source.open import describe, open_source

    with open_source(path, revision, index=index, notify=output.warn) as source:
        checkpoint = describe(source)
        source.check_unchanged()
    for line in checkpoint.warnings:
        output.warn(line)
    found = [in_scheme(checkpoint, plain_scheme(word)) for word in schemes or (KEEP,)]
    return {scheme_name(one.layers): one for one in found}


def _words(text: str, option: str) -> list[str]:
    from reshard.errors import UsageError

    words = [word.strip() for word in text.split(",")]
    if "" in words:
        raise UsageError(f"{option} {text!r}: a list with commas is wanted, with nothing left out")
    return list(dict.fromkeys(words))


def _title(checkpoint: "Checkpoint", profile: "Profile") -> str:
    from reshard.errors import printable

    return printable(f"{checkpoint.identity.name} on {profile.name}")


def _subtitle(checkpoint: "Checkpoint", options: "Options") -> str:
    model, count = checkpoint.model, len(checkpoint.layers)
    said = (
        f"hidden_size {model.hidden_size}, intermediate_size {model.intermediate_size}, {count} dense "
        f"{'layer' if count == 1 else 'layers'}, {options.tokens} tokens a rank and step"
    )
    if options.max_tokens is not None:
        said += f" in {options.max_tokens} rows"
    if options.tensor_parallel_size > 1:
        said += f", tensor-parallel size {options.tensor_parallel_size}"
    return said


def _show(
    output: Output,
    checkpoint: "Checkpoint",
    profile: "Profile",
    options: "Options",
    found: "list[Estimate]",
    chosen: "list[Recommendation]",
    costs: "list[FixedRows]",
) -> None:
    from reshard.cli.chart import show_chart
    from reshard.estimate.document import notes

    output.text(f"{_title(checkpoint, profile)}: {_subtitle(checkpoint, options)}")
    output.text()
    columns = (
        "scheme",
        "tp",
        "holds GiB",
        "saves GiB",
        "sent",
        "as int8",
        "messages",
        "ms/step",
        "as int8",
        "tiles",
        "blocks",
    )
    rows = [_row(one.scheme, size, options.tokens) for one in found for size in one.sizes]
    output.table([(title, "left" if title == "scheme" else "right") for title in columns], rows)
    output.text()
    show_chart(found, {one.scheme: one.tp_size for one in chosen})
    output.text()
    output.text(
        "sent: bytes a token and layer; messages: a layer, whatever the batch; as int8: tokens quantized before the "
        "gather"
    )
    output.text("tiles: whole tiles of the device; blocks: I/R a multiple of 128, as block-scaled checkpoints need")
    for line in notes(found, options):
        output.text(line)
    if costs:
        _show_fixed(output, costs, options)
    for choice in chosen:
        output.text()
        output.text(f"{choice.scheme}: choose {'none' if choice.tp_size is None else f'tp {choice.tp_size}'}")
        for reason in choice.reasons:
            output.text(f"  {reason}")


def _show_fixed(output: Output, costs: "list[FixedRows]", options: "Options") -> None:
    output.text()
    output.text(f"fixed rows: every rank sends {options.max_tokens} for its {options.tokens} tokens")
    output.text()
    pairs = (title for name in ("gathered", "scattered", "ms/layer", "ms/step") for title in (name, "exact"))
    columns = ("scheme", "tp", "rows", "unneeded", *pairs)
    output.table([(title, "left" if title == "scheme" else "right") for title in columns], [_cost(c) for c in costs])
    output.text()
    output.text(
        "rows: multiplied in a layer, by every rank; unneeded: of these, for nobody; gathered, scattered: bytes that a "
        "rank sends a layer; exact: with as many rows as tokens"
    )


def _cost(cost: "FixedRows") -> list[str]:
    ways = (cost.fixed, cost.exact)
    return [
        cost.scheme,
        str(cost.tp_size),
        f"{cost.fixed.rows:,}",
        f"{cost.unneeded:,}",
        *(f"{way.gathered:,}" for way in ways),
        *(f"{way.scattered:,}" for way in ways),
        *(f"{way.layer_seconds * 1e3:.3f}" for way in ways),
        *(f"{way.step_seconds * 1e3:.3f}" for way in ways),
    ]


def _row(scheme: str, size: "Size", tokens: int) -> list[str]:
    from reshard.estimate.model import GIB

    int8 = size.as_int8 if size.as_int8 != size.as_bf16 else None
    words = {None: "-", True: "yes", False: "no"}
    return [
        scheme,
        f"{size.tp_size}{' padded' if size.padded else ''}",
        f"{size.held / GIB:.3f}",
        f"{size.saved / GIB:.3f}",
        f"{size.as_bf16.wire.nbytes / tokens:,.0f}",
        f"{int8.wire.nbytes / tokens:,.0f}" if int8 else "-",
        str(size.as_bf16.wire.messages),
        f"{size.as_bf16.step_seconds * 1e3:.3f}",
        f"{int8.step_seconds * 1e3:.3f}" if int8 else "-",
        words[size.alignment.tiles],
        words[size.alignment.blocks],
    ]


def _draw(file: Path, title: str, subtitle: str, found: "list[Estimate]", chosen: "list[Recommendation]") -> None:
    from reshard.errors import OutputError
    from reshard.estimate.svg import picture

    try:
        file.write_text(picture(title, subtitle, found, chosen), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror}") from error
