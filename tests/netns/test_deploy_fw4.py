"""The include for OpenWrt's fw4, as its nft would read it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.netns

INCLUDE = Path(__file__).parents[2] / "deploy/openwrt/chain-pre/forward/10-apagent.nft"

FW4 = f"""
table inet fw4 {{
    chain forward {{
        type filter hook forward priority filter; policy drop;
        include "{INCLUDE}"
        ct state vmap {{ established : accept, related : accept }}
    }}
}}
"""


def test_nft_accepts_the_include_at_the_head_of_fw4s_forward_chain(tmp_path: Path) -> None:
    ruleset = tmp_path / "fw4.nft"
    ruleset.write_text(FW4)
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", f"nft -f {ruleset} && nft list chain inet fw4 forward"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rules = [line.strip() for line in done.stdout.splitlines()]
    assert 'iifname "apv-*" oifname "wan" accept' in rules
    assert 'iifname "wan" oifname "apv-*" ct state established,related accept' in rules
