"""Stop texts in a stream: text is given once it can no longer be the beginning of one."""

from collections.abc import Sequence


class StopMatcher:
    """Ends a stream before the stop text that is complete first; of several that end together, before the longest.

    Time is linear in the stream, whatever the pieces.

    Args:
      stops: the stop texts, none of them empty.

    Attributes:
      held: the end of the stream that may still begin a stop text, not given yet.
      stopped: the stop text that ended the stream; None while none did.
      end: characters of the last piece that were read: all of them, or those up to the end of the stop text.

    Source: Knuth, Morris and Pratt, 1977: of each stop text, how much of it the stream ends in.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self.held = ""
        self.stopped: str | None = None
        self.end = 0

    def feed(self, text: str, *, counts: bool = True) -> str:
        """Takes the stream's next text.

        Args:
          text: any number of characters, none included.
          counts: whether a stop text that is complete within it ends the stream.

        Returns:
          What is now known to stand before any stop text; "" once the stream has ended.
        """
        self.end = 0
        if self.stopped is not None:
            return ""
        for self.end, character in enumerate(text, 1):
            complete = self._read(character)
            if complete and counts:
                self.stopped = complete
                seen, self.held = self.held + text[: self.end], ""
                return seen[: len(seen) - len(complete)]
        seen, length = self.held + text, max(self._matched, default=0)
        self.held = seen[len(seen) - length :]
        return seen[: len(seen) - length]

    def finish(self) -> str:
        """Ends the stream; returns what was held back."""
        held, self.held = self.held, ""
        return held

    def _read(self, character: str) -> str:
        """Goes on by a character; returns the longest stop text that is complete with it, or ""."""
        complete = ""
        for number, (stop, borders) in enumerate(self._stops):
            matched = self._matched[number]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                complete = max(complete, stop, key=len)
                matched = borders[-1]
            self._matched[number] = matched
        return complete


def _borders(stop: str) -> list[int]:
    """Of each beginning of a text, the length of its longest proper end that is its beginning too."""
    borders = [0]
    for character in stop[1:]:
        length = borders[-1]
        while length and stop[length] != character:
            length = borders[length - 1]
        borders.append(length + (stop[length] == character))
    return borders
