"""Wi-Fi clients keep their connections when they roam between NATing access points."""

__version__ = "0.1.0"
