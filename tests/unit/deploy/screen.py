"""A terminal in memory: what is written to it, and what a person sees of that."""

from __future__ import annotations

import io
import re

_TOKEN = re.compile(r"\x1b\[(?P<arguments>[0-9;?]*)(?P<command>[A-Za-z])|(?P<control>[\r\n])|(?P<text>[^\x1b\r\n]+)")


class Screen(io.StringIO):
    """Takes the place of `sys.stderr`. Endless in height and width, so that nothing scrolls or wraps by itself."""

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[str]:
        """The rows as they stand now, without colours and without blanks at their ends."""
        rows, row, column = [""], 0, 0
        for token in _TOKEN.finditer(self.getvalue()):
            text, control, command = token["text"], token["control"], token["command"]
            if text:
                rows[row] = rows[row].ljust(column)[:column] + text + rows[row][column + len(text) :]
                column += len(text)
            elif control == "\r":
                column = 0
            elif control == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif command == "A":
                row = max(0, row - int(token["arguments"] or 1))
            elif command == "K":
                assert token["arguments"] == "2", "rich erases whole lines"
                rows[row] = ""
            else:
                assert command in "mhl", f"a terminal command that this screen does not know: {token[0]!r}"
        return [line.rstrip() for line in rows]
