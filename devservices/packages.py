"""Installs the Debian packages of servers that can be had in no other way."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from devservices import docker, kafka, postgres, rabbitmq
from devservices.base import Unavailable
from devservices.provide import URL_VARIABLES


@dataclass(frozen=True, slots=True)
class _Programs:
    find: Callable[[], Path]
    packages: tuple[str, ...]


_PROGRAMS: Final = {
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
    problem = _install(packages)
    return [
        f"{name}: {problem or 'still missing after the installation'}" for name in missing if not _found(name)
    ]


def _can_be_had(name: str) -> bool:
    return bool(os.environ.get(URL_VARIABLES[name])) or _found(name) or docker.engine_problem() is None


def _found(name: str) -> bool:
    try:
        _PROGRAMS[name].find()
    except Unavailable:
        return False
    return True


def _install(packages: list[str]) -> str | None:
    """Install packages; return the reason if that cannot be done."""
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
