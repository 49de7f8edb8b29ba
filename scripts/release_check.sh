#!/usr/bin/env bash
# Builds the distributions into dist/ and uses the wheel as a stranger would: in a fresh environment, outside the repository.
set -euo pipefail
python=${1:-python3}
repository=$PWD
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

rm -rf dist
"$python" -m venv "$place/build"
"$place/build/bin/python" -m pip --disable-pip-version-check --quiet install build
"$place/build/bin/python" -m build --outdir dist . > "$place/log" || { cat "$place/log"; exit 1; }

git ls-files | LC_ALL=C sort > "$place/tracked"
tar --list --file dist/*.tar.gz | sed 's,^[^/]*/,,' | grep -vx PKG-INFO | LC_ALL=C sort > "$place/packed"
diff "$place/tracked" "$place/packed" || { echo "the sdist is not what git tracks"; exit 1; }

"$python" -m venv "$place/use"
wheel=$(echo "$repository"/dist/*.whl)
"$place/use/bin/python" -m pip --disable-pip-version-check --quiet install "$wheel"
cd "$place"
cp "$repository/configs/deepseek-r1.json" .
reshard() { "$place/use/bin/reshard" "$@" --quiet; }
reshard synth deepseek-r1.json model --scale 1/16
reshard split model tp4 --tp 4
reshard verify tp4 --source model
reshard merge tp4 merged
"$place/use/bin/reshard" estimate --config deepseek-r1.json --tp 1,8 > /dev/null
"$place/use/bin/python" - <<'PYTHON'
import importlib.metadata
import pathlib

import reshard

assert pathlib.Path(reshard.__file__).is_relative_to(pathlib.Path.cwd() / "use"), reshard.__file__
assert reshard.verify("tp4", "model").ok
files = importlib.metadata.files("reshard")
tops = {file.parts[0] for file in files if file.suffix == ".py"}
assert tops == {"reshard", "reshard_runtime"}, tops
assert any(str(file) == "reshard/py.typed" for file in files)
PYTHON
"$place/use/bin/reshard" --version
echo "$(basename "$wheel"): installed, split, verified, merged"
