"""Typed references: where a step's input comes from. To the type checker a reference is the value itself.

`withdraw.out.reference` has the type of that field, so a wrong name or type fails in mypy and pyright; the name is
checked again where it is written, and name and type once more when the step is declared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from types import UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Generic,
    Literal,
    NamedTuple,
    NoReturn,
    ParamSpec,
    TypeVar,
    TypeVarTuple,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel, RootModel
from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python

from saga.errors import DefinitionError, PayloadInvalid
from saga.payloads import codec

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

SAGA_INPUT: Final = ""
"""Source name of the saga's own input; every other source is the name of a step."""


class Owner(NamedTuple):
    """The activity that a reference was taken from."""

    queue: str
    activity: str


class Ref:
    """A path into the saga's input or a step's output. Attribute access lengthens the path; nothing else is allowed."""

    __slots__ = ("_named", "_owner", "_path", "_source", "_type")

    def __init__(
        self, source: str, path: tuple[str, ...], type_: Any, owner: Owner | None = None, named: bool = True
    ) -> None:
        self._source = source
        self._path = path
        self._type = type_
        self._owner = owner
        self._named = named

    def __getattr__(self, name: str) -> Ref:
        if name.startswith("__"):
            raise AttributeError(name)
        known = _fields(self._type)
        if name not in known:
            has = f"it has: {', '.join(known)}" if known else "it has none that a reference can reach"
            raise DefinitionError(f"{self!r} is a {_name(self._type)} without a field {name!r}; {has}.")
        return Ref(self._source, (*self._path, name), known[name].type, self._owner, self._named)

    def __repr__(self) -> str:
        return describe(self)


def _no_value_yet(ref: Ref, *_: object) -> NoReturn:
    raise DefinitionError(
        f"{ref!r} stands for a value that is not there before the saga runs, so nothing can be computed from it here. "
        "Pass it on as it is, or compute in an activity."
    )


