"""Payload types: one cached pydantic adapter per declared type, strict in, JSON bytes out, within the size limit.

Values come from `decode` only, never from Python objects, because strict mode means different things there (PYD-3).
On the wire and in rows a field bears its own name; aliases belong to the user's other interfaces.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import UnionType
from typing import (
    Any,
    Final,
    Generic,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from pydantic import (
    BaseModel,
    ConfigDict,
    JsonValue,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic_core import SchemaValidator, core_schema, from_json, to_json

from saga.errors import DefinitionError, PayloadInvalid, PayloadTooLarge
from saga.messages import BODY_BYTES_MAX, field_paths
from saga.outcomes import Result

T = TypeVar("T")
WARNING_BYTES: Final = 64 * 1024
log: Final[logging.Logger] = logging.getLogger("saga.payloads")


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """One payload type with its adapter, built once at registration (PYD-8)."""

    type: Any
    adapter: TypeAdapter[T]
    validator: SchemaValidator
    names: frozenset[str]
    """Names of all declared fields, nested ones included: what a message to people may say of a payload."""

    def encode(self, value: T, *, what: str = "payload") -> bytes:
        """Return `value` as JSON bytes.

        Raises PayloadInvalid if the value is not of the declared type, PayloadTooLarge above 256 KiB with the
        path of the largest field; logs a warning above 64 KiB.
        """
        try:
            raw = self.adapter.dump_json(value, warnings="error", by_alias=False)
        except ValueError:
            raise PayloadInvalid(f"The {what} is not a {self.name}.") from None
        if value is None:
            self.decode(raw, what=what)  # None is serialised whatever the type, without a warning
        if len(raw) > WARNING_BYTES:
            check_size(raw, what=what)
        return raw

    def decode(self, raw: bytes, *, what: str = "payload", unknown: Literal["forbid"] | None = "forbid") -> T:
        """Return the value in `raw`.

        Raises PayloadInvalid with the field path, never with the value: for any other type (nothing is converted), an
        unknown field, NaN or infinity, and for a decimal that is written as a float, which has lost digits already.
        `unknown=None` leaves it to the type itself what becomes of unknown fields.
        """
        if len(raw) > BODY_BYTES_MAX:
            raise PayloadInvalid(f"The {what} has {len(raw)} bytes, the limit is {BODY_BYTES_MAX}.")
        try:
            value: T = self.validator.validate_json(
                raw, strict=True, extra=unknown, by_alias=False, by_name=True
            )
        except ValidationError as error:
            raise PayloadInvalid(
                f"The {what} is not a {self.name}: {field_paths(error, self.names)}"
            ) from None
        return value

    @property
    def name(self) -> str:
        """Name of the type, for messages to people."""
        return getattr(self.type, "__name__", str(self.type))

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the type; part of a definition's fingerprint."""
        return self.adapter.json_schema(mode="serialization", by_alias=False)


def check_size(raw: bytes, *, what: str) -> None:
    """Raise PayloadTooLarge above the limit; log a warning above 64 KiB."""
    if len(raw) > BODY_BYTES_MAX:
        raise PayloadTooLarge(
            f"The {what} has {len(raw)} bytes, the limit is {BODY_BYTES_MAX}; "
            f"its largest field is {_largest_field(raw)}. Store it elsewhere and pass a reference."
        )
    if len(raw) > WARNING_BYTES:
        log.warning("%s of %d bytes; the limit is %d", what, len(raw), BODY_BYTES_MAX)


def _largest_field(raw: bytes) -> str:
    value: Any = from_json(raw)
    path: list[str] = []
    while isinstance(value, dict | list) and value:
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        sizes = [(len(to_json(item)), key) for key, item in items]
        size, key = max(sizes, key=lambda pair: pair[0])
        if path and size < len(to_json(value)) / 2:
            break
        path.append(str(key))
        value = dict(items)[key]
    return ".".join(path) or "(the whole value)"


_codecs: dict[Any, Codec[Any]] = {}


@overload
def codec(type_: type[T], *, what: str) -> Codec[T]: ...


@overload
def codec(type_: Any, *, what: str) -> Codec[Any]: ...


def codec(type_: Any, *, what: str) -> Codec[Any]:
    """Return the codec of a declared type.

    Raises DefinitionError if pydantic cannot describe it, or if what it writes is not what it reads (PYD-5).
    """
    try:
        known = _codecs.get(type_)
    except TypeError:  # an unhashable annotation
        known = None
    if known is not None:
        return known
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(type_)
        written = _fields(adapter.json_schema(mode="serialization", by_alias=False))
        one_way = written ^ _fields(adapter.json_schema(mode="validation", by_alias=False))
        made: Codec[Any] = Codec(type_, adapter, _validator(adapter), frozenset(written))
    except (PydanticUserError, ValueError, TypeError, NameError) as error:
        raise DefinitionError(
            f"{what}: {type_!r} cannot be a payload ({type(error).__name__}). "
            "Use a pydantic model, a dataclass or a plain JSON type."
        ) from None
    if one_way:
        raise DefinitionError(
            f"{what}: {made.name} writes and reads different fields ({', '.join(sorted(one_way))}); "
            "a payload has no computed or excluded fields."
        )
    with suppress(TypeError):
        _codecs[type_] = made
    return made


