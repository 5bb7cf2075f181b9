"""The engine's side of the backend ``vllm-local-inproc``. Run as a file by the Python of vLLM's environment.

Reads frames from standard input, writes frames to what was standard output: four bytes of length (big-endian), then
JSON. The first frame holds the arguments of vLLM's ``LLM``; it is answered by ``{"ready": …}``. Each one after it is
``{"documents": [[id, …], …], "k": k}`` and is answered by a frame a document, ``{"index": i, "answer": …}``, in the
form of a server's answer to a completion, and by ``{"done": true}``. What goes wrong is ``{"error": text, "refused":
bool}``. Imports vLLM and the standard library.
"""

import json
import os
import struct
import sys
from typing import Any, BinaryIO

DOCUMENTS_AT_ONCE = 64


def main() -> int:
    """Serve until standard input ends."""
    frames = os.fdopen(os.dup(1), "wb")
    # What vLLM prints must not stand between the frames.
    os.dup2(2, 1)
    questions = sys.stdin.buffer
    arguments = read(questions)
    if arguments is None:
        return 0
    try:
        from vllm import LLM

        llm = LLM(**arguments, disable_log_stats=True)
        config = llm.llm_engine.model_config
        ready = {
            "max_model_len": config.max_model_len,
            "max_logprobs": config.max_logprobs,
            "dtype": str(config.dtype).removeprefix("torch."),
        }
    except Exception as error:
        write(frames, {"error": f"{type(error).__name__}: {error}", "refused": True})
        return 1
    write(frames, {"ready": ready})
    while (question := read(questions)) is not None:
        try:
            score(llm, frames, question)
        except ValueError as error:
            write(frames, {"error": str(error), "refused": True})
        except Exception as error:
            write(frames, {"error": f"{type(error).__name__}: {error}", "refused": False})
            return 1
    return 0


def score(llm: Any, frames: BinaryIO, question: dict[str, Any]) -> None:
    """Answer every document of a question, some at a time, so that what is answered can be stored."""
    from vllm import SamplingParams

    k, documents = question["k"], question["documents"]
    wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=k, logprobs=k, detokenize=False)
    for at in range(0, len(documents), DOCUMENTS_AT_ONCE):
        prompts = [{"prompt_token_ids": tokens} for tokens in documents[at : at + DOCUMENTS_AT_ONCE]]
        for index, found in enumerate(llm.generate(prompts, wanted, use_tqdm=False), start=at):
            write(frames, {"index": index, "answer": as_completion(found)})
    write(frames, {"done": True})


def as_completion(found: Any) -> dict[str, Any]:
    """One output of the engine in the form in which a server gives it."""
    rows = [
        None if row is None else {str(i): {"logprob": entry.logprob, "rank": entry.rank} for i, entry in row.items()}
        for row in found.prompt_logprobs
    ]
    token = found.outputs[0].token_ids[0]
    top = found.outputs[0].logprobs[0]
    logprobs = {
        "tokens": [f"token_id:{token}"],
        "token_logprobs": [top[token].logprob],
        "top_logprobs": [{f"token_id:{i}": entry.logprob for i, entry in top.items()}],
    }
    choice = {"prompt_token_ids": found.prompt_token_ids, "prompt_logprobs": rows, "logprobs": logprobs}
    return {"choices": [choice]}


def read(stream: BinaryIO) -> Any:
    """The next frame; None at the end."""
    head = stream.read(4)
    return None if len(head) < 4 else json.loads(stream.read(struct.unpack(">I", head)[0]))


def write(stream: BinaryIO, value: Any) -> None:
    """Write a frame."""
    body = json.dumps(value).encode()
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


# vLLM starts its workers as new processes that import this file.
if __name__ == "__main__":
    sys.exit(main())
