"""Load that a server must bear: `python -m tests.serve.soak PORT [--minutes 10] [--model smollm2]`.

It starts `python -m engine serve` and asks it for as long as it is told: 64 streams, of which a fifth leave
at some moment, cancelled requests, and bodies that are none (wrong types, huge numbers, deep nesting, broken
UTF-8, 5 MiB, slow senders). Every answer that was read to its end is compared with the engine's own tokens,
`/health` is asked each second, and the server's memory is watched. In the end it is told to end, and must do
so with code 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import aiohttp
import psutil

from engine import Engine, EngineConfig, SamplingParams

STREAMS, PROMPTS, TOKENS = 64, 40, 48
LEAVES = 0.2  # of the streams
BAD = 200  # bodies


def bad_bodies(chance: random.Random) -> list[bytes]:
    """Bodies of which none can be served."""
    values = [None, True, -1, 10**400, 1e308, "x" * 1000, [], {}, [[]], [None], {"a": []}, "\ud800"]
    names = ["max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream", "logprobs", "min_p"]
    found = [b"", b"{", b"null", b"[" * 50_000, b'{"prompt": ' * 20_000, b"\xff" * 100]
    found += [b'{"prompt": "\xed\xa0\x80"}', b'{"max_tokens": ' + b"9" * 100_000 + b"}"]
    found.append(json.dumps({"prompt": [7] * (5 << 18)}).encode())
    while len(found) < BAD:
        body = {chance.choice(names): chance.choice(values) for _ in range(3)}
        prompt = chance.choice([[10**9], {"a": 1}, 5, [[5], "x"], [], "text"])
        found.append(json.dumps(body | {"prompt": prompt}).encode())
    return found


class Soak:
    """The load, and what came of it."""

    def __init__(self, port: int, engine: Engine, chance: random.Random) -> None:
        self.url, self.chance = f"http://127.0.0.1:{port}", chance
        self.port = port
        lengths = [chance.randrange(1, 60) for _ in range(PROMPTS)]
        self.prompts = [[chance.randrange(5, 200) for _ in range(length)] for length in lengths]
        params = SamplingParams(max_new_tokens=TOKENS, temperature=0, ignore_eos=True)
        self.expected = [list(one.token_ids) for one in engine.generate(self.prompts, params, progress=False)]
        self.seen: Counter[str] = Counter()
        self.until = 0.0
        self.memory: list[float] = []  # MiB, each second

    async def stream(self, session: aiohttp.ClientSession) -> None:
        """Ask for one answer, and leave it or compare it."""
        which = self.chance.randrange(PROMPTS)
        asked = {
            "prompt": self.prompts[which], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        leave = self.chance.random() < LEAVES
        left_after = self.chance.randrange(TOKENS)
        tokens: list[int] = []
        async with session.post(f"{self.url}/v1/completions", json=asked) as reply:
            if reply.status == 429:
                self.seen["429"] += 1
                await asyncio.sleep(0.05)
                return
            assert reply.status == 200, await reply.text()
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    told: dict[str, Any] = json.loads(line[6:])
                    assert "error" not in told, told
                    tokens += told["choices"][0]["token_ids"]
                if leave and len(tokens) >= left_after:
                    self.seen["left"] += 1
                    reply.close()
                    return
        self.seen["right" if tokens == self.expected[which] else "WRONG"] += 1

    async def streams(self, session: aiohttp.ClientSession) -> None:
        while time.monotonic() < self.until:
            try:
                async with asyncio.timeout(self.chance.uniform(0.5, 120)):
                    await self.stream(session)
            except TimeoutError:
                self.seen["cancelled"] += 1

    async def nonsense(self, session: aiohttp.ClientSession) -> None:
        """Send what is no request, again and again."""
        bodies = bad_bodies(self.chance)
        while time.monotonic() < self.until:
            async with session.post(f"{self.url}/v1/completions", data=self.chance.choice(bodies)) as reply:
                self.seen[f"bad: {reply.status}"] += 1
                assert reply.status in (400, 413, 429), await reply.text()
                assert (await reply.json())["error"]["message"]
            await asyncio.sleep(0.1)

    async def slow(self) -> None:
        """Send a byte now and then, and go."""
        while time.monotonic() < self.until:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n")
            for _ in range(5):
                writer.write(b"{")
                await writer.drain()
                await asyncio.sleep(0.2)
            writer.close()
            self.seen["slow"] += 1

    async def watch(self, session: aiohttp.ClientSession, server: psutil.Process) -> None:
        while time.monotonic() < self.until:
            async with session.get(f"{self.url}/health") as reply:
                self.seen["healthy" if reply.status == 200 else "UNHEALTHY"] += 1
            self.memory.append(server.memory_info().rss / 2**20)
            await asyncio.sleep(1)

    async def run(self, minutes: float, server: psutil.Process) -> None:
        self.until = time.monotonic() + 60 * minutes
        how: Any = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(total=600)}
        async with aiohttp.ClientSession(**how) as session:
            work = [self.streams(session) for _ in range(STREAMS)]
            await asyncio.gather(*work, self.nonsense(session), self.slow(), self.watch(session, server))
            await asyncio.sleep(1)
            async with session.get(f"{self.url}/metrics") as reply:
                page = await reply.text()
        for name in ("num_requests_running", "num_requests_waiting"):
            (line,) = [line for line in page.splitlines() if line.startswith(f"vllm:{name}{{")]
            assert line.endswith(" 0.0"), line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", default="random:tiny-llama")
    options = parser.parse_args()
    config = EngineConfig(device="cpu", dtype="float32")
    engine = Engine.from_pretrained(options.model, config, progress=False)
    soak = Soak(options.port, engine, random.Random(0))
    serve = ["--model", options.model, "--device", "cpu", "--dtype", "float32", "--max-queue", "40"]
    with subprocess.Popen(
        [sys.executable, "-m", "engine", "serve", "--port", str(options.port), *serve], stderr=subprocess.PIPE
    ) as server:
        assert server.stderr is not None
        while b"serving" not in server.stderr.readline():
            assert server.poll() is None
        drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        asyncio.run(soak.run(options.minutes, psutil.Process(server.pid)))
        server.terminate()
        code = server.wait()
        drain.wait()
    early = max(soak.memory[: len(soak.memory) // 3 + 1])
    memory = {"most in the first third": round(early), "at the end": round(soak.memory[-1])}
    told = {"seen": dict(sorted(soak.seen.items())), "exit": code, "memory_mib": memory}
    print(json.dumps(told, indent=1))
    sys.exit(bool(soak.seen["WRONG"] or soak.seen["UNHEALTHY"] or code))


if __name__ == "__main__":
    main()
