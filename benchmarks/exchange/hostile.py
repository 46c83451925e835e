"""How long honest sites' rounds take while others do what they can against the coordinator, with and without it.

Quiet rounds and rounds under an attack alternate in one run; a row is a kind of attack by the owner of a certificate
that is revoked, of nobody in the study, or of a member that has left. Attackers run with the lowest priority, since in
earnest they have machines of their own. Exits with 1 if a median is more than 1.5 times the quiet one, or the
coordinator takes 350 MB.

    python benchmarks/exchange/hostile.py --turns 4 --json FILE
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))

from hostile_callers import ATTACKS, WHO, Campaign, under_attack

MOST_TIMES, MOST_MEMORY = 1.5, 350.0


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each kind in a turn, quiet and under attack")
    parser.add_argument("--turns", type=int, default=4, help="quiet rounds, then rounds under attack, so many times")
    parser.add_argument("--megabytes", type=int, default=32, help="of the model")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="nnunet_fed_hostile_") as folder:
        campaign = Campaign(Path(folder), options.megabytes * 250_000)
        try:
            for attack in [*ATTACKS, "connections"]:
                for who in WHO if attack in ATTACKS else WHO[:1]:
                    quiet, attacked = [], []
                    for _ in range(options.turns):
                        quiet += [campaign.honest_round() for _ in range(options.rounds)]
                        with under_attack(attack, who, campaign.address, campaign.certified):
                            attacked += [campaign.honest_round() for _ in range(options.rounds)]
                    medians = statistics.median(quiet), statistics.median(attacked)
                    rows.append({
                        "attack": attack, "by": who if attack in ATTACKS else "nobody", "quiet_seconds": medians[0],
                        "seconds": medians[1], "times": medians[1] / medians[0], "peak_megabytes": campaign.memory(),
                    })  # fmt: skip
        finally:
            campaign.close()
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(row["times"] > MOST_TIMES or row["peak_megabytes"] > MOST_MEMORY for row in rows))


if __name__ == "__main__":
    main()
