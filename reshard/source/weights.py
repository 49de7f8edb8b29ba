"""Names of the files that hold a model's weights, and which of them each engine takes."""

from collections.abc import Collection, Iterable

from reshard.model.parts import PARTS

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS_ENDING = ".safetensors"
INDEX_ENDING = ".safetensors.index.json"
TRANSFORMERS_KEY = "transformers_weights"
"""config.json's key for the file that transformers takes before all others; no other engine reads it."""
SNAPSHOTS = "snapshots"
"""Where a Hugging Face cache has a folder for each commit."""


def engines(files: Collection[str], told: str | None = None) -> str:
    """What the engines take of a folder with these files. told: config.json's TRANSFORMERS_KEY.

    transformers: modeling_utils._get_resolved_checkpoint_files. vLLM: DefaultModelLoader._prepare_weights and
    weight_utils.filter_duplicate_safetensors_files, which know an index by this one name.
    """
    vllm = _taken(INDEX) if INDEX in files else f"every {WEIGHTS_ENDING} file"
    first = told or next((name for name in (SINGLE, INDEX) if name in files), None)
    transformers = _taken(first) if first is not None else "none of them"
    if transformers == vllm:
        return f"transformers and vLLM both take {vllm}"
    return f"transformers takes {transformers}, vLLM takes {vllm}"


def _taken(file: str) -> str:
    return f"what {file} names" if file.endswith(INDEX_ENDING) else file


def named_as_sets(folders: Iterable[str]) -> list[str]:
    """Those of some folders that may be sets of several parts."""
    return sorted(PARTS.keys() & set(folders))


def sets_within(files: Collection[str], others: Collection[str]) -> list[str]:
    """The shard sets in a folder that holds no weights itself: one for each part, under the part's name.

    others: what is no file there. One that is empty, or no folder, counts, too: it was to be a set.
    """
    if any(name.endswith(WEIGHTS_ENDING) for name in files):
        return []
    return [key for key in PARTS if key in others]
