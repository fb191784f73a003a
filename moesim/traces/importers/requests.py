"""Requests put together again from positions, where an engine recorded no request ids."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import InputError


@dataclass(eq=False)
class _Open:
    """A request that may go on: its number, the position of its next token, whether it has decoded."""

    request: int
    next: int
    decoding: bool = False


class RequestTracker:
    """Gives each token of a pass a request: the open one whose next position it is, in the order of the batch.

    Attributes:
        request, position, phase, step: one entry per token so far.
    """

    def __init__(self) -> None:
        self.request: list[int] = []
        self.position: list[int] = []
        self.phase: list[int] = []
        self.step: list[int] = []
        self._open: list[_Open] = []  # in the order of the running batch
        self._count = 0
        self._ambiguous = 0
        self._headless = 0

    def new_source(self) -> None:
        """Close every request: what follows is another rank's."""
        self._open = []

    def decode_pass(self, positions: list[int], phase: int, step: int) -> None:
        """Track a pass of one token per request.

        A running batch keeps its order: requests that end drop out, new ones join at the end. So a row goes to the
        first open request at or after its predecessor's whose next position it is. Requests that decoded before and
        are not in this pass have ended; prompts under way stay open.
        """
        taken: list[_Open] = []
        start = 0
        for position in positions:
            fitting = [place for place in range(start, len(self._open)) if self._open[place].next == position]
            if fitting:
                self._ambiguous += len(fitting) > 1
                entry, start = self._open[fitting[0]], fitting[0] + 1
            else:
                entry = self._new(position)
            self._add(entry, 1, phase, step)
            entry.decoding = True
            taken.append(entry)
        self._open = taken + [entry for entry in self._open if not entry.decoding]

    def extend_pass(self, positions: list[int], lengths: list[int], prefill: int, decode: int, step: int,
                    where: str) -> None:
        """Track a pass of stretches of prompts (and, mixed in, single tokens of running requests).

        Raises:
            InputError: positions of a stretch that do not rise by one.
        """
        place = 0
        used: list[_Open] = []
        for length in lengths:
            first = positions[place]
            if positions[place:place + length] != list(range(first, first + length)):
                raise InputError(f"{where}: positions of a stretch of {length} tokens do not rise by one from {first}")
            place += length
            fitting = [entry for entry in self._open if first and entry.next == first and entry not in used]
            self._ambiguous += len(fitting) > 1
            entry = fitting[0] if fitting else self._new(first)
            self._add(entry, length, decode if fitting and length == 1 else prefill, step)
            used.append(entry)
        self._open += [entry for entry in used if entry not in self._open]

    def notes(self) -> tuple[str, ...]:
        """Return what had to be assumed."""
        lines = [f"the recorder stores no request ids: {self._count} requests are put together from positions"]
        if self._ambiguous:
            lines.append(f"{self._ambiguous} times several open requests were at the same position: the order of the "
                         f"batch decided, so neighbours in time may be of different requests")
        if self._headless:
            lines.append(f"{self._headless} requests do not start at position 0 (cached prefix, or begun before the "
                         f"recording)")
        return tuple(lines)

    def _new(self, position: int) -> _Open:
        self._headless += position > 0
        self._count += 1
        return _Open(self._count - 1, position)

    def _add(self, entry: _Open, length: int, phase: int, step: int) -> None:
        first = entry.next
        self.request += [entry.request] * length
        self.position += range(first, first + length)
        self.phase += [phase] * length
        self.step += [step] * length
        entry.next = first + length
