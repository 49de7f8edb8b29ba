"""Device profiles: what comes with the program, what is refused, what a machine's measurement becomes."""

import re
import tomllib
from pathlib import Path

import pytest

from reshard.errors import ProfileError, UsageError
from reshard.estimate.measure import profile_of, to_toml
from reshard.estimate.profile import load_profile, names, parse_profile
from tests.support.paths import ROOT

FOLDER = ROOT / "configs" / "hardware"

# BF16 TFLOP/s, INT8 TOP/s, and GB/s and us of each level, as the public profiles have them but for 5.5 us.
A2 = [("node", 8, "mesh", 196, 5.5), ("cluster", None, "switch", 25, 1.5)]
A3 = [("pair", 2, "switch", 224, 0.2), ("node", 16, "switch", 196, 0.5), ("cluster", None, "switch", 196, 5.5)]
KNOWN = {
    "atlas-a2-376t": (353.9, 752, A2),
    "atlas-a2-313t": (294.9, 626, A2),
    "atlas-a2-280t": (245.8, 560, A2),
    "atlas-a3-752t": (353.9, 752, A3),
    "atlas-a3-560t": (245.8, 560, A3),
}


@pytest.fixture
def text() -> str:
    return (FOLDER / "atlas-a2-376t.toml").read_text()


def test_the_profiles_that_come_with_the_program() -> None:
    assert set(names()) == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_their_values(name: str) -> None:
    profile, (bf16, int8, network) = load_profile(name), KNOWN[name]
    assert (profile.compute.bf16_tflops, profile.compute.int8_tops) == (bf16, int8)
    assert (profile.memory.capacity_gib, profile.memory.bandwidth_gib_s) == (64, 1.6 * 1024)
    found = [(key, n.devices, n.topology, n.bandwidth_gb_s, n.latency_us) for key, n in profile.network.items()]
    assert found == network
    efficiency = profile.efficiency
    assert (efficiency.compute, efficiency.memory_bf16, efficiency.memory_int8) == (0.7, 0.6, 0.6)
    assert efficiency.communication == 0.7
    assert (profile.static.matmul_us, profile.static.vector_us, profile.static.collective_us) == (5, 2, 10)
    assert profile.alignment is not None
    assert (profile.alignment.bf16_tile, profile.alignment.int8_tile) == ([16, 16], [16, 32])
    assert "estimate" in profile.source["efficiency"]
    assert "estimate" in profile.source["static"]


def test_the_wheel_has_them_where_they_are_looked_for() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"]["configs/hardware"] == "reshard/hardware"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("int8_tops", "int8_topps", "compute.int8_tops: missing"),
        ("int8_tops = 752", "int8_tops = 752\nfp4_tops = 3", "compute.fp4_tops: no key of a device profile"),
        ("[static]", "[statics]", "static: missing"),
        (
            "int8_tops = 752",
            "int8_tops = 0",
            "compute.int8_tops: Input should be greater than or equal to 0.000000001 (got '0')",
        ),
        ("int8_tops = 752", 'int8_tops = "752"', "compute.int8_tops: Input should be a valid number (got '752')"),
        ("int8_tops = 752", "int8_tops = nan", "compute.int8_tops: Input should be "),
        ("compute = 0.7", "compute = 1.5", "efficiency.compute: Input should be less than or equal to 1"),
        ('topology = "mesh"', 'topology = "ring"', "network.node.topology: Input should be 'mesh' or 'switch'"),
        ('devices = 8\ntopology = "mesh"', 'topology = "mesh"', "network.node: a mesh has 2 devices or more"),
        ("[network.cluster]", "[network.cluster]\ndevices = 8", "network: each table after the first has more devices"),
        ("[16, 32]", "[16]", "alignment.int8_tile: List should have at least 2 items"),
        ('alignment = "', 'align = "', "source: expected one line each for alignment, compute, efficiency"),
        ("int8_tops = 752", "int8_tops =", "not valid TOML: Invalid value (at line 8"),
        ("int8_tops = 752", "int8_tops = 1e308", "compute.int8_tops: Input should be less than or equal to 1000000000"),
        ("int8_tops = 752", "int8_tops = []", "compute.int8_tops: Input should be a valid number (got '[]')"),
        ("int8_tops = 752", f"int8_tops = {'9' * 5000}", "not valid TOML: Exceeds the limit (4300 digits)"),
        ("int8_tops = 752", f"int8_tops = {'[' * 5000}", "not valid TOML: maximum recursion depth exceeded"),
        ("int8_tops = 752", f"int8_tops = 752\n{'a.' * 20_000}a = 1", "has 4"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, text: str, old: str, new: str, message: str) -> None:
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new, 1))
    with (
        pytest.raises(ProfileError, match="^mine.toml: .*" + re.escape(message))
        if "TOML" not in message and "has" not in message
        else (pytest.raises(ProfileError, match=re.escape(message)))
    ):
        load_profile(str(tmp_path / "mine.toml"))


