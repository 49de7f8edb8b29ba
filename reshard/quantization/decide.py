"""What each linear is: what is said of it, as far as its tensors bear it out.

The account that engines read first is taken where the tensors fit it, and another that differs is named in a warning.
Where they do not fit it, nothing is cut unless `--scheme` says what they are. Without any account, tensors that fit one
scheme alone are taken for that, with a warning.
"""

from collections.abc import Collection, Iterable, Mapping

from reshard.errors import LayersError, ReshardError, SchemeError
from reshard.model.naming import CONFIG, MANIFEST
from reshard.quantization.accounts import Account, Accounts, Recorded, list_accounts
from reshard.quantization.formats import (
    as_kind,
    is_quantized_name,
    names_of_formats,
    needs_block,
    specs_of,
    tensors_text,
    variants_of,
)
from reshard.quantization.refusals import contradiction, no_account, not_of_option, two_fit, unsaid, words
from reshard.schemes import (
    BLOCK,
    FLOAT,
    SCHEMES,
    QuantSpec,
    Stored,
    Variant,
    check_kind,
    check_scheme,
    fitting_variant,
    is_plain,
    match_variant,
    scheme_of,
)
from reshard.tensors.dtypes import FLOATS

_OPTION = "--scheme"


class Schemes:
    """Decides for one linear after the other. `warnings` are then of all of them.

    names: of all tensors of the checkpoint, which tell whether anything in it is quantized.
    """

    def __init__(self, accounts: Accounts, names: Collection[str] = ()) -> None:
        if accounts.scheme is not None:
            check_scheme(accounts.scheme)
        self._given = accounts
        self._accounts = list_accounts(accounts) if accounts.recorded is None else ()
        self._names = names
        self._option_used = False
        self._lines: dict[str, dict[str, None]] = {}  # the modules of each warning, in their order

    def decide(self, module: str, found: Stored) -> tuple[Variant, tuple[int, int] | None]:
        """A linear's variant and scale block. found: its tensors by suffix.

        Raises SchemeError where what is said does not fit the tensors, or is not split; SourceError where it makes no
        sense; LayersError where a set's manifest does not name the linear.
        """
        scheme = self._given.scheme
        if self._given.recorded is not None:
            spec = _recorded(module, self._given.recorded, found)
        elif scheme is not None and (not is_plain(found) or SCHEMES[scheme].is_float):
            self._option_used = True
            spec = self._by_option(scheme, module, found)
        elif self._accounts:
            spec = self._by_accounts(module, found)
        else:
            spec = self._by_tensors(module, found)
        variant = match_variant(module, spec, found)
        return variant, variant.block or spec.block

    def warnings(self) -> Iterable[str]:
        """What was taken though something speaks against it. Raises SchemeError where `--scheme` was of no linear."""
        if self._given.scheme is not None and not self._option_used:
            raise SchemeError(
                f"--scheme {self._given.scheme}: no dense layer is {self._given.scheme}: each is a plain float weight; "
                "leave the option out"
            )
        for line, modules in self._lines.items():
            more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
            yield f"{next(iter(modules))}{more}: {line}"

    def _by_accounts(self, module: str, found: Stored) -> QuantSpec:
        first, *others = self._accounts
        spec = first.declare(module)
        if spec is None:
            raise unsaid(module, first.file, found)
        if fitting_variant(spec, found) is None:
            quantized = any(map(is_quantized_name, self._names))
            error = contradiction(module, found, [spec, *self._said(others, module)], quantized)
            if error is not None:
                raise error
            check_kind(module, spec, tensors_text(found, shapes=False))
            return spec  # match_variant says which tensor
        self._compare(module, found, spec, self._said(others, module))
        return spec

    def _by_option(self, scheme: str, module: str, found: Stored) -> QuantSpec:
        """`--scheme`, which an account that the tensors fit must not contradict."""
        said = list(self._said(self._accounts, module))
        blocks = [spec.block for spec in said if spec.block and scheme_of(spec.kind) == scheme]
        spec = next(specs_of(found, scheme, blocks or [BLOCK], _OPTION), None)
        if spec is None:
            raise not_of_option(module, scheme, found)
        self._compare(module, found, spec, said)
        return spec

    def _compare(self, module: str, found: Stored, taken: QuantSpec, others: Iterable[QuantSpec]) -> None:
        """Warns of what else is said. Raises SchemeError where the tensors fit that, too."""
        for other in others:
            said, own = words(other, taken)
            if said == own:
                continue
            if fitting_variant(other, found) is not None:
                raise two_fit(module, found, taken, other)
            engines = "; an engine goes by the file" if taken.said_by == _OPTION else ""
            self._warn(
                module,
                f"{other.said_by} says {said}, {taken.said_by} says {own}, which the tensors are: taken as {own}"
                f"{engines}",
            )

    def _by_tensors(self, module: str, found: Stored) -> QuantSpec:
        """Without an account. A block's size is in no header, so scales in blocks never tell a scheme alone."""
        if found.keys() >= {"weight"} and found["weight"].dtype in FLOATS:
            return QuantSpec(FLOAT, None, f"no quantization_config in {CONFIG}")
        variants = variants_of(found)
        if len(names_of_formats(found)) != 1 or not variants or needs_block(variants[0].kind):
            raise no_account(module, found, has_config=self._given.config is not None)
        scheme = variants[0].scheme
        self._warn(
            module,
            f"nothing beside the files says what the weights are; their tensors ({tensors_text(found, shapes=False)}) "
            f"fit {scheme} alone: taken as {scheme}, which --scheme {scheme} says, too",
        )
        return as_kind(variants[0], said_by="the tensors alone")

    def _said(self, accounts: Iterable[Account], module: str) -> Iterable[QuantSpec]:
        """What the accounts say that can be read; one that engines do not read first must not stop a cut."""
        for account in accounts:
            try:
                spec = account.declare(module)
            except ReshardError as error:
                self._warn(module, f"not read: {error}")
                continue
            if spec is not None:
                yield spec

    def _warn(self, module: str, line: str) -> None:
        self._lines.setdefault(line, {})[module] = None


def _recorded(module: str, recorded: Mapping[str, Recorded], found: Stored) -> QuantSpec:
    """What a set was cut as: whatever its config.json says, the manifest is the account of what is in it."""
    said = recorded.get(module)
    if said is None:
        raise LayersError(
            f"{MANIFEST}: its layers lack that of {module}, whose tensors the shards hold; copy the set again"
        )
    spec = next(specs_of(found, said.scheme, [said.block or BLOCK], MANIFEST), None)
    if spec is None:
        raise SchemeError(
            f"{MANIFEST}: {module} is {said.scheme}, its tensors ({tensors_text(found)}) are not; copy the set again"
        )
    return spec
