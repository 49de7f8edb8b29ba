"""`reshard split`."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from reshard.cli.options import ADDRESS, Debug, Format, Index, Pad, Quiet, Revision, Scheme, Weights
from reshard.cli.output import Output, Table, size_text
from reshard.cli.parts import Parts, parse_parts

if TYPE_CHECKING:
    from reshard.plan.pipeline import Cut, Prepared
    from reshard.writer.split import SplitOptions, SplitResult
    from reshard.writer.target import Target

_SHOWN_DIGEST = 16


def split(
    source: Annotated[str, typer.Argument(metavar="SRC", help=f"{ADDRESS} A shard set is re-sharded.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The shard set's folder, or s3://…: new or empty.")],
    tp: Annotated[int | None, typer.Option("--tp", help="Size of the group: how many shards.")] = None,
    part: Parts = None,
    weights: Weights = "keep",
    quant_format: Annotated[
        Literal["modelslim", "compressed-tensors"], typer.Option(help="How --weights w8a8 names its tensors.")
    ] = "modelslim",
    layout: Annotated[Literal["fused", "separate"], typer.Option(help="gate and up stacked, or apart.")] = "fused",
    ranks: Annotated[str | None, typer.Option(help="Write only these ranks, such as 0-3,7.")] = None,
    pad: Pad = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished shards that are what SRC gives now.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in OUT when all is written.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written; write nothing.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads. The bytes do not depend on it.")] = None,
    scheme: Scheme = None,
    revision: Revision = None,
    index: Index = None,
    form: Format = "human",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Cut SRC's DenseFFN, or other parts, into one shard per rank."""
    output = Output(form, quiet=quiet, debug=debug)
    with output.errors():
        from reshard.plan.pipeline import Cut, check_set_digests, prepare
        from reshard.source.open import open_part, part_address
        from reshard.writer.open import check_holds_no_set, open_target
        from reshard.writer.split import DEFAULT_WORKERS, SplitOptions, check_target, own_ranks, write_shards
        from reshard.writer.team import agree, open_team, read_place

        place = read_place()
        if place.size > 1:
            kept = "; finished shards are kept: run the same command with --resume"
            output.is_process(place.number, place.size, socket.gethostname(), kept)
            # Where the store's host dies torch adds the stack of its own code to our line.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        with open_team(place) as team:
            threads = workers or max(1, DEFAULT_WORKERS // place.on_this_host)
            wanted = parse_parts(part, tp)
            together = tuple(one.part.key for one in wanted if one.part) if len(wanted) > 1 else ()
            if together:
                check_holds_no_set(out)
            with contextlib.ExitStack() as held:
                jobs: list[_Job] = []
                address, opened = source, None
                for one, size, said in wanted:  # all of them before anything is written
                    options = SplitOptions(_parse_ranks(ranks, size, said), resume, overwrite, threads)
                    if opened is None or address != source:  # a checkpoint has all of them, a folder of sets each
                        address, opened = open_part(source, one, revision, index=index, notify=output.warn)
                        held.enter_context(opened)
                    if one and together:
                        target = open_target(part_address(out, one), address, in_out=True)
                    else:
                        target = open_target(out, address)
                    cut = Cut(size, layout, pad, weights, quant_format, scheme, one, together)
                    prepared = prepare(opened, cut)
                    agree(team, _account(prepared, cut, target.address, options, dry_run))
                    if not dry_run:
                        check_target(prepared, target, options, place)
                    for line in prepared.checkpoint.warnings:
                        output.warn(line)
                    jobs.append(_Job(prepared, target, options))
                done: list[tuple[_Job, SplitResult | None]] = []
                for job in jobs:
                    result = None
                    if not dry_run:
                        plan = job.prepared.plan
                        check_set_digests(job.prepared.source, threads)
                        own = own_ranks(plan, job.options, place)
                        with output.progress("split", sum(plan.shards[rank].size for rank in own)) as tick:
                            result = write_shards(job.prepared, job.target, job.options, tick, team)
                    done.append((job, result))
                _report(output, done)


class _Job(NamedTuple):
    """A part that is to be cut."""

    prepared: "Prepared"
    target: "Target"
    options: "SplitOptions"


def _account(prepared: "Prepared", cut: "Cut", out: str, options: "SplitOptions", dry_run: bool) -> dict[str, str]:
    """What all processes of a team must have in common; threads may differ."""
    from blake3 import blake3

    from reshard import __version__
    from reshard.plan.manifest_builder import fingerprint

    identity = prepared.checkpoint.identity
    command = {**vars(cut), **vars(options), "dry_run": dry_run, "out": out}
    del command["workers"]
    return {
        "reshard": __version__,
        **{key: repr(value) for key, value in command.items()},
        "a source called": identity.name,
        "a source of files": blake3(repr(identity.files).encode()).hexdigest()[:_SHOWN_DIGEST],
        "a source of bytes": prepared.sample[:_SHOWN_DIGEST],
        "a set": fingerprint(prepared.checkpoint, prepared.plan, prepared.sample)[:_SHOWN_DIGEST],
    }


def _parse_ranks(text: str | None, tp: int, said: str) -> tuple[int, ...] | None:
    """Ranks such as `0-3,7`. said: the option that gives `tp`. Raises UsageError for anything else, or another rank."""
    from reshard.errors import UsageError

    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)  # MAX_TP_SIZE has five digits
        if match is None:
            raise UsageError(f"--ranks {text}: {part!r} is no rank and no range; write them as 0-3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= tp:
            raise UsageError(f"--ranks {text}: {part.strip()} is not within 0 to {tp - 1}, the ranks of {said}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def _report(output: Output, done: "list[tuple[_Job, SplitResult | None]]") -> None:
    """The closing tables, or the document; without results, what would be written."""
    documents = [_document(job, result) for job, result in done]
    document = documents[0] if len(documents) == 1 else {"parts": documents}
    output.document(document, lambda: [line for one in documents for line in _lines(one)])


def _document(job: _Job, result: "SplitResult | None") -> dict[str, Any]:
    from reshard.plan.manifest_builder import scheme_name

    prepared = job.prepared
    plan = prepared.plan
    entries = {shard.tp_rank: shard for shard in (*result.written, *result.kept)} if result else {}
    kept = {shard.tp_rank for shard in result.kept} if result else set()
    shown = [shard for shard in plan.shards if not result or shard.tp_rank in entries]
    whole = prepared.checkpoint.nbytes
    largest = max(shard.size for shard in plan.shards)
    return {
        "out": job.target.address,
        "dry_run": result is None,
        "complete": bool(result and result.complete),
        "missing_ranks": list(result.missing) if result else [],
        "part": plan.part,
        "scheme": scheme_name(prepared.checkpoint.layers),
        "tp_size": plan.tp_size,
        "layout": plan.layout,
        "size": {prepared.checkpoint.part.size: prepared.checkpoint.shared_size},
        "padded_size": plan.padding.padded if plan.padding else None,
        "layers": [layer.index for layer in prepared.checkpoint.layers],
        "unsplit_bytes": whole,
        "saved_bytes_per_device": whole - largest,
        "shards": [
            {
                "tp_rank": shard.tp_rank,
                "file": shard.file,
                "size": shard.size,
                "blake3": entries[shard.tp_rank].blake3 if shard.tp_rank in entries else None,
                "kept": shard.tp_rank in kept,
            }
            for shard in shown
        ],
    }


def _lines(document: dict[str, Any]) -> Iterator[str | Table]:
    from reshard.model.naming import MANIFEST, counted_layers
    from reshard.model.parts import PARTS

    yield Table(
        (">rank", "file", ">size", "blake3"),
        [
            [
                str(shard["tp_rank"]),
                shard["file"],
                size_text(shard["size"]),
                (shard["blake3"] or "not written")[:_SHOWN_DIGEST] + (" (kept)" if shard["kept"] else ""),
            ]
            for shard in document["shards"]
        ],
    )
    yield ""
    whole, saved = document["unsplit_bytes"], document["saved_bytes_per_device"]
    layers = counted_layers(PARTS[document["part"]], len(document["layers"]))
    yield (
        f"{document['scheme']}, {layers}: {size_text(whole)} unsplit; "
        f"each device holds {size_text(whole - saved)} and saves {size_text(max(0, saved))}"
    )
    if document["padded_size"]:
        ((name, size),) = document["size"].items()
        yield f"padded: {name} {size} to {document['padded_size']}"
    if document["dry_run"]:
        yield "dry run: nothing was written"
    elif document["complete"]:
        yield f"wrote {document['out']}/{MANIFEST}: the set is complete"
    else:
        lacking = ", ".join(map(str, document["missing_ranks"]))
        yield f"the set still lacks ranks {lacking}: write them, then run the same command with --resume"
