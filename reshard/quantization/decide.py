"""What each linear is: what is said of it, as far as its tensors bear it out.

The account that engines read first is taken where the tensors fit it, and another that differs is named in a warning.
Where they do not fit it, nothing is cut unless `--scheme` says what they are. Without any account, tensors that fit one
scheme alone are taken for that, with a warning.
"""

from collections.abc import Collection, Iterable, Mapping

from reshard.errors import LayersError, ReshardError, SchemeError
from reshard.model.naming import CONFIG, MANIFEST
from reshard.quantization.accounts import Account, Accounts, Recorded, list_accounts
from reshard.quantization.explain import contradiction, no_account, not_told, two_fit, unsaid, words
from reshard.quantization.formats import (
    as_kind,
    is_quantized_name,
    names_of_formats,
    tensors_text,
    types_text,
    variants_of,
)
from reshard.schemes import (
    BLOCK,
    FLOAT,
    VARIANTS,
    QuantSpec,
    StoredTensor,
    Variant,
    check_scheme,
    fitting_variant,
    is_plain,
    match_variant,
    scheme_of,
)
from reshard.tensors.dtypes import FLOATS

_PLAIN = "bf16"
_Tensors = Mapping[str, StoredTensor]


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
        self._told = False
        self._lines: dict[str, list[str]] = {}

    def decide(self, module: str, found: _Tensors) -> tuple[Variant, tuple[int, int] | None]:
        """A linear's variant and scale block. found: its tensors by suffix.

        Raises SchemeError where what is said does not fit the tensors, or is not split; SourceError where it makes no
        sense; LayersError where a set's manifest does not name the linear.
        """
        if self._given.recorded is not None:
            declared = _recorded(module, self._given.recorded, found)
        elif self._given.scheme is not None and (not is_plain(found) or self._given.scheme == _PLAIN):
            declared = self._by_scheme(self._given.scheme, module, found)
        elif self._accounts:
            declared = self._by_accounts(module, found)
        else:
            declared = self._by_tensors(module, found)
        return match_variant(module, declared, found), declared.block

    def warnings(self) -> Iterable[str]:
        """What was taken though something speaks against it. Raises SchemeError where `--scheme` was of no linear."""
        if self._given.scheme is not None and not self._told:
            raise SchemeError(
                f"--scheme {self._given.scheme}: no dense layer is {self._given.scheme}: each is a plain float weight; "
                "leave the option out"
            )
        for line, modules in self._lines.items():
            more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
            yield f"{modules[0]}{more}: {line}"

    def _by_accounts(self, module: str, found: _Tensors) -> QuantSpec:
        first, *others = self._accounts
        declared = first.declare(module)
        if declared is None:
            raise unsaid(module, first.file, found)
        if fitting_variant(declared, found) is None:
            quantized = any(map(is_quantized_name, self._names))
            raise contradiction(module, found, [declared, *self._said(others, module)], quantized)
        for other in self._said(others, module):
            if not _differ(other, declared):
                continue
            if fitting_variant(other, found) is not None:
                raise two_fit(module, found, declared, other)
            second, taken = words(other, declared)
            self._warn(
                module,
                f"{other.said_by} says {second}, {declared.said_by} says {taken}, which the tensors are: taken as "
                f"{taken}",
            )
        return declared

    def _by_scheme(self, scheme: str, module: str, found: _Tensors) -> QuantSpec:
        """`--scheme`, which an account that the tensors fit must not contradict."""
        said = list(self._said(self._accounts, module))
        blocks = [declared.block for declared in said if declared.block and scheme_of(declared.kind) == scheme]
        variants = [variant for variant in VARIANTS if variant.scheme == scheme]
        wanted = [as_kind(v, block, f"--scheme {scheme}") for block in blocks or [BLOCK] for v in variants]
        declared = next((one for one in wanted if fitting_variant(one, found) is not None), None)
        if declared is None:
            raise not_told(module, scheme, found)
        self._told = True
        for other in said:
            if not _differ(other, declared):
                continue
            if fitting_variant(other, found) is not None:
                if scheme_of(other.kind) == scheme:
                    raise two_fit(module, found, declared, other)
                raise SchemeError(
                    f"{module}: {other.said_by} says {scheme_of(other.kind)}, which its tensors fit, and --scheme says "
                    f"{scheme}; leave the option out, or mend {other.said_by.partition(' ')[0]}"
                )
            second, taken = words(other, declared)
            self._warn(
                module,
                f"{other.said_by} says {second}, which the tensors do not fit: taken as {taken}, by --scheme; an "
                "engine goes by the file",
            )
        return declared

    def _by_tensors(self, module: str, found: _Tensors) -> QuantSpec:
        """Without an account. A block's size is in no header, so scales in blocks never tell a scheme alone."""
        if found.keys() >= {"weight"} and found["weight"].dtype in FLOATS:
            return QuantSpec(FLOAT, None, f"no quantization_config in {CONFIG}")
        variants = variants_of(found)
        if len(names_of_formats(found)) != 1 or not variants or any(r.in_blocks for r in variants[0].tensors):
            raise no_account(module, found, self._given.config is not None)
        scheme = variants[0].scheme
        self._warn(
            module,
            f"nothing beside the files says what the weights are; their tensors ({types_text(found)}) fit {scheme} "
            f"alone: taken as {scheme}, which --scheme {scheme} says, too",
        )
        return as_kind(variants[0], said_by="the tensors alone")

    def _said(self, accounts: Iterable[Account], module: str) -> Iterable[QuantSpec]:
        """What the accounts say that can be read; one that engines do not read first must not stop a cut."""
        for account in accounts:
            try:
                declared = account.declare(module)
            except ReshardError as error:
                self._warn(module, f"not read: {error}")
                continue
            if declared is not None:
                yield declared

    def _warn(self, module: str, line: str) -> None:
        modules = self._lines.setdefault(line, [])
        if module not in modules:
            modules.append(module)


def _differ(one: QuantSpec, other: QuantSpec) -> bool:
    return (scheme_of(one.kind), one.block) != (scheme_of(other.kind), other.block)


def _recorded(module: str, recorded: Mapping[str, Recorded], found: _Tensors) -> QuantSpec:
    """What a set was cut as: whatever its config.json says, the manifest is the account of what is in it."""
    said = recorded.get(module)
    if said is None:
        raise LayersError(
            f"{MANIFEST}: its layers lack that of {module}, whose tensors the shards hold; copy the set again"
        )
    kinds = (as_kind(v, said.block or BLOCK, MANIFEST) for v in VARIANTS if v.scheme == said.scheme)
    declared = next((one for one in kinds if fitting_variant(one, found) is not None), None)
    if declared is None:
        raise SchemeError(
            f"{MANIFEST}: {module} is {said.scheme}, its tensors ({tensors_text(found)}) are not; copy the set again"
        )
    return declared
