"""Installs the programs of servers that can be had in no other way: Debian packages, for MySQL with an artefact."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from devservices import docker, kafka, mariadb, mysql, postgres, rabbitmq
from devservices.base import Unavailable
from devservices.provide import URL_VARIABLES


@dataclass(frozen=True, slots=True)
class _Programs:
    find: Callable[[], Path]
    packages: tuple[str, ...]
    fetch: Callable[[], None] | None = None
    """What is to be done after the packages are there."""


_PROGRAMS: Final = {
    "mariadb": _Programs(mariadb.find_programs, ("mariadb-server-core", "mariadb-client-core")),
    "mysql": _Programs(mysql.find_programs, ("libaio1",), mysql.install),
    "postgres": _Programs(postgres.find_programs, ("postgresql",)),
    "rabbitmq": _Programs(rabbitmq.find_programs, ("rabbitmq-server",)),
    # the broker itself is no package: Maven fetches it into the user's cache
    "kafka": _Programs(kafka.find_programs, ("default-jre-headless", "maven")),
}


def ensure(names: list[str]) -> list[str]:
    """Make the services providable, installing packages where that is the only way; return what remains impossible."""
    missing = [name for name in names if not _can_be_had(name)]
    if not missing:
        return []
    packages = [package for name in missing for package in _PROGRAMS[name].packages]
    problem = _install([package for package in packages if not _installed(package)])
    problems = {name: problem or _fetch(name) for name in missing}
    return [
        f"{name}: {problems[name] or 'still missing after the installation'}"
        for name in missing
        if not _found(name)
    ]


def _can_be_had(name: str) -> bool:
    return bool(os.environ.get(URL_VARIABLES[name])) or _found(name) or docker.engine_problem() is None


def _found(name: str) -> bool:
    try:
        _PROGRAMS[name].find()
    except Unavailable:
        return False
    return True


def _fetch(name: str) -> str | None:
    """Do what remains after the packages; return the reason if that cannot be done."""
    fetch = _PROGRAMS[name].fetch
    try:
        if fetch is not None:
            fetch()
    except Unavailable as error:
        return str(error)
    return None


def _installed(package: str) -> bool:
    """Whether a package is there, as far as that can be told."""
    if shutil.which("dpkg-query") is None:
        return False
    told = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status}", package],
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout == "installed"


def _install(packages: list[str]) -> str | None:
    """Install packages; return the reason if that cannot be done."""
    if not packages:
        return None
    wanted, variables = " ".join(packages), ", ".join(URL_VARIABLES.values())
    if shutil.which("apt-get") is None:
        return f"this machine has no apt-get; install {wanted} by hand or give the addresses in {variables}"
    if os.geteuid() != 0:
        return f"not root; run `apt-get install {wanted}` as root or give the addresses in {variables}"
    print(f"set-up: installing the Debian packages {wanted}", flush=True)
    if _apt("install", *packages) is None:
        return None
    # The lists may be missing (a fresh image) or too old for the mirror: fetch them and try once more.
    return _apt("update") or _apt("install", *packages)


def _apt(verb: str, *packages: str) -> str | None:
    result = subprocess.run(
        ["apt-get", "-y", "-q", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3", verb]
        + (["--no-install-recommends", *packages] if packages else []),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # RUNLEVEL=1 keeps the packages' own services from being started; ours run in temporary directories.
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"},
        check=False,
    )
    if result.returncode == 0:
        return None
    return f"apt-get {verb} failed: {' | '.join(result.stdout.strip().splitlines()[-4:])}"
