"""File systems that fsspec knows: the package that one of them needs and that is not there."""

from fsspec.registry import known_implementations

from reshard.address import redacted
from reshard.errors import MissingDependencyError

_EXTRAS = {"s3fs": "reshard[s3]"}


def missing_package(address: str, error: ImportError) -> MissingDependencyError:
    """Which package an address needs, of a chain of file systems the first that is no part of fsspec."""
    for link in address.split("::"):
        protocol = link.partition("://")[0]
        package = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
        if package and package != "fsspec":
            wanted = _EXTRAS.get(package, package)
            return MissingDependencyError(
                f"{protocol}://: needs {package}, which cannot be imported ({redacted(error)}); pip install '{wanted}'"
            )
    return MissingDependencyError(f"{redacted(address)}: {redacted(error)}")
