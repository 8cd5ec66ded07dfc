"""Our own source rules, run by `make lint`: what ruff and mypy cannot know about this project.

A finding is silenced where it stands, with a reason: `# lint: allow RULE because REASON`, on one of its lines or on the
line above. An allowance that silences nothing is a finding too.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One breach of a rule."""

    path: str
    line: int
    rule: str
    what: str

    def __str__(self) -> str:
        reason = RULES[self.rule].reason if self.rule in RULES else _ALLOWANCE_REASON
        return f"{self.path}:{self.line}: {self.rule}: {self.what}: {reason}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: why it is there, where it holds, and what finds its breaches in a module."""

    reason: str
    find: Callable[[Module], Iterator[tuple[ast.AST, str]]]
    in_examples: bool = False
    in_ports: bool = True  # whether it holds in saga/clock.py, where time, ids and tasks are made


class Module:
    """A parsed module, with the full names behind its imports."""

    def __init__(self, source: str, path: str) -> None:
        self.path = path
        self.tree = ast.parse(source, path)
        self.nodes = list(ast.walk(self.tree))
        self._origins = dict(_origins(self.nodes))

    def calls(self) -> Iterator[ast.Call]:
        return (node for node in self.nodes if isinstance(node, ast.Call))

    def full_name(self, node: ast.AST) -> str:
        """Return `datetime.datetime.now` for `dt.now` after `from datetime import datetime as dt`; "" for no name."""
        if isinstance(node, ast.Name):
            return self._origins.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            owner = self.full_name(node.value)
            return f"{owner}.{node.attr}" if owner else ""
        return ""

    def imports(self, node: ast.AST) -> bool:
        """Whether a name begins at an import of this module, and not at a local variable of the same name."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self._origins


def _origins(nodes: Sequence[ast.AST]) -> Iterator[tuple[str, str]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            for name in node.names:
                root = name.name.partition(".")[0]
                yield (name.asname, name.name) if name.asname else (root, root)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                yield name.asname or name.name, f"{node.module}.{name.name}"


def _uses(*patterns: str) -> Callable[[Module], Iterator[tuple[ast.AST, str]]]:
    """Find every use of imported names, called or handed over. A pattern may end in `.*`."""
    wanted = re.compile("|".join(re.escape(each).replace(r"\*", r"\w+") for each in patterns))

    def find(module: Module) -> Iterator[tuple[ast.AST, str]]:
        for node in module.nodes:
            if isinstance(node, ast.Name | ast.Attribute) and module.imports(node):
                name = module.full_name(node)
                if wanted.fullmatch(name):
                    yield node, name

    return find


def _clock(module: Module) -> Iterator[tuple[ast.AST, str]]:
    yield from _uses(
        "time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns", "time.perf_counter",
        "time.perf_counter_ns", "time.sleep", "datetime.datetime.now", "datetime.datetime.utcnow",
        "datetime.datetime.today", "datetime.date.today",
    )(module)  # fmt: skip
    for call in module.calls():
        if (
            isinstance(call.func, ast.Attribute)
            and call.func.attr == "time"
            and "loop" in _last(call.func.value)
        ):
            yield call, "the event loop's time()"


def _spawn(module: Module) -> Iterator[tuple[ast.AST, str]]:
    for call in module.calls():
        if _last(call.func) in ("create_task", "ensure_future"):
            yield call, _last(call.func)


def _mandatory_false(module: Module) -> Iterator[tuple[ast.AST, str]]:
    for call in module.calls():
        for keyword in call.keywords:
            if (
                keyword.arg == "mandatory"
                and isinstance(keyword.value, ast.Constant)
                and not keyword.value.value
            ):
                yield keyword.value, f"mandatory={keyword.value.value}"


def _process_context(module: Module) -> Iterator[tuple[ast.AST, str]]:
    for call in module.calls():
        if (
            isinstance(call.func, ast.Attribute)
            and call.func.attr == "process"
            and re.search(r"message|delivery|incoming|msg", _last(call.func.value))
        ):
            yield call, f"{_last(call.func.value)}.process("


_SQL_FUNCTIONS: Final = {
    "text", "execute", "executemany", "exec_driver_sql", "executescript", "fetch", "fetchrow", "fetchval", "scalar",
    "scalars", "DDL",
}  # fmt: skip


def _sql_text(module: Module) -> Iterator[tuple[ast.AST, str]]:
    for call in module.calls():
        if _last(call.func) in _SQL_FUNCTIONS and call.args and (how := _assembled(call.args[0])):
            yield call, f"SQL made by {how} in {_last(call.func)}()"


def _assembled(node: ast.expr) -> str | None:
    """Return how a string is put together from parts that are no constants, or None."""
    if isinstance(node, ast.JoinedStr) and any(isinstance(part, ast.FormattedValue) for part in node.values):
        return "an f-string"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and _is_text(node.left):
        return "% formatting"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = (node.left, node.right)
        if how := _assembled(node.left) or _assembled(node.right):
            return how
        return "concatenation" if any(map(_is_text, sides)) and not all(map(_is_text, sides)) else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return ".format()" if _is_text(node.func.value) else None
    return None


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _is_text(node.left) and _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


_LOG_METHODS: Final = {"debug", "info", "warning", "error", "exception", "critical", "log"}


def _log_exception(module: Module) -> Iterator[tuple[ast.AST, str]]:
    for call, exceptions in _calls_with_exceptions(module.tree, frozenset()):
        if not (isinstance(call.func, ast.Attribute) and call.func.attr in _LOG_METHODS):
            continue
        if not re.search(r"log", _last(call.func.value), re.IGNORECASE):
            continue
        if call.func.attr == "exception":
            yield call, "exception() writes the text of the exception"
        for keyword in call.keywords:
            if keyword.arg == "exc_info" and not (
                isinstance(keyword.value, ast.Constant) and not keyword.value.value
            ):
                yield call, "exc_info"
        for argument in [
            *call.args,
            *(keyword.value for keyword in call.keywords if keyword.arg != "exc_info"),
        ]:
            if _tells_exception(argument, exceptions):
                yield call, "the text of an exception"


def _calls_with_exceptions(node: ast.AST, names: frozenset[str]) -> Iterator[tuple[ast.Call, frozenset[str]]]:
    """Every call, with the names that hold an exception where it stands: caught ones and annotated parameters."""
    if isinstance(node, ast.ExceptHandler) and node.name:
        names |= {node.name}
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        mine = {each.arg for each in parameters if each.annotation and _is_exception(each.annotation)}
        names = (names - {each.arg for each in parameters}) | mine
    if isinstance(node, ast.Call):
        yield node, names
    for child in ast.iter_child_nodes(node):
        yield from _calls_with_exceptions(child, names)


def _is_exception(annotation: ast.expr) -> bool:
    return any(re.search(r"(Exception|Error)$", _last(part)) for part in ast.walk(annotation))


def _tells_exception(node: ast.expr, caught: frozenset[str]) -> bool:
    """Whether a log argument renders a caught exception itself. Its attributes and its type are fine."""
    if isinstance(node, ast.Name):
        return node.id in caught
    if isinstance(node, ast.JoinedStr):
        parts = (part.value for part in node.values if isinstance(part, ast.FormattedValue))
        return any(_tells_exception(part, caught) for part in parts)
    if isinstance(node, ast.BinOp):
        return _tells_exception(node.left, caught) or _tells_exception(node.right, caught)
    if isinstance(node, ast.Tuple | ast.List):
        return any(_tells_exception(part, caught) for part in node.elts)
    if isinstance(node, ast.Dict):
        return any(_tells_exception(part, caught) for part in node.values)
    if isinstance(node, ast.Call) and _last(node.func) in (
        "str",
        "repr",
        "ascii",
        "format",
        "format_exception",
    ):
        return any(_tells_exception(part, caught) for part in node.args)
    return False


_UNSAFE_MODULES: Final = {
    "pickle", "cPickle", "dill", "cloudpickle", "jsonpickle", "marshal", "shelve", "yaml", "ruamel",
}  # fmt: skip


def _unsafe(module: Module) -> Iterator[tuple[ast.AST, str]]:
    for node in module.nodes:
        names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            if name.partition(".")[0] in _UNSAFE_MODULES:
                yield node, f"import of {name}"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("eval", "exec")
        ):
            yield node, f"{node.func.id}()"
        if (
            isinstance(node, ast.Call)
            and _last(node.func) in ("import_module", "__import__")
            and not (node.args and isinstance(node.args[0], ast.Constant))
        ):
            yield node, f"{_last(node.func)}() of a name that is made at run time"


_QUERIES: Final = {"select", "update", "delete"}
_RAW_QUERY: Final = re.compile(r"\b(FROM|UPDATE|JOIN)\s+saga_\w", re.IGNORECASE)


_BY_CHANNEL: Final = (
    "saga/storage/sqlalchemy/queue.py",
    "saga/storage/sqlalchemy/mysql_queue.py",
    "saga/storage/sqlalchemy/postgresql_queue.py",
)
"""The database broker's tables have no namespace: a broker serves many, and each channel's name bears its own."""


def _namespace(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Find queries on our tables that name no namespace: built with SQLAlchemy, or written as SQL."""
    if module.path.endswith(_BY_CHANNEL):
        return
    parents = {child: parent for parent in module.nodes for child in ast.iter_child_nodes(parent)}
    for node in module.nodes:
        if isinstance(node, ast.Call) and module.full_name(node.func) in {
            f"sqlalchemy.{q}" for q in _QUERIES
        }:
            whole: ast.AST = node
            while isinstance(parents.get(whole), ast.expr | ast.keyword | ast.comprehension):
                whole = parents[whole]
            of_functions = node.args and all(_is_function(module, each) for each in node.args)
            if not of_functions and not _names(whole, "namespace"):
                yield node, f"{_last(node.func)}() in any namespace"
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and _RAW_QUERY.search(node.value)
            and "namespace" not in node.value
        ):
            yield node, "SQL in any namespace"


