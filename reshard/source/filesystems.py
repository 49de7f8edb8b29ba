"""File systems that fsspec knows: which place an address names, and the package that is not there for it."""

from fsspec import get_filesystem_class
from fsspec.registry import known_implementations

from reshard.errors import MissingDependencyError
from reshard.safe_text import one_line


def missing_package(address: str, error: ImportError) -> MissingDependencyError:
    """Which package an address needs, of a chain of file systems the first that is no part of fsspec."""
    for link in address.split("::"):
        protocol = link.partition("://")[0]
        package = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
        if package and package != "fsspec":
            return MissingDependencyError(f"{protocol}://", package, one_line(error))
    module = getattr(error.__cause__ or error, "name", None)  # of a driver that is fsspec's own
    return MissingDependencyError(address, module or "fsspec", one_line(error))


def same_place(one: str, other: str) -> bool:
    """Whether two addresses are one place, however they are spelt: s3:// and s3a://, one slash more or less."""
    return _place(one) == _place(other)


def _place(address: str) -> object:
    """The file system, what of it the address names (such as a host), and the path there."""
    try:
        system = get_filesystem_class(address.partition("://")[0])
    except (ImportError, ValueError):  # refused, in its own words, when it is opened
        return address.rstrip("/")
    return system, system._get_kwargs_from_urls(address), str(system._strip_protocol(address)).strip("/")
