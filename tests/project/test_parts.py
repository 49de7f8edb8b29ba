"""Parts are data: only what multiplies or serves the FFN itself names its roles, and what reads its sizes."""

import ast
import io
import re
import tokenize
from pathlib import Path

import reshard
from reshard.model.parts import DENSE_FFN, Parallel

ROOT = Path(reshard.__file__).parent.parent
ROLE = re.compile(r"gate_proj|up_proj|down_proj|gate_up|\b(?:GATE|UP|DOWN|GATE_UP)\b|intermediate_size")
NAMING = {
    "reshard/model/parts.py",
    # The sizes as config.json and the manifest have them.
    "reshard/manifest.py",
    "reshard/model/config/families.py",
    "reshard/model/config/keys.py",
    "reshard/model/config/read.py",
    "reshard/synth/config.py",
    "reshard/synth/model.py",
    # What multiplies.
    "reshard/estimate/sizes.py",
    "reshard/estimate/step.py",
    "reshard/verification/layer.py",
    "runtime/reshard_runtime/partial.py",
    "runtime/reshard_runtime/shard.py",
    # What engines and models call them.
    "runtime/reshard_runtime/serving/decoder.py",
    "runtime/reshard_runtime/serving/vllm/loader.py",
    "runtime/reshard_runtime/serving/vllm/model_layers.py",
    "runtime/reshard_runtime/serving/vllm/split_mlp.py",
}


def names_a_role(source: str) -> bool:
    """In an identifier or a string that is not a docstring."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    in_strings = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    return any(
        ROLE.search(token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.NAME or (token.type in in_strings and token.start[0] not in docs)
    )


def test_the_files_that_name_a_role() -> None:
    files = (path for folder in ("reshard", "runtime") for path in (ROOT / folder).rglob("*.py"))
    assert {path.relative_to(ROOT).as_posix() for path in files if names_a_role(path.read_text())} == NAMING
    assert len(NAMING) <= 16


def test_what_counts_as_naming_a_role() -> None:
    assert names_a_role("x = 'mlp.up_proj'")
    assert names_a_role("f(GATE)")
    assert names_a_role("model.padded_intermediate_size")
    assert not names_a_role('"""Of gate_proj."""\nx = UPPER  # down_proj')


def test_the_dense_ffn() -> None:
    """The table once more, by hand."""

    class Sizes:
        hidden_size, intermediate_size = 7, 12

    assert [(m.name, str(m), m.parallel) for m in DENSE_FFN.laid_out("fused")] == [
        ("gate_up_proj", "gate_proj and up_proj", Parallel.COLUMN),
        ("down_proj", "down_proj", Parallel.ROW),
    ]
    shapes = {m.name: DENSE_FFN.weight_shape(m, Sizes()) for m in DENSE_FFN.laid_out("separate")}
    assert shapes == {"gate_proj": (12, 7), "up_proj": (12, 7), "down_proj": (7, 12)}
    shares = {m.name: DENSE_FFN.weight_shape(m, Sizes(), 3) for m in DENSE_FFN.modules}
    assert shares == {"gate_up_proj": (6, 7), "down_proj": (7, 3)}
    assert [DENSE_FFN.stack(name) for name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "q_proj")] == [
        "gate_up_proj", "gate_up_proj", None, None, None,
    ]  # fmt: skip
    assert [DENSE_FFN.stacked(name) for name in ("gate_up_proj", "down_proj", "q_proj")] == [
        ("gate_proj", "up_proj"), (), (),
    ]  # fmt: skip
