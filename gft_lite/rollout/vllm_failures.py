"""Start-up failures of vLLM as one line with advice, from its exception or its server's log."""

from __future__ import annotations

import re

from gft_lite.rollout.base import RolloutError
from gft_lite.utils.errors import UserError

MAX_CAUSE = 400  # Characters of vLLM's own text.

# (pattern in vLLM's text, advice); the first match counts. The user can act on all of these.
_KNOWN = (
    (
        r"less than desired .* memory utilization|out of memory|OutOfMemory",
        "Lower rollout.gpu_memory, or end other processes that use the memory.",
    ),
    (
        r"No available memory for the cache|KV cache is needed|available KV cache memory",
        "Raise rollout.gpu_memory (or rollout.kv_cache_mib where it is set), or lower "
        "policy.context.",
    ),
    (r"max_model_len", "Lower policy.context."),
    (
        r"[Aa]ddress already in use|EADDRINUSE",
        "Another process took the port in the meantime; start the run again.",
    ),
    (
        r"\bImportError|No module named 'vllm|undefined symbol|shared object|_OpNamespace|"
        r"no kernel image|CUDA driver version|Failed to infer device type",
        "The vllm package does not fit this machine's torch or driver: reinstall it with pip "
        'install --force-reinstall "gft-lite[vllm]", or set rollout.engine=transformers.',
    ),
)
_WRAPPERS = ("Engine core initialization failed", "WorkerProc initialization failed")
_PREFIX = re.compile(r"^\(\w[\w-]* pid=\d+\) (?:[A-Z]+ \S+ \S+ \[[^\]]*\] )?")
_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?(?:\w*(?:Error|Exception)|\w+\.py: error): \S")


def start_failure(what: str, cause: str) -> Exception:
    """The error for a vLLM that `what` (such as "vllm could not start").

    A UserError if the cause is a known one, which has advice; else a RolloutError.
    """
    line = re.sub(r"\s+", " ", re.sub(r"For further information visit \S+", "", cause)).strip()
    line = line if len(line) <= MAX_CAUSE else f"{line[:MAX_CAUSE]} ..."
    text = f"rollout.engine: {what} ({line})."
    for pattern, advice in _KNOWN:
        if re.search(pattern, cause):
            return UserError([f"{text} {advice}"])
    return RolloutError(text)


def describe(error: Exception) -> str:
    """An exception as `start_failure` takes it."""
    return f"{type(error).__name__}: {error}"


def cause_in_log(log: str) -> str | None:
    """The last exception in a server's log that is not just the consequence of another one."""
    lines = [_PREFIX.sub("", line) for line in log.splitlines()]
    for number in range(len(lines) - 1, -1, -1):
        line = lines[number]
        if _EXCEPTION.match(line) and not any(wrapper in line for wrapper in _WRAPPERS):
            # The rule that a value broke is on the next line.
            rule = lines[number + 1 : number + 2] if "ValidationError" in line else []
            return "\n".join([line, *rule])
    return None
