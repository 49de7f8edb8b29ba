"""What the documents say is so: transcripts, tables, options, the version."""

import re
import shlex
from pathlib import Path

import pytest

from reshard import __version__
from reshard.cli.main import app
from reshard.model.activation import FORMULAS
from reshard.model.config.act import ALIASES, HARMLESS, HARMLESS_ENDS
from reshard.model.config.families import FAMILIES, Family
from reshard.model.config.rules import RULES
from reshard.model.config.wrapper import WRAPPERS
from reshard.schemes.table import VARIANTS, TensorRule
from tests.support.paths import ROOT
from tests.support.running import reshard
from tests.support.transcripts import check_output, commands_of

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]


def transcript() -> list[tuple[str, str]]:
    """The (command, output) pairs of the pages' console blocks, README's first: the others go on with its demo."""
    blocks = re.findall(r"```console\n(.*?)```", "".join(page.read_text() for page in PAGES), re.DOTALL)
    return [pair for block in blocks for pair in commands_of(block)]


def scheme_rows() -> list[str]:
    """The table of schemes, out of reshard.schemes."""
    head = ["| scheme | `synth --scheme` | said by | tensors of a linear |", "| --- | --- | --- | --- |"]
    return head + [
        f"| `{v.scheme}` | `{v.name}` | `{v.kind}` | {', '.join(f'`{rule.suffix}`' for rule in v.tensors)} |"
        for v in VARIANTS
    ]


def cut_rows() -> list[str]:
    """The table of cuts, out of reshard.schemes."""
    rows = {}
    for rule in (rule for variant in VARIANTS for rule in variant.tensors):
        types = ", ".join(sorted(set().union(*(r.dtypes for v in VARIANTS for r in v.tensors if _same(r, rule)))))
        cuts = " | ".join(f"blocks of {c.value}" if rule.in_blocks else c.value for c in (rule.column, rule.row))
        rows[rule.suffix, rule.shape] = f"| `{rule.suffix}` | {types} {rule.shape.value} | {cuts} |"
    return ["| tensor | type and shape | gate, up | down |", "| --- | --- | --- | --- |", *rows.values()]


def _same(one: TensorRule, other: TensorRule) -> bool:
    return (one.suffix, one.shape) == (other.suffix, other.shape)


def _dense_by(family: Family) -> str:
    """Where a family's dense layers are, in a table's words."""
    if not family.rules:
        return "every layer"
    keys = dict.fromkeys(key for rule in family.rules for key in RULES[rule].keys)
    said = ", ".join(f"`{key}`" + (f" ({family.defaults[key]})" if key in family.defaults else "") for key in keys)
    return said or "`mlp_layer_types`"


def _computes(family: Family) -> str:
    if family.fixed is not None:
        return f"{family.fixed}: not computed"
    limit = family.limit or family.limits
    name = f"`{family.act}` ({family.activation})" if family.act else str(family.activation)
    renamed = "".join(f", {one} taken for {other}" for one, other in family.renamed.items())
    return (
        name + renamed + (f", `{limit}`" if limit else "") + (f" {family.clamp}: not computed" if family.clamp else "")
    )


def family_rows() -> list[str]:
    """The table of families with dense layers: those that are alike in one row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for model_type, family in FAMILIES.items():
        if model_type not in WHOLE:
            rows.setdefault((_dense_by(family), _computes(family), family.source), []).append(f"`{model_type}`")
    head = [
        "| `model_type` | dense layers by (default) | activation by (default) | read in |",
        "| --- | --- | --- | --- |",
    ]
    return head + [f"| {', '.join(names)} | {by} | {act} | {source} |" for (by, act, source), names in rows.items()]


WHOLE = {
    name: f"dense layers named {family.names}" if family.names else "experts in every layer"
    for name, family in FAMILIES.items()
    if family.names
    or (
        "every layer" in family.rules
        and name not in {"hunyuan_v1_moe", "mellum", "minimax_m3_vl_text", "muse_spark_text"}
    )
}


def whole_rows() -> list[str]:
    """The table of families of which nothing is cut."""
    rows: dict[str, list[str]] = {}
    for model_type, why in WHOLE.items():
        rows.setdefault(why, []).append(f"`{model_type}`")
    return [
        "| `model_type` | why |",
        "| --- | --- |",
        *(f"| {', '.join(names)} | {why} |" for why, names in rows.items()),
    ]


def activation_rows() -> list[str]:
    """The table of activations that are computed."""
    rows = []
    for name, formula in FORMULAS.items():
        names = ", ".join(f"`{alias}`" for alias, function in ALIASES.items() if function == name)
        rows.append(f"| {name} | {formula} | {names} |")
    return ["| activation | act(x) | in config.json |", "| --- | --- | --- |", *rows]


def section(page: str, name: str) -> list[str]:
    """The lines between a pair of marks of a page of docs/."""
    text = (ROOT / "docs" / page).read_text()
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip().splitlines()


def test_the_transcript_is_what_the_commands_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    pairs = transcript()
    assert len(pairs) >= 9
    for command, output in pairs:
        program, *arguments = shlex.split(command)
        assert program == "reshard"
        check_output(reshard(*arguments), output)


def test_the_steps_to_a_server_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the server, on a small model of R1's shape."""
    monkeypatch.chdir(tmp_path)
    done = reshard(
        "synth", ROOT / "configs" / "deepseek-r1.json", "MODEL", "--scheme", "w8a8_dynamic", "--scale", "1/16"
    )
    assert done.code == 0, done.err
    block = README.split("<!-- steps -->")[1].split("<!-- /steps -->")[0]
    lines = re.sub(r"\\\n", "", block).splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("reshard ")]
    assert [command[0] for command in commands] == ["estimate", "check", "split", "verify"]
    for command in commands:
        done = reshard(*command)
        assert done.code == 0, done.out + done.err


