"""Small traffic programs that run inside a namespace: `python -m apagent.lab.traffic.NAME`.

`serve` answers; `download`, `upload`, `echo` and `lines` ask; `voice` is both ends of a call. Each
writes JSON lines on stdout, the last of them an event `result`, and is bounded in time. Timestamps
are CLOCK_MONOTONIC in nanoseconds, which all network namespaces of a machine share.
"""

DOWNLOAD_PORT = 8001
UPLOAD_PORT = 8002
LINES_PORT = 8003
ECHO_PORT = 8004
VOICE_PORT = 8005
PORTS = {
    "download": DOWNLOAD_PORT,
    "upload": UPLOAD_PORT,
    "lines": LINES_PORT,
    "echo": ECHO_PORT,
}
"""Where `serve` listens."""
