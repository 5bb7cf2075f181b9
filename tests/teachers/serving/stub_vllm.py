"""Stands for `vllm.entrypoints.openai.api_server` where a real one cannot be made to fail on demand. Standard library.

STUB says how it behaves, STUB_PIDS names a file to which every process appends its pid. Like vLLM it has an engine of
its own, which here ignores SIGTERM, and one process below that which nobody waits for.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODE = os.environ.get("STUB", "good")
ENGINE = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(os.environ["STUB_PIDS"], "a").write(f"{os.getpid()}\\n")
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open(os.environ["STUB_PIDS"], "a").write(f"{os.getpid()}\\n")
        os.write(1, b".")
        while True: signal.pause()
    os._exit(0)
while True: signal.pause()
"""


def note_pid() -> None:
    """Append this process's pid."""
    with open(os.environ["STUB_PIDS"], "a") as file:
        file.write(f"{os.getpid()}\n")


class Handler(BaseHTTPRequestHandler):
    """Scores every prompt alike, or fails in the way that was asked for."""

    def log_message(self, *arguments: object) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        """Answer a completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("die"):
            print("the last thing that it says", file=sys.stderr, flush=True)
            os._exit(9)
        value = float("nan") if MODE == "nan" else -1.0
        rows = [None] + [{str(token): {"logprob": value}} for token in body["prompt"][1:]]
        choice = {} if MODE == "no-logprobs" else {"prompt_logprobs": rows}
        answer = json.dumps({"choices": [choice]}).encode()
        if MODE == "unable":
            answer = b'{"error": {"message": "EngineCore encountered an issue"}}'
        self.send_response(500 if MODE == "unable" else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


def main() -> None:
    """Start as asked."""
    note_pid()
    engine = subprocess.Popen([sys.executable, "-c", ENGINE], stdout=subprocess.PIPE)
    assert engine.stdout is not None
    engine.stdout.read(1)
    if MODE == "dies":
        for number in range(40):
            print(f"line {number}", file=sys.stderr)
        print("ValueError: the model does not fit", file=sys.stderr, flush=True)
        os._exit(3)
    if MODE == "silent":
        threading.Event().wait()
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