def test_the_tables_are_the_split_table() -> None:
    assert section("formats.md", "schemes") == scheme_rows()
    assert section("formats.md", "cuts") == cut_rows()


def test_every_command_is_described() -> None:
    for command in COMMANDS:
        assert f"`reshard {command}" in README


def test_options_that_are_named_exist() -> None:
    helps = "".join(reshard(command, "--help").out for command in COMMANDS) + reshard("--help").out
    others = {"serving.md", "check.md"}  # with options of engines
    pages = [page for page in PAGES if page.name not in others] + [ROOT / "CHANGELOG.md"]
    text = "".join(page.read_text() for page in pages)
    text = re.sub(r"```.*?```|torchrun's own `.*?`", "", text, flags=re.DOTALL)
    text = "".join(re.findall(r"`(?:reshard |--)[^`]*`", text))
    for option in sorted(set(re.findall(r"--[a-z][a-z-]+", text))):
        assert option in helps, option


def test_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make ([a-z-]+)\b", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for path in re.findall(r"\]\(((?!http|#)[^)#]+)", page.read_text()):
        assert (page.parent / path).exists(), path


def test_nobody_is_told_to_install_this_from_an_index() -> None:
    """Until it is in one."""
    code = [path for folder in ("reshard", "runtime") for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in (*PAGES, *code):
        assert not re.search(r"pip install (-U )?['\"]?reshard\b", path.read_text()), path


def test_files_that_contributors_are_sent_to_exist() -> None:
    named = re.findall(
        r"`((?:reshard|runtime|tests|configs|docs|\.ci)/[^` ]*)`", (ROOT / "CONTRIBUTING.md").read_text()
    )
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert re.findall(r"^\| \[(.+)\]\(\1\)", index, re.MULTILINE)
    assert set(re.findall(r"^\| \[(.+)\]", index, re.MULTILINE)) == {
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"
    }
    assert "](docs/README.md)" in README


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180


def test_the_version_stands_in_the_changelog_and_once_in_the_code() -> None:
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    holders = [p for p in (ROOT / "reshard").rglob("*.py") if f'"{__version__}"' in p.read_text()]
    assert [path.name for path in holders] == ["__init__.py"]
    assert __version__ not in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_headings_that_are_linked_exist(page: Path) -> None:
    for path, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        linked = (page.parent / path if path else page).read_text()
        headings = {
            re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-")
            for h in re.findall(r"^#+ (.+)$", linked, re.MULTILINE)
        }
        assert anchor in headings, anchor


def test_the_serving_page_has_every_key_of_the_loader() -> None:
    from dataclasses import fields

    from reshard_runtime.serving.vllm.serving_options import Options

    page = (ROOT / "docs" / "serving.md").read_text()
    table = page.split("| in `--model-loader-extra-config` | |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [field.name for field in fields(Options)]


def test_the_page_on_models_has_every_family_key_and_activation() -> None:
    wrappers = [f"| `{'.'.join(path)}` | {who} |" for path, who in WRAPPERS.items()]
    harmless = [
        f"| {how} | `{pattern.replace('|', '`, `')}` | {why} |"
        for how, table in (("begins", HARMLESS), ("ends", HARMLESS_ENDS))
        for pattern, why in table.items()
    ]
    assert section("models.md", "families") == family_rows()
    assert section("models.md", "whole") == whole_rows()
    assert section("models.md", "wrappers") == ["| key | in |", "| --- | --- |", *wrappers]
    assert section("models.md", "activations") == activation_rows()
    assert section("models.md", "harmless") == ["| the key | with | it is |", "| --- | --- | --- |", *harmless]


def test_the_page_on_checks_has_every_check_rule_and_option() -> None:
    from reshard.checks.report import CHECKS
    from reshard.checks.serving_option import RULES

    page = (ROOT / "docs" / "check.md").read_text()
    for name, rows in (("checks", CHECKS), ("rules", RULES)):
        table = "\n".join(section("check.md", name))
        assert re.findall(r"^\| `([\w-]+)` \| (.+) \|$", table, re.MULTILINE) == list(rows.items())
    said = reshard("check", "--help").out + reshard("split", "--help").out + reshard("verify", "--help").out
    said += reshard("synth", "--help").out
    for option in set(re.findall(r"--[a-z][a-z-]+", page)):
        assert option in said, option


def test_the_page_on_checks_has_inputs_hooks_and_arguments_that_there_are() -> None:
    import inspect

    import yaml

    from reshard import check

    page = (ROOT / "docs" / "check.md").read_text()
    action, hooks = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    assert set(action["jobs"]["shapes"]["steps"][1]["with"]) <= set(inputs)
    there = {hook["id"] for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
    assert {hook["id"] for hook in hooks["repos"][0]["hooks"]} == there
    (python,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    taken = {"strict", *inspect.signature(check).parameters}
    assert set(re.findall(r"\b([a-z_]+)=", python)) <= taken


def test_the_estimate_page_has_the_model_s_figures() -> None:
    from reshard.estimate.profile import GIB
    from tests.support.estimating import BY_HAND, estimated, r1

    one, eight, sixteen = estimated(r1("w8a8_dynamic"), (1, 8, 16), BY_HAND).sizes
    runs = (one.gathered_as_bf16, eight.gathered_as_bf16, eight.runs, sixteen.gathered_as_bf16)
    milliseconds = [1e3 * run.step_seconds for run in runs]
    hand = {"unsplit": "1.157", "tp 8": "0.339", "tp 8, int8 before the gather": "0.313", "tp 16, over nodes": "1.97"}
    wanted = [
        f"| {what} | {value:.3f} | {by_hand} | {value / float(by_hand) - 1:+.1%} |".replace("%", " %")
        for (what, by_hand), value in zip(hand.items(), milliseconds, strict=True)
    ]
    saved = eight.saved_bytes / GIB
    wanted.append(f"| GiB saved at tp 8 | {saved:.3f} | 0.969 | {saved / 0.969 - 1:+.1%} |".replace("%", " %"))
    assert section("estimate.md", "hand")[2:] == wanted


def test_the_estimate_page_has_the_parts_beside_what_is_published() -> None:
    from reshard.estimate.profile import GIB

    page = (ROOT / "docs" / "estimate.md").read_text()
    parts = {"o_proj": ("5.8", "+1.5"), "lm_head": ("1.51", "-1.2"), "denseffn": ("0.9", "-1.0")}
    parts["embedding"] = ("1.51", "-1.0")
    arguments = [argument for part in parts for argument in ("--part", part)]
    config = ("--config", ROOT / "configs" / "deepseek-r1.json", "--scheme", "w8a8_dynamic", "--tp", 8)
    document = reshard("estimate", *config, *arguments, "--format", "json").document
    more, wanted = {}, []
    for one in document["schemes"]:
        (size,), part = one["sizes"], one["part"]
        more[part] = 1e3 * (
            (size["gathered_as_int8"] or size["gathered_as_bf16"])["step_seconds"] - one["unsplit_seconds"]
        )
        saved, time = parts[part]
        wanted.append(f"| {part} | {saved} GB | {size['saved_bytes'] / GIB:.3f} | {time} ms | {more[part]:+.2f} |")
    assert section("estimate.md", "published")[2:] == wanted
    assert f"for both the model says {-more['embedding'] - more['lm_head']:.2f} ms less" in page
    assert f"the model says {-more['denseffn']:.2f}." in page


def test_the_estimate_page_has_what_fixed_rows_cost_by_the_command() -> None:
    page = (ROOT / "docs" / "estimate.md").read_text()
    config = ROOT / "configs" / "deepseek-r1.json"
    arguments = ("estimate", "--config", config, "--tp", 8, "--scheme", "w8a8_dynamic")

    def fixed(rows: int) -> list[str]:
        out = reshard(*arguments, "--max-tokens", rows).out.partition("fixed rows: ")[2]
        (line,) = [line for line in out.splitlines() if line.startswith("w8a8_dynamic  ")]
        return line.split()[2:]

    wanted: list[str] = []
    for rows in (24, 32, 64, 128, 256, 512):
        computed, unneeded, gathered, exact_g, scattered, exact_s, layer, exact_l, step, exact_t = fixed(rows)
        if not wanted:
            wanted.append(f"| as many as tokens | 192 | 0 | {exact_g} | {exact_s} | {exact_l} | {exact_t} |")
        wanted.append(f"| {rows} | {computed} | {unneeded} | {gathered} | {scattered} | {layer} | {step} |")
    assert section("estimate.md", "fixed")[2:] == wanted

    (unsplit, limit) = re.findall(
        r"takes ([0-9.]+) ms unsplit, so that by the model fixed rows gain time up to N = (\d+);", page
    )[0]
    within, beyond = (reshard(*arguments, "--max-tokens", int(limit) + more).out for more in (0, 1))
    assert f"ms a step, {unsplit} ms unsplit" in within
    assert "unsplit takes less" in beyond
    assert "unsplit takes less" not in within
