"""Asks /health again and again, in a process of its own, until its input ends; prints the seconds of each as JSON.

Run by file, with the port; nothing but the standard library: what it measures is the server, not the one who asks.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time


def main(port: int) -> None:
    found: list[float] = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while not select.select([sys.stdin], [], [], 0.02)[0]:
        began = time.monotonic()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        found.append(time.monotonic() - began)
    print(json.dumps(found))


main(int(sys.argv[1]))
