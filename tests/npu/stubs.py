"""Empty shared libraries in CANN's names, so that torch_npu can be imported on a machine without CANN.

    python tests/npu/stubs.py FOLDER          then LD_LIBRARY_PATH=FOLDER TORCH_DEVICE_BACKEND_AUTOLOAD=0 python ...

Every function that torch_npu's libraries want of CANN is there and does nothing: no kernel can run with them. What can
run is what torch_npu does in Python and on the meta device (the operators' shape functions), and operators that get an
implementation of their own (`tests.npu.stand_ins`).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # torch_npu cannot be loaded before these are there

import torch

LIBRARIES = (
    "libhccl.so",
    "libascendcl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libascend_protobuf.so",  # this one and the next for torchair, which vllm-ascend 0.18.0 imports
    "libfmk_parser.so",
)


def main(folder: Path) -> None:
    """Write the libraries."""
    for program in ("gcc", "nm"):
        if shutil.which(program) is None:
            raise SystemExit(f"error: {program} is not installed; it comes with gcc and binutils")
    package = Path(torch.__file__).parent.parent / "torch_npu"
    own = [*package.glob("lib/*.so"), *package.glob("_C*.so"), *package.glob("dynamo/torchair/core/*.so")]
    if not own:
        raise SystemExit(f"error: no torch_npu beside torch in {package.parent}")
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    there = [Path(path) for path in loaded if ".so" in path or path.endswith("/python" + sys.version[:4])]
    there += [*(Path(torch.__file__).parent / "lib").glob("*.so*")]
    defined = _symbols("--defined-only", [*own, *there, Path(sys.executable).resolve()])
    wanted = sorted(_symbols("--undefined-only", own) - defined)
    folder.mkdir(parents=True, exist_ok=True)
    for name in LIBRARIES:
        body = "".join(f"long {symbol}(void) {{ return 0; }}\n" for symbol in wanted) if name == LIBRARIES[0] else ""
        command = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", "-x", "c", "-o", str(folder / name), "-"]
        subprocess.run(command, input=body, text=True, check=True)
    print(f"{folder}: {len(LIBRARIES)} libraries, {len(wanted)} functions")  # noqa: T201


def _symbols(which: str, libraries: list[Path]) -> set[str]:
    """Names without versions. Weak ones that nothing defines may stay so."""
    found: set[str] = set()
    for library in libraries:
        done = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            *_, kind, name = line.split()
            if kind not in "wv" or which == "--defined-only":
                found.add(name.split("@")[0])
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