def test_profiles_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ProfileError, match="device atlas-a4: no such profile; there are atlas-a2-280t, atlas-a2-313t, "
    ):
        load_profile("atlas-a4")
    with pytest.raises(ProfileError, match=r"x\.toml: cannot be read: No such file or directory"):
        load_profile(str(tmp_path / "x.toml"))
    with pytest.raises(ProfileError, match=r"this machine, .* reshard estimate --measure > local\.toml"):
        load_profile("local")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(ProfileError, match="not valid TOML"):
        load_profile(str(tmp_path / "bytes.toml"))


def _leaves(table: dict[str, object], above: str = "") -> list[str]:
    found = []
    for key, value in table.items():
        found += _leaves(value, f"{above}{key}.") if isinstance(value, dict) else [f"{above}{key}"]
    return found


def test_every_value_can_be_overridden(text: str) -> None:
    plain = load_profile("atlas-a2-376t").model_dump(exclude_none=True)
    others = {"topology": "switch", "overlap": "false", "devices": "7", "name": "mine", "last_dim_limit": "9"}
    for key in _leaves(tomllib.loads(text)):
        if key.startswith("source."):
            continue
        value = others.get(key.rpartition(".")[2], "[4, 8]" if "tile" in key else "0.25")
        changed = load_profile("atlas-a2-376t", [f"{key}={value}"]).model_dump(exclude_none=True)
        differing = [k for k in _leaves(plain) if _at(plain, k) != _at(changed, k)]
        if key != "network.cluster.topology":  # which is a switch already
            assert differing == [key]


def _at(table: dict[str, object], key: str) -> object:
    value: object = table
    for part in key.split("."):
        assert isinstance(value, dict)
        value = value[part]
    return value


def test_an_override_may_bound_the_network() -> None:
    assert load_profile("atlas-a2-376t", ["network.cluster.devices=32"]).network["cluster"].devices == 32


@pytest.mark.parametrize(
    "override",
    ["compute", "compute.fp4=1", "compute=1", "x.y=1", "network.node.speed=2", "=1", "compute.int8_tops.x=1"],
)
def test_an_override_of_nothing_is_wrong_usage(override: str) -> None:
    with pytest.raises(UsageError, match=f"^--set {re.escape(override)}: .*it has name, compute.bf16_tflops, "):
        load_profile("atlas-a2-376t", [override])


@pytest.mark.parametrize(
    "override",
    ["compute.int8_tops=fast", "compute.int8_tops=-1", "efficiency.compute=2", f"compute.int8_tops={'[' * 5000}"],
)
def test_an_override_that_makes_no_sense_is_refused(override: str) -> None:
    with pytest.raises(ProfileError, match=f"^--set: {override.split('=')[0]}: "):
        load_profile("atlas-a2-376t", [override])


# --- measured ---

RANK = {
    "memory_bytes_s": 16 * 2.0**30,
    "bf16_weight_bytes_s": 8 * 2.0**30,
    "int8_weight_bytes_s": 4 * 2.0**30,
    "bf16_operations_s": 2e11,
    "int8_operations_s": 4e11,
    "matmul_s": 3e-6,
    "vector_s": 7e-6,
    "gather_s": 5e-5,
    "link_bytes_s": 1e9,
}


def test_a_measurement_becomes_a_profile() -> None:
    profile = profile_of([RANK, RANK])
    assert (profile.compute.bf16_tflops, profile.compute.int8_tops, profile.compute.overlap) == (0.2, 0.4, False)
    assert (profile.memory.bandwidth_gib_s, profile.efficiency.memory_bf16) == (16, 0.5)
    assert (profile.efficiency.memory_int8, profile.efficiency.compute) == (0.25, 1)
    assert (profile.static.matmul_us, profile.static.vector_us, profile.static.collective_us) == (3, 7, 0)
    (level,) = profile.network.values()
    assert (level.bandwidth_gb_s, level.latency_us, level.devices) == (1, 50, None)


def test_of_two_ranks_the_slower_counts() -> None:
    slow = {key: value / 2 if key.endswith(("bytes_s", "operations_s")) else value * 2 for key, value in RANK.items()}
    for found in ([RANK, slow], [slow, RANK]):
        profile = profile_of(found)
        assert (profile.compute.bf16_tflops, profile.memory.bandwidth_gib_s) == (0.1, 8)
        assert profile.static.vector_us == 14
        assert (profile.network["host"].bandwidth_gb_s, profile.network["host"].latency_us) == (0.5, 100)


def test_weights_that_a_product_takes_in_faster_than_a_sum_does() -> None:
    profile = profile_of([{**RANK, "bf16_weight_bytes_s": 32 * 2.0**30}])
    assert (profile.memory.bandwidth_gib_s, profile.efficiency.memory_bf16) == (32, 1)


def test_a_profile_is_written_as_it_is_read() -> None:
    for name in names():
        profile = load_profile(name)
        assert parse_profile(tomllib.loads(to_toml(profile)), "again") == profile
