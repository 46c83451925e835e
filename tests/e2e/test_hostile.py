"""Sites go on with their rounds while others, with any certificate of the authority, do what they can against it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hostile_callers import ATTACKS, WHO, Campaign, under_attack

MOST_MEMORY = 350.0
"""MB."""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    campaign = Campaign(tmp_path_factory.mktemp("campaign"), 100_000)
    yield campaign
    campaign.close()


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("attack", [*ATTACKS, "connections"])
def test_honest_rounds_end_under_attack(campaign: Campaign, attack: str, who: str) -> None:
    before = len(campaign.log.read_text())
    with under_attack(attack, who, campaign.address, campaign.certified):
        for _ in range(3):
            campaign.honest_round()
    assert campaign.process.poll() is None
    assert campaign.memory() < MOST_MEMORY
    log = campaign.log.read_text()[before:]
    assert "Traceback" not in log
    if attack != "connections":  # which never come as far as a call
        said = {"revoked": "has been revoked", "foreign": "'foreign' is not a site", "member": "'member'"}[who]
        assert said in campaign.log.read_text(), "each has twenty lines, and then one in ten seconds"
    assert len(log) < 100_000, "nobody fills the log"
