"""The project beside vllm-ascend, whose environments are made package by package: nobody's wishes are crossed."""

from importlib.metadata import version

from packaging.version import Version

from tests.support import beside

# vllm-ascend and its vLLM are for an older torch, and vllm-ascend 0.18 for an older numpy.
NOT_MET = {"torch", "numpy"}


def test_everyone_has_what_they_want() -> None:
    assert beside.unmet(leaving_out=NOT_MET) == []


def test_the_engines_client_reads_from_the_hub_or_is_told_to_be_too_old() -> None:
    """vLLM 0.18 wants transformers below 5, which wants huggingface_hub below 1.0."""
    installed = version("huggingface_hub")
    said = "HF_HUB_OFFLINE forbids to ask" if Version(installed) >= Version("1.31") else f"installed is {installed}; "
    assert said in beside.from_the_hub()