def _is_function(module: Module, node: ast.expr) -> bool:
    if isinstance(node, ast.Starred):
        return isinstance(node.value, ast.GeneratorExp) and _is_function(module, node.value.elt)
    return isinstance(node, ast.Call) and module.full_name(node.func).startswith("sqlalchemy.func.")


def _names(tree: ast.AST, name: str) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == name for node in ast.walk(tree))


def _sql_now(module: Module) -> Iterator[tuple[ast.AST, str]]:
    for call in module.calls():
        if module.full_name(call.func) in ("sqlalchemy.func.now", "func.now"):
            yield call, "func.now()"


def _broad_except(module: Module) -> Iterator[tuple[ast.AST, str]]:
    for loop in module.nodes:
        if not isinstance(loop, ast.While | ast.AsyncFor):
            continue
        for node in loop.body:
            for handler in _handlers(node):
                names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
                broad = any(name is None or _last(name) in ("Exception", "BaseException") for name in names)
                if broad and not any(isinstance(each, ast.Raise) for each in ast.walk(handler)):
                    yield handler, "a loop that goes on after any exception"


def _handlers(node: ast.AST) -> Iterator[ast.ExceptHandler]:
    """The handlers in a statement, without those of functions defined in it."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
        return
    if isinstance(node, ast.ExceptHandler):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _handlers(child)


def _last(node: ast.AST | None) -> str:
    """Return the last part of a dotted name or of a call of one; "" for anything else."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Call):
        return _last(node.func)
    return node.id if isinstance(node, ast.Name) else ""


