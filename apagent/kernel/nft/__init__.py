"""The nftables part of the data path."""

from apagent.kernel.nft.table import NftTable

__all__ = ["NftTable"]
