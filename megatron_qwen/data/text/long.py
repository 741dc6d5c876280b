"""Documents too long to hold as one string: Python would take up to four bytes for every character."""

import re
from collections.abc import Iterator

import orjson

# A line or a text file above this size is not turned into one string.
LONG_BYTES = 16 << 20
_PART_BYTES = 1 << 20
# Qwen2's pre-tokenizer always splits between a line end and a letter, so cutting a text there does not change its
# tokens (``encoder.py``).
_CUT = re.compile(rb"\n(?=[A-Za-z])")
_ESCAPED_CUT = re.compile(rb"\\n(?=[A-Za-z])")
_BACKSLASH = ord("\\")
_STANDS_FOR = "\0long string "


class LongText:
    """The UTF-8 bytes of a text, plain or escaped as in JSON.

    Args:
        raw: the bytes.
        escaped: whether they are the inside of a JSON string.
    """

    def __init__(self, raw: memoryview, *, escaped: bool) -> None:
        self.raw, self.escaped = raw, escaped

    def parts(self) -> Iterator[str]:
        """The text in parts that can be encoded one by one.

        Raises:
            ValueError: it is not UTF-8, or not JSON.
        """
        start = 0
        while start < len(self.raw):
            end = self._cut(start)
            piece = self.raw[start:end]
            yield orjson.loads(b'"' + bytes(piece) + b'"') if self.escaped else bytes(piece).decode()
            start = end

    def text(self) -> str:
        """The whole text, for a caller that cannot use parts."""
        return "".join(self.parts())

    def check(self) -> None:
        """Raises ValueError if ``parts`` would."""
        for _ in self.parts():
            pass

    def _cut(self, start: int) -> int:
        """The first place to cut after _PART_BYTES; the end of the text if there is none."""
        pattern = _ESCAPED_CUT if self.escaped else _CUT
        position = start + _PART_BYTES
        while position < len(self.raw) and (found := pattern.search(self.raw, position)) is not None:
            if not self.escaped or _backslashes_before(self.raw, found.start()) % 2 == 0:
                return found.end()
            position = found.end()
        return len(self.raw)


def take_apart(line: bytearray) -> tuple[bytes, dict[str, LongText]]:
    """Splits a long JSON line into a short line and its long strings.

    Args:
        line: one record.

    Returns:
        The line with each long string replaced by a short name, and the long strings by name.
    """
    view, kept = memoryview(line), bytearray()
    found: dict[str, LongText] = {}
    position = copied = 0
    while (begin := line.find(b'"', position)) >= 0:
        end = _string_end(line, begin)
        if end < 0:
            break
        if end - begin > LONG_BYTES // 4:
            name = f"{_STANDS_FOR}{len(found)}"
            found[name] = LongText(view[begin + 1 : end], escaped=True)
            kept += line[copied:begin] + orjson.dumps(name)
            copied = end + 1
        position = end + 1
    return bytes(kept + line[copied:]), found


def _string_end(line: bytearray, begin: int) -> int:
    """Index of the quote that ends the string beginning at ``begin``; -1 if there is none."""
    end = line.find(b'"', begin + 1)
    while end >= 0 and line[end - 1] == _BACKSLASH and _backslashes_before(line, end) % 2:
        end = line.find(b'"', end + 1)
    return end


def _backslashes_before(line: "bytearray | memoryview", position: int) -> int:
    count = 0
    while position - count > 0 and line[position - count - 1] == _BACKSLASH:
        count += 1
    return count