RULES: Final[dict[str, Rule]] = {
    "clock": Rule("time comes from the port Clock, so that the simulator owns it", _clock, True, False),
    "sleep": Rule("waiting goes through the port Clock", _uses("asyncio.sleep"), True, False),
    "ids": Rule(
        "ids come from the port Ids, so that a seed repeats a run",
        _uses(
            "uuid.uuid1", "uuid.uuid3", "uuid.uuid4", "uuid.uuid5", "uuid.uuid6", "uuid.uuid7", "os.urandom"
        ),
        in_ports=False,
    ),
    "random": Rule(
        "randomness comes from a port, so that a seed repeats a run",
        _uses("random.*", "secrets.*"),
        in_ports=False,
    ),
    "spawn": Rule(
        "tasks come from the port Spawner, which keeps and supervises them", _spawn, in_ports=False
    ),
    "wait-for": Rule(
        "wait_for can lose a result or a cancellation; use asyncio.timeout", _uses("asyncio.wait_for")
    ),
    "mandatory-false": Rule(
        "an unroutable message would vanish silently (F-05)", _mandatory_false, in_examples=True
    ),
    "process-context": Rule(
        "it acks or rejects by itself on leaving; settle a delivery by its outcome", _process_context, True
    ),
    "sql": Rule("values are bound, never written into SQL", _sql_text, in_examples=True),
    "sql-now": Rule(
        "now() is frozen at the start of the transaction (PG-1); use clock_timestamp()", _sql_now, True
    ),
    "log-exception": Rule(
        "an exception's text can hold row values (SQL-9); log its class, code and our own ids", _log_exception
    ),
    "namespace": Rule("what one tenant has, no query of another one finds (K-01)", _namespace),
    "unsafe-import": Rule("data from outside must never become code", _unsafe, in_examples=True),
    "broad-except": Rule(
        "a loop must not outlive a bug unseen; let its supervisor count it and start it again", _broad_except
    ),
}
_ALLOWANCE_REASON: Final = "an allowance names an existing rule, says why, and silences something"
_ALLOWANCE: Final = re.compile(r"#\s*lint:\s*allow\b\s*(?P<rule>[\w-]*)(?:\s+because\s+(?P<reason>\S.*))?")
_PORTS: Final = ("saga/clock.py",)