def _validator(adapter: TypeAdapter[Any]) -> Any:
    """Return the adapter's validator, with one that refuses floats in the place of each decimal's (PYD-2)."""
    exact = _without_floats(adapter.core_schema)
    if exact is adapter.core_schema:
        return adapter.validator
    # without it each model within would bring the validator that its class has already
    return SchemaValidator(exact, _use_prebuilt=False)


def _without_floats(schema: Any) -> Any:
    """Return a core schema whose decimals take no JSON float; the same object if there is none in it."""
    if isinstance(schema, list):
        items = [_without_floats(each) for each in schema]
        return items if any(new is not old for new, old in zip(items, schema, strict=True)) else schema
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "decimal":
        # decided by a discriminator, which looks at the value and leaves it JSON: a strict decimal takes no Python text
        return core_schema.tagged_union_schema(
            {"decimal": schema},
            lambda value: None if isinstance(value, float) else "decimal",
            custom_error_type="decimal_float",
            custom_error_message="A decimal is written as a text or an integer",
        )
    parts = {key: _without_floats(each) for key, each in schema.items()}
    return parts if any(new is not schema[key] for key, new in parts.items()) else schema


def _fields(schema: JsonValue) -> set[str]:
    """Return the names of all fields anywhere in a JSON Schema."""
    if isinstance(schema, list):
        return set[str]().union(*map(_fields, schema))
    if not isinstance(schema, dict):
        return set()
    own = schema.get("properties")
    return (set(own) if isinstance(own, dict) else set[str]()).union(*map(_fields, schema.values()))


NONE: Final[Codec[None]] = codec(type(None), what="None")


@dataclass(frozen=True, slots=True)
class Signature:
    """What a handler takes and gives, read from its annotations."""

    input: Codec[Any]
    output: Codec[Any]
    undo: Codec[Any]
    payload: dict[str, Any]
    """Payload arguments: name to type; in a batch handler the type of one item."""
    payload_argument: str | None
    spread: tuple[str, ...] | None
    """Names of the arguments that one generated model holds; None if the handler takes one payload."""
    injected: dict[str, Any]
    """Arguments that are not payload: name to annotation."""


def signature(
    function: Callable[..., Any], *, injectable: Callable[[Any], bool], what: str, batch: bool, undoing: bool
) -> Signature:
    """Read a handler's annotations. Several payload arguments become one generated model.

    `injectable` tells which annotations are not payload (session, context). With `batch`, payload arguments and the
    return type are lists. With `undoing`, payload arguments are not joined and the return type does not matter.
    Raises DefinitionError.
    """
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise DefinitionError(
            f"{what}: the annotation {error.name!r} cannot be resolved; import it at module level."
        ) from None
    payload: dict[str, Any] = {}
    injected: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise DefinitionError(f"{what}: *args and **kwargs cannot be typed; name the arguments.")
        if parameter.name not in hints:
            raise DefinitionError(f"{what}: argument {parameter.name!r} has no annotation.")
        annotation = hints[parameter.name]
        if injectable(annotation):
            injected[parameter.name] = annotation
        else:
            payload[parameter.name] = (
                _item(annotation, what, f"argument {parameter.name!r}") if batch else annotation
            )
    output, undo = (NONE, NONE) if undoing else _returns(hints, what, batch)
    if undoing or not payload:
        return Signature(NONE, output, undo, payload, None, None, injected)
    if len(payload) == 1:
        (name, type_), *_ = payload.items()
        return Signature(
            codec(type_, what=f"{what}, argument {name!r}"), output, undo, payload, name, None, injected
        )
    if batch:
        raise DefinitionError(f"{what}: a batch handler takes one list of inputs.")
    fields: dict[str, Any] = {name: (type_, ...) for name, type_ in payload.items()}
    config = ConfigDict(extra="forbid")
    model: type[BaseModel] = create_model(f"{function.__name__}_input", __config__=config, **fields)
    return Signature(codec(model, what=what), output, undo, payload, None, tuple(payload), injected)


def _item(annotation: Any, what: str, which: str) -> Any:
    if get_origin(annotation) not in (list, Sequence):
        raise DefinitionError(f"{what}: {which} of a batch handler is a list, `list[...]`.")
    return get_args(annotation)[0]


def _returns(hints: dict[str, Any], what: str, batch: bool) -> tuple[Codec[Any], Codec[Any]]:
    if "return" not in hints:
        raise DefinitionError(f"{what}: the return type is not annotated; write `-> None` if there is none.")
    type_ = _item(hints["return"], what, "the return type") if batch else hints["return"]
    members = get_args(type_) if batch and get_origin(type_) in (Union, UnionType) else (type_,)
    results = [
        member for member in members if not (isinstance(member, type) and issubclass(member, Exception))
    ]
    if len(results) != 1:
        raise DefinitionError(
            f"{what}: the return type is one payload type, beside Refused in a batch handler."
        )
    if get_origin(results[0]) is Result:
        output, undo = get_args(results[0])
        return codec(output, what=f"{what}, output"), codec(undo, what=f"{what}, undo data")
    return codec(results[0], what=f"{what}, return type"), NONE
