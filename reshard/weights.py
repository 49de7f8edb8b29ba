"""Names of the files that hold a model's weights, and which of them each engine takes."""

from collections.abc import Collection

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS_ENDING = ".safetensors"
INDEX_ENDING = ".safetensors.index.json"


def engines(files: Collection[str]) -> str:
    """What the engines take of a folder with these files.

    transformers: modeling_utils._get_resolved_checkpoint_files. vLLM: DefaultModelLoader._prepare_weights and
    weight_utils.filter_duplicate_safetensors_files, which know an index by this one name.
    """
    named = f"what {INDEX} names"
    transformers = SINGLE if SINGLE in files else named if INDEX in files else "none of them"
    vllm = named if INDEX in files else f"every {WEIGHTS_ENDING} file"
    return f"transformers takes {transformers}, vLLM takes {vllm}"
