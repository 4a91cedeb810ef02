"""Responses that end by their text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Ended = Callable[[Sequence[int], int], int | None]
"""(tokens of a response, how many of them are known not to end it) -> where it ends, in tokens, or None."""

MARGIN = 8
"""Tokens before the ones that can matter, so that a decoder's care for the start of a text does not touch those."""


def ended_by(stops: Sequence[str], decode: Callable[[Sequence[int]], str]) -> Ended:
    """A response ends with the first token after which its text has one of `stops`.

    Only the end of a response is decoded: a token of a text has a byte or more, so a stop string of b bytes that ends
    in a new token begins at most b tokens before it.
    """
    reach = max(len(stop.encode()) for stop in stops) + MARGIN

    def ended(tokens: Sequence[int], old: int) -> int | None:
        first = max(0, old - reach)

        def has_stop(end: int) -> bool:
            text = decode(tokens[first:end])
            return any(stop in text for stop in stops)

        if not has_stop(len(tokens)):
            return None
        return next((end for end in range(old + 1, len(tokens) + 1) if has_stop(end)), None)

    return ended
