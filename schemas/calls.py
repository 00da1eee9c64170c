"""What one attempt says to the model, and the most it can be charged for.

The prefix comes first and is the same bytes each time; the document's text is the whole second message; what a
repair adds comes after both, so that it cannot break the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from schemas.attempts import Call, Message, RunId
from schemas.jobs import Job
from schemas.ladder import Position, Verdict

#: A byte-level BPE token covers at least one byte, so bytes bound tokens for every tokenizer of that family,
#: V4.1's own included. Chat templates and JSON mode add a few tokens that we do not see.
TEMPLATE_TOKENS = 64
TEMPLATE_TOKENS_PER_MESSAGE = 16
#: DeepSeek's context, in tokens. No real text has more bytes per token than this, so a longer one cannot fit.
CONTEXT_TOKENS = 1_000_000
BYTES_PER_TOKEN_AT_MOST = 8
#: A truncated answer gets this many times the tokens, once.
MORE_TOKENS = 2

NUDGE = "The last reply was empty. Answer now, with the JSON object only."


@dataclass(frozen=True, slots=True)
class RejectedAnswer:
    """An answer that did not pass, and why, in words the model can act on."""

    content: str
    problems: tuple[str, ...]


def attempt_key(run_id: RunId, document_no: int, attempt_no: int) -> str:
    """`run.document.attempt`: the ledger row's key as one word."""
    return f"{run_id}.{document_no}.{attempt_no}"


def compose(job: Job, text: str, position: Position, rejected: RejectedAnswer | None, key: str) -> Call:
    """The call that `position` asks for. `rejected` is the answer to repair, where there is one."""
    tier = job.ladder[position.rung]
    messages = [Message("system", job.prefix), Message("user", text)]
    parameters = tier.parameters(job.user_id)
    match position.amends:
        case Verdict.INVALID_ANSWER if rejected is not None:
            messages += [Message("assistant", rejected.content), Message("user", _ask_again(rejected))]
        case Verdict.INVALID_ANSWER | Verdict.BLANK:
            messages.append(Message("user", NUDGE))
        case Verdict.TRUNCATED:
            parameters["max_tokens"] = max_tokens(job, position)
        case _:
            pass
    return Call(tier.model, tuple(messages), parameters, tier.deadline_s, key)


def max_tokens(job: Job, position: Position) -> int:
    """The output bound of the next attempt, in tokens."""
    tier = job.ladder[position.rung]
    return tier.max_tokens * (MORE_TOKENS if position.amends is Verdict.TRUNCATED else 1)


def input_bound(call: Call) -> int:
    """The most input tokens the provider can bill for this call."""
    size = sum(len(message.content.encode("utf-8", "replace")) for message in call.messages)
    return size + TEMPLATE_TOKENS + TEMPLATE_TOKENS_PER_MESSAGE * len(call.messages)


def is_too_large(job: Job, text: str) -> bool:
    """Whether prefix and text cannot fit the context, so that sending them could only be refused."""
    most = CONTEXT_TOKENS * BYTES_PER_TOKEN_AT_MOST
    if len(text) * 4 < most // 2:  # four bytes at most per character: spares encoding nearly every text
        return False
    return len(job.prefix.encode()) + len(text.encode("utf-8", "replace")) > most


def _ask_again(rejected: RejectedAnswer) -> str:
    problems = "\n".join(f"- {problem}" for problem in rejected.problems)
    return f"That answer is not valid:\n{problems}\nAnswer again with the corrected JSON object only."
