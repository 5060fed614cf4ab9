"""The includes for OpenWrt's fw4, as its nft would read them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.netns

INCLUDES = Path(__file__).parents[2] / "deploy/openwrt/chain-pre"


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        (
            "forward",
            {
                'iifname "apv-*" oifname "wan" accept',
                'iifname "wan" oifname "apv-*" ct state established,related accept',
                'iifname "apv-*" oifname "apv-*" accept',
                'iifname "wan" oifname "br-lan" ct status dnat accept',
                'iifname "wan" oifname "apv-*" ct status dnat accept',
            },
        ),
        ("input", {'iifname "apv-*" icmp type echo-request accept'}),
    ],
)
def test_nft_accepts_the_include_at_the_head_of_fw4s_chain(
    tmp_path: Path, chain: str, expected: set[str]
) -> None:
    ruleset = tmp_path / "fw4.nft"
    ruleset.write_text(f"""
table inet fw4 {{
    chain {chain} {{
        type filter hook {chain} priority filter; policy drop;
        include "{INCLUDES / chain / "10-apagent.nft"}"
        ct state vmap {{ established : accept, related : accept }}
    }}
}}
""")
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", f"nft -f {ruleset} && nft list chain inet fw4 {chain}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert expected <= {line.strip() for line in done.stdout.splitlines()}
