"""The certificates of a session, and the strangers that no link may talk to."""

from __future__ import annotations

import pytest
import trustme

from tests.transport.certificates import STRANGERS, Authorities, Stranger


@pytest.fixture(scope="session")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> Authorities:
    directory = tmp_path_factory.mktemp("certificates")
    made = Authorities(directory, trustme.CA(), trustme.CA(organization_name="somebody else"))
    made.ours.cert_pem.write_to_path(str(made.root))
    made.theirs.cert_pem.write_to_path(str(made.other_root))
    return made


@pytest.fixture(params=STRANGERS)
def stranger(request: pytest.FixtureRequest) -> Stranger:
    return STRANGERS[request.param]