def check(source: str, path: str) -> list[Finding]:
    """Return the findings of one module; `path`, relative to the repository, decides which rules hold in it."""
    module = Module(source, path)
    allowances = list(_allowances(source))
    used: set[int] = set()
    findings = []
    for name, rule in RULES.items():
        if path.startswith("examples/") and not rule.in_examples:
            continue
        if path in _PORTS and not rule.in_ports:
            continue
        for node, what in rule.find(module):
            first, last = _span(node)
            silencing = [each for each in allowances if each[1] == name and first - 1 <= each[0] <= last]
            used.update(line for line, _, _ in silencing)
            if not silencing:
                findings.append(Finding(path, first, name, what))
    for line, name, reason in allowances:
        if name not in RULES:
            findings.append(Finding(path, line, "allowance", f"there is no rule {name!r}"))
        elif not reason:
            findings.append(Finding(path, line, "allowance", f"{name} is allowed without `because ...`"))
        elif line not in used:
            findings.append(Finding(path, line, "allowance", f"{name} is allowed but not needed here"))
    return sorted(set(findings))


def _span(node: ast.AST) -> tuple[int, int]:
    first: int = getattr(node, "lineno", 1)
    # A handler spans its whole body; only its own line can carry the allowance.
    last = first if isinstance(node, ast.ExceptHandler) else getattr(node, "end_lineno", None)
    return first, last or first


def _allowances(source: str) -> Iterator[tuple[int, str, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (match := _ALLOWANCE.search(token.string)):
            yield token.start[0], match["rule"].lower(), (match["reason"] or "").strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the modules of saga/ and examples/ below the given directory (here, by default)."""
    root = Path(*(sys.argv[1:2] if arguments is None else arguments))
    files = [file for top in ("saga", "examples") for file in sorted((root / top).rglob("*.py"))]
    findings = [
        finding for file in files for finding in check(file.read_text(), file.relative_to(root).as_posix())
    ]
    for finding in findings:
        print(finding)
    print(f"source rules: {len(RULES)} rules, {len(files)} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
