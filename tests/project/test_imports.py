"""What is imported when: start-up cost, torch's absence, the one direction between the packages."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import reshard
import reshard_runtime
from reshard.plan.pipeline import Cut
from tests.support.builders import Spec, build
from tests.support.running import reshard_process, split

PACKAGE = Path(reshard.__file__).parent
HEAVY = ("torch", "numpy", "pydantic", "blake3", "safetensors", "huggingface_hub")
VOCABULARY = (
    "manifest",
    "errors",
    "safe_text",
    "fit",
    "limits",
    "strict_json",
    "model.activation",
    "model.naming",
    "model.parts",
    "plan.recompute",
    "schemes",
    "schemes.match",
    "schemes.table",
    "tensors.tiles",
    "regular",
    "sealed",
    "source.recognise",
    "source.weights",
    "tensors.dtypes",
    "tensors.header",
)
SERVING_RULES = ("checks.serving_option", "checks.ascend_option", "checks.set_size", "checks.setup")
RULES = ("model", "quantization", "schemes", "checkpoint", "plan.plan", "plan.manifest_builder", "convert")
"""They read nothing."""
NO_TORCH = "import sys; sys.modules['torch'] = None"  # `import torch` raises ImportError


def test_help_imports_nothing_heavy() -> None:
    show = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    done = reshard_process("--help", before=show)
    assert done.code == 0
    loaded = {name.split(".")[0] for name in done.err.split()}
    assert "typer" in loaded
    assert not loaded & set(HEAVY)


def test_cutting_needs_no_torch(tmp_path: Path) -> None:
    """On a host that only cuts there is none."""
    build(tmp_path / "model", Spec("fp8_block"))
    model, shards, out = tmp_path / "model", tmp_path / "shards", tmp_path / "out"
    for arguments in (
        ("split", model, shards, "--tp", 2),
        ("verify", shards, "--source", model),
        ("merge", shards, out),
        ("inspect", shards),
    ):
        done = reshard_process(*arguments, before=NO_TORCH)
        assert done.code == 0, done.err


def test_converting_without_torch_says_how_to_get_it(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("fp8_block"))
    done = reshard_process(
        "split", tmp_path / "model", tmp_path / "out", "--tp", 2, "--weights", "bf16", before=NO_TORCH
    )
    assert done.code == 1
    assert done.err.endswith("pip install torch\n")
    assert not (tmp_path / "out").exists()


def test_splitting_imports_no_torch_even_where_it_is(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    show = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    done = reshard_process("split", tmp_path / "model", tmp_path / "out", "--tp", 2, "--quiet", before=show)
    assert done.code == 0
    assert done.err.strip() == "False"


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def _modules(package: str = "reshard") -> dict[str, Path]:
    folder = Path(importlib.import_module(package).__file__ or "").parent
    paths = folder.rglob("*.py")
    return {".".join((package, *path.relative_to(folder).with_suffix("").parts)): path for path in paths}


def test_there_is_no_import_cycle() -> None:
    """Of both packages together: `reshard check` asks the runtime, which reads the manifest by `reshard`."""
    modules = _modules("reshard") | _modules("reshard_runtime")
    graph = {
        name: {m for i in _imports(path) for m in (i, f"{i}.__init__") if m in modules}
        for name, path in modules.items()
    }
    # `import reshard` names its library for type checkers, and imports it when it is asked for.
    graph.get("reshard.__init__", set()).difference_update({"reshard.api", "reshard.manifest"})
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_two_modules_import_torch() -> None:
    importing = {name for name, path in _modules().items() if "torch" in {i.split(".")[0] for i in _imports(path)}}
    assert importing == {"reshard.convert.compute", "reshard.writer.team"}


def test_the_runtime_takes_only_the_vocabulary() -> None:
    """How files are opened, named and recognised among it.

    And the engine's hook the option's rules, which the command line's checks say in the same words; the demo all that
    cuts and verifies, and programs the command line's boundary.
    """
    for path in (PACKAGE.parent / "runtime").rglob("*.py"):
        if path.name == "demo.py":
            continue
        allowed = {f"reshard.{name}" for name in VOCABULARY}
        if path.name in ("measure.py", "processes.py"):
            allowed |= {"reshard.cli.options", "reshard.cli.output", "reshard.cli.signals"}
        if "vllm" in path.parts:
            allowed |= {f"reshard.{name}" for name in SERVING_RULES}
        assert {name for name in _imports(path) if name.split(".")[0] == "reshard"} <= allowed, path


def test_the_runtime_imports_no_engine_and_no_other_device() -> None:
    import subprocess

    code = "import sys, reshard_runtime; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    loaded = {name.split(".")[0] for name in out}
    assert "torch" in loaded
    assert not loaded & {"vllm", "transformers", "torch_npu", "typer", "rich", "huggingface_hub"}


@pytest.mark.parametrize("other", ["runtime.py", "runtime/__init__.py"])
def test_a_module_called_runtime_beside_it_takes_nothing_from_it(tmp_path: Path, other: str) -> None:
    """What the wheel installs, and what the engine's entry point names, has a name of its own."""
    import subprocess

    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("raise RuntimeError('the working directory has a module called runtime')")
    code = """
from importlib.metadata import entry_points
(plugin,) = entry_points(group="vllm.general_plugins", name="denseffn_shards")
import reshard.checks.device, reshard_runtime.demo
print(plugin.load().__module__, *reshard_runtime.__all__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["reshard_runtime.serving.vllm", *reshard_runtime.__all__]
    assert {"DenseFFN", "load_shard"} <= set(reshard_runtime.__all__)


@pytest.mark.parametrize("name", [*VOCABULARY, *SERVING_RULES])
def test_what_the_runtime_takes_is_light(name: str) -> None:
    """No source or writer comes with it."""
    import subprocess

    code = f"import sys, reshard.{name}; print(*[m for m in sys.modules if m.startswith('reshard')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    allowed = {f"reshard.{one}" for one in (name, *VOCABULARY, *(SERVING_RULES if name in SERVING_RULES else ()))}
    found = {name for name in out if not name.startswith(tuple(f"reshard.{rule}" for rule in RULES))}
    assert found <= {"reshard", *allowed, *(one.rpartition(".")[0] for one in allowed)}


def test_split_is_importable_as_a_library(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    assert split(tmp_path / "model", tmp_path / "out", Cut(2)).complete