# Without these, `f"{withdraw.out.reference}"` or `withdraw.out.amount == 0` would quietly become a constant.
_OPERATIONS: Final = (
    *("str", "format", "bool", "len", "iter", "call", "int", "float", "index", "contains", "getitem"),
    *("eq", "ne", "lt", "le", "gt", "ge", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv"),
    *("floordiv", "rfloordiv", "mod", "rmod", "neg", "abs", "and", "or"),
)
for _operation in _OPERATIONS:
    setattr(Ref, f"__{_operation}__", _no_value_yet)


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A value written in the declaration, kept as plain JSON."""

    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class Make:
    """A value of `type` built from references and constants."""

    type: Any
    fields: Mapping[str, Expression]


Expression = Ref | Make | Constant


def describe(ref: Ref) -> str:
    """Return a reference as people write it."""
    source, path = ref_parts(ref)
    head = "input" if source == SAGA_INPUT else f"{source}.out"
    if _get(ref, "_named") and (owner := ref_owner(ref)) is not None and owner.activity != source:
        head = f"{owner.activity}.at({source!r}).out"
    return ".".join((head, *path))


def _get(ref: Ref, slot: str) -> Any:
    return object.__getattribute__(ref, slot)


def ref_parts(ref: Ref) -> tuple[str, tuple[str, ...]]:
    """Return the source and the path of a reference."""
    return _get(ref, "_source"), _get(ref, "_path")


def ref_type(ref: Ref) -> Any:
    """Return the declared type of what a reference points at."""
    return _get(ref, "_type")


def ref_owner(ref: Ref) -> Owner | None:
    """Return the activity that the reference was taken from; None for the saga's input."""
    owner: Owner | None = _get(ref, "_owner")
    return owner


def make(type_: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Build a step's input from references: `make(Deposit, account=..., receipt=withdraw.out.reference)`.

    Keyword arguments only; the type checker sees an ordinary call of `type_`. A value that is no reference is kept as
    a constant. Raises DefinitionError.
    """
    if args:
        raise DefinitionError(f"make({_name(type_)}): name the fields as keywords.")
    return cast("T", Make(type_, {name: as_expression(value, what=name) for name, value in kwargs.items()}))


class Arguments(Generic[*Ts]):
    """The payload of a handler that takes several arguments. Made by `arguments`."""

    __slots__ = ("values",)

    def __init__(self, values: tuple[*Ts]) -> None:
        self.values: tuple[Any, ...] = values


def arguments(*values: *Ts) -> Arguments[*Ts]:
    """Give a handler with several payload arguments each of them, in its order: references or constants.

    `.step(pay, arguments(saga.input.account, withdraw.out.amount))` for `async def pay(account: str, amount: int)`.
    """
    return Arguments(values)


def as_expression(value: Any, *, what: str) -> Expression:
    """Return `value` if it is a reference or made of them, else as a constant. Raises DefinitionError."""
    if isinstance(value, Ref | Make | Constant):
        return value
    try:
        return Constant(to_jsonable_python(value, by_alias=False))
    except PydanticSerializationError:
        raise DefinitionError(
            f"{what}: a {type(value).__name__} is neither a reference nor a JSON value. "
            "References stand alone or as a field of make(...), not inside other values."
        ) from None


class _Field(NamedTuple):
    type: Any
    constrained: Any
    """The type together with its constraints, to check a constant."""
    required: bool


def _fields(type_: Any) -> Mapping[str, _Field]:
    if _is_a(type_, RootModel):
        return {}
    if _is_a(type_, BaseModel):
        return {
            name: _Field(
                field.annotation,
                Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation,
                field.is_required(),
            )
            for name, field in type_.model_fields.items()
        }
    if is_dataclass(cast("object", type_)):
        plain, full = get_type_hints(type_), get_type_hints(type_, include_extras=True)
        return {
            field.name: _Field(
                plain[field.name],
                full[field.name],
                field.default is MISSING and field.default_factory is MISSING,
            )
            for field in fields(type_)
            if field.init
        }
    return {}


def _is_a(type_: Any, base: type[Any]) -> bool:
    return isinstance(type_, type) and issubclass(type_, base)


def resolve(expression: Expression, step_of: Callable[[Ref], str]) -> Expression:
    """Return the expression with each reference naming its step."""
    if isinstance(expression, Ref):
        return Ref(step_of(expression), ref_parts(expression)[1], ref_type(expression), ref_owner(expression))
    if isinstance(expression, Make):
        return Make(
            expression.type, {name: resolve(each, step_of) for name, each in expression.fields.items()}
        )
    return expression


def check(expression: Expression, wanted: Any, types: Mapping[str, Any], *, what: str) -> None:
    """Raise DefinitionError unless `expression` gives a `wanted`, from sources that are known at this point.

    `types` maps each usable source to its type. A type fits itself and a union that holds it; a subclass does not fit
    its base, because its further fields would be refused where the value is read.
    """
    if isinstance(expression, Ref):
        source, path = ref_parts(expression)
        if source not in types:
            steps = ", ".join(name for name in types if name != SAGA_INPUT)
            raise DefinitionError(
                f"{what}: {describe(expression)} is not there at this point; "
                f"what is there: {f'the input and the outputs of {steps}' if steps else 'the input only'}."
            )
        _same(_walk(types[source], path, what=what), wanted, what=f"{what}: {describe(expression)}")
    elif isinstance(expression, Make):
        _same(expression.type, wanted, what=what)
        _check_fields(expression, types, what=what)
    else:
        _check_constant(expression, wanted, what=what)


def _check_fields(made: Make, types: Mapping[str, Any], *, what: str) -> None:
    known = _fields(made.type)
    for name, value in made.fields.items():
        if name not in known:
            raise DefinitionError(f"{what}: {_name(made.type)} has no field {name!r}.")
        inner = known[name].constrained if isinstance(value, Constant) else known[name].type
        check(value, inner, types, what=f"{what}, field {name!r}")
    missing = sorted(name for name, field in known.items() if field.required and name not in made.fields)
    if missing:
        raise DefinitionError(f"{what}: {_name(made.type)} needs {', '.join(missing)}.")


def _check_constant(constant: Constant, wanted: Any, *, what: str) -> None:
    try:
        codec(wanted, what=what).decode(to_json(constant.value), what="constant")
    except PayloadInvalid as error:
        raise DefinitionError(f"{what}: {error.text}") from None


def _walk(type_: Any, path: tuple[str, ...], *, what: str) -> Any:
    for name in path:
        known = _fields(type_)
        if name not in known:
            raise DefinitionError(f"{what}: {_name(type_)} has no field {name!r}.")
        type_ = known[name].type
    return type_


def _same(given: Any, wanted: Any, *, what: str) -> None:
    if not _fits(given, wanted):
        raise DefinitionError(f"{what} is a {_name(given)}, wanted is a {_name(wanted)}.")


def _fits(given: Any, wanted: Any) -> bool:
    given, wanted = _plain(given), _plain(wanted)
    if given == wanted or wanted in (Any, object):
        return True
    if get_origin(given) in (Union, UnionType):
        return all(_fits(member, wanted) for member in get_args(given))
    if get_origin(wanted) in (Union, UnionType):
        return any(_fits(given, member) for member in get_args(wanted))
    if get_origin(given) is Literal:
        values = get_args(given)
        allowed = get_args(wanted) if get_origin(wanted) is Literal else None
        return all(value in allowed if allowed is not None else type(value) is wanted for value in values)
    if wanted is str:
        return _is_a(given, str) and _is_a(given, Enum)
    return wanted is float and given is int


def _plain(type_: Any) -> Any:
    """Return the type below Annotated and NewType, neither of which JSON knows."""
    while True:
        if get_origin(type_) is Annotated:
            type_ = get_args(type_)[0]
        elif hasattr(type_, "__supertype__"):
            type_ = type_.__supertype__
        else:
            return type_


def _name(type_: Any) -> str:
    return type_.__name__ if isinstance(type_, type) and not get_args(type_) else str(type_)


def sources(expression: Expression) -> frozenset[str]:
    """Return the names of the steps whose output the expression reads, and SAGA_INPUT for the input."""
    if isinstance(expression, Ref):
        return frozenset({ref_parts(expression)[0]})
    if isinstance(expression, Make):
        return frozenset[str]().union(*(sources(value) for value in expression.fields.values()))
    return frozenset()


def evaluate(expression: Expression, values: Mapping[str, Any]) -> Any:
    """Return the plain JSON value of an expression; `values` maps each source to its parsed JSON."""
    if isinstance(expression, Ref):
        source, path = ref_parts(expression)
        value = values[source]
        for name in path:
            value = value[name]
        return value
    if isinstance(expression, Make):
        return {name: evaluate(value, values) for name, value in expression.fields.items()}
    return expression.value


def to_data(expression: Expression) -> Any:
    """Return the expression as JSON for the definition's fingerprint."""
    if isinstance(expression, Ref):
        source, path = ref_parts(expression)
        return {"ref": [source, *path]}
    if isinstance(expression, Make):
        fields_ = {name: to_data(value) for name, value in expression.fields.items()}
        return {"make": _name(expression.type), "fields": fields_}
    return {"value": expression.value}
