"""What each linear is: what is said of it, as far as its tensors bear it out.

The account that engines read first is taken where the tensors fit it, and another that differs is named in a warning.
Where they do not fit it, nothing is cut unless `--scheme` says what they are. Without any account, tensors that fit one
scheme alone are taken for that, with a warning.
"""

from collections.abc import Collection, Iterable, Iterator
from functools import cached_property

from reshard.errors import LayersError, ReshardError, SchemeError
from reshard.model.naming import CONFIG, MANIFEST
from reshard.model.parts import DENSE_FFN, Part
from reshard.quantization.accounts import Account, Accounts, list_accounts
from reshard.quantization.formats import (
    as_kind,
    is_quantized_name,
    names_of_formats,
    needs_block,
    spec_of_scheme,
    tensors_text,
    variants_of,
)
from reshard.quantization.refusals import OPTION, contradiction, no_account, two_fit, unsaid, words
from reshard.schemes.match import (
    QuantSpec,
    Stored,
    check_kind,
    check_scheme,
    fitting_variant,
    is_plain,
    match_variant,
    scheme_of,
)
from reshard.schemes.table import BLOCK, FLOAT, SCHEMES, Variant, told_by_tensors
from reshard.tensors.dtypes import FLOATS


class Schemes:
    """Decides for one linear after the other. `warnings` are then of all of them.

    names: of all tensors of the checkpoint, which tell whether anything in it is quantized. part: what the linears are.
    """

    def __init__(self, accounts: Accounts, names: Collection[str] = (), part: Part = DENSE_FFN) -> None:
        if accounts.scheme is not None:
            check_scheme(accounts.scheme)
        self._given = accounts
        self._names = names
        self._part = part
        self._option_used = False
        self._lines: dict[str, dict[str, None]] = {}  # the modules of each warning, in their order

    @cached_property
    def _accounts(self) -> tuple[Account, ...]:
        """Not read before they are needed: a description of all experts takes long."""
        return list_accounts(self._given)

    def decide(self, module: str, found: Stored) -> tuple[Variant, tuple[int, int] | None]:
        """A linear's variant and scale block. found: its tensors by suffix.

        Raises SchemeError where what is said does not fit the tensors, or is not split; SourceError where it makes no
        sense; LayersError where a set's manifest does not name the linear.
        """
        spec, *others = self._said(module, found)
        if fitting_variant(spec, found) is not None:
            self._compare(module, found, spec, others)
        else:
            quantized = any(map(is_quantized_name, self._names))
            error = contradiction(module, found, [spec, *others], quantized)
            if error is not None:
                raise error
            check_kind(module, spec, tensors_text(found, shapes=False))
        variant = match_variant(module, spec, found)
        return variant, variant.block or spec.block

    def warnings(self) -> Iterable[str]:
        """What was taken though something speaks against it. Raises SchemeError where `--scheme` was of no linear."""
        if self._given.scheme is not None and not self._option_used and self._part.quantized:
            raise SchemeError(
                f"--scheme {self._given.scheme}: no {self._part.unit} is {self._given.scheme}: each is a plain float "
                "weight; leave the option out"
            )
        for line, modules in self._lines.items():
            more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
            yield f"{next(iter(modules))}{more}: {line}"

    def _said(self, module: str, found: Stored) -> Iterator[QuantSpec]:
        """What is said of a linear, that which counts first: the manifest, --scheme, the account that engines read."""
        scheme = self._given.scheme
        if self._given.recorded is not None:
            said = self._given.recorded.get(module)
            if said is None:
                raise LayersError(
                    f"{MANIFEST}: its layers lack that of {module}, whose tensors the shards hold; copy the set again"
                )
            # Its files may have been told, or found, to be that; what else they fit is said beside them.
            others = [] if told_by_tensors(said) else list(self._read(self._accounts, module))
            blocks = [other.block for other in others if other.block and scheme_of(other.kind) == said]
            yield spec_of_scheme(said, blocks or [BLOCK], MANIFEST, found)
            yield from (other for other in others if scheme_of(other.kind) != said)
        elif scheme is not None and (not is_plain(found) or SCHEMES[scheme].is_float):
            self._option_used = True
            others = list(self._read(self._accounts, module))
            blocks = [spec.block for spec in others if spec.block and scheme_of(spec.kind) == scheme]
            yield spec_of_scheme(scheme, blocks or [BLOCK], OPTION, found)
            yield from others
        elif self._accounts:
            spec = self._accounts[0].declare(module)
            if spec is None:
                raise unsaid(module, self._accounts[0].file, found)
            yield spec
            yield from self._read(self._accounts[1:], module)
        else:
            yield self._by_tensors(module, found)

    def _compare(self, module: str, found: Stored, taken: QuantSpec, others: Iterable[QuantSpec]) -> None:
        """Warns of what else is said. Raises SchemeError where the tensors fit that, too."""
        for other in others:
            said, own = words(other, taken)
            if said == own:
                continue
            if fitting_variant(other, found) is not None:
                raise two_fit(module, found, taken, other)
            engines = "; an engine goes by the file" if taken.said_by == OPTION else ""
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

    def _read(self, accounts: Iterable[Account], module: str) -> Iterator[QuantSpec]:
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
