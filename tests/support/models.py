"""The models of `configs/`: which layers of each are dense, written by hand, and the frozen names of split tensors."""

import json

from tests.support.paths import CONFIGS, DATA

FROZEN: dict[str, dict[str, list[str]]] = json.loads((DATA / "split_tensors.json").read_text())
MODELS = sorted(path.stem for path in CONFIGS.glob("*.json"))

DENSE_LAYERS = {
    "deepseek-r1": [0, 1, 2],
    "deepseek-v2-lite": [0],
    "deepseek-v3": [0, 1, 2],
    "glm-4.5": [0, 1, 2],
    "glm-4.5v": [0],
    "kimi-k2": [0],
    "kimi-k2.5": [0],
    "llama-3.1-8b": [
        *(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        *(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31),
    ],
}
