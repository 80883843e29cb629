"""A server with the completions API of OpenAI, whose answers are a function of what it is asked; for the HTTP engine.

It prints its port once it listens. ``/reload`` gives it other weights, which are lost with the process.
"""

import argparse
import json
import os
import random
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz ."


def answer(prompt: list[int], seed: int, max_tokens: int, weights: str = "") -> tuple[str, bool]:
    """The text that follows a prompt, a token each letter, and whether it ends there by itself."""
    rng = random.Random(f"{prompt} {seed} {weights}")
    letters = [rng.choice(LETTERS) for _ in range(rng.randrange(1, 12))]
    return "".join(letters[:max_tokens]), len(letters) < max_tokens


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(("127.0.0.1", options.port), Handler)
        self.options = options
        self.tokenizer = Tokenizer.from_file(options.tokenizer)
        self.weights = ""
        self.lock = threading.RLock()
        self.failures = list(options.fail)
        self.arrived = self.under_way = 0
        self.barrier = threading.Barrier(options.together) if options.together else None

    def note(self, **what) -> None:
        with self.lock, Path(self.options.log).open("a") as lines:
            lines.write(json.dumps(what) + "\n")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_) -> None:
        pass

    def reply(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.reply({"data": [{"id": self.server.options.model}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        options = self.server.options
        if self.path == "/reload":
            self.server.weights = body["path"]
            self.server.note(weights=body["path"])
            self.reply({})
        elif options.key and self.headers["Authorization"] != f"Bearer {options.key}":
            self.reply({"error": "wrong key"}, 401)
        elif self.path != "/v1/completions":
            self.reply({"error": "not found"}, 404)
        elif body["model"] != options.model:
            self.reply({"error": f"the model {body['model']} does not exist"}, 404)
        elif body["max_tokens"] == 1:  # the engine's probe
            self.complete(body)
        else:
            with self.server.lock:
                self.server.arrived += 1
                self.server.under_way += 1
                arrived, under_way = self.server.arrived, self.server.under_way
                failure = self.server.failures.pop(0) if self.server.failures else None
            if arrived == options.die_at:
                with self.server.lock:  # what is written down has been answered, and the reverse
                    os.kill(os.getpid(), signal.SIGKILL)
            if self.server.barrier is not None:
                self.server.barrier.wait(timeout=30)
            while options.hold and "/round_1_" in self.server.weights and Path(options.hold).exists():
                threading.Event().wait(0.01)
            with self.server.lock:
                self.server.under_way -= 1
            if failure is not None:
                self.reply({"error": "try again"}, failure)
            else:
                with self.server.lock:
                    self.server.note(prompt=body["prompt"], seed=body["seed"], under_way=under_way)
                    self.complete(body)

    def complete(self, body: dict) -> None:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.server.tokenizer.encode(prompt, add_special_tokens=self.server.options.text).ids
        text, ended = answer(prompt, body["seed"], body["max_tokens"], self.server.weights)
        choice: dict[str, Any] = {"text": text, "finish_reason": "stop" if ended else "length"}
        if not self.server.options.text:
            ids = self.server.tokenizer.encode(text, add_special_tokens=False).ids
            ids += body["stop_token_ids"][:1] if ended else []
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
            choice["logprobs"] = {"token_logprobs": [-id / 100 for id in ids]}
        self.reply({"choices": [choice], "usage": {"prompt_tokens": len(prompt)}})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer", help="tokenizer.json")
    parser.add_argument("log", help="file for what was answered, a line each")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="policy", help="the name that it serves")
    parser.add_argument("--key", help="the API key that it wants")
    parser.add_argument("--text", action="store_true", help="speak text only, with the tokenizer's own BOS in front")
    parser.add_argument("--fail", type=int, nargs="*", default=(), help="answer the first requests with these errors")
    parser.add_argument("--die-at", type=int, help="end by SIGKILL when this request arrives")
    parser.add_argument("--together", type=int, help="answer so many requests together, and none before")
    parser.add_argument("--hold", help="answer nothing with the weights of round 1 while this file is there")
    server = Server(parser.parse_args())
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
