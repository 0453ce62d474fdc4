"""Each server has an environment of its own, made from one line of the `peers` extra."""

from __future__ import annotations

from loadtest.field import FIELD
from loadtest.peers import Environments, wanted


def test_every_peer_of_the_extra_is_in_the_race_and_the_other_way_round():
    assert set(wanted()) == {entry.package for entry in FIELD} - {"nginx", "node"}


def test_no_environment_has_two_servers():
    peers = set(wanted())

    for package, requirements in wanted().items():
        others = {line for line in requirements for other in peers - {package} if line.lower().startswith(other)}
        assert not others, package


def test_environments_of_two_interpreters_have_two_directories(tmp_path):
    environments = Environments.of(where=tmp_path)

    assert environments.home.parent == tmp_path
    assert environments.version in environments.home.name
    assert not environments.has("uvicorn")
    assert environments.versions("uvicorn") == {}
