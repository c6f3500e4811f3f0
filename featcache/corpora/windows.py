"""`windows:PATH`: pieces of one long text, of a number of bytes."""

from featcache.corpora import Listed
from featcache.corpora._options import split_options
from featcache.corpora._tables import decoded, read_file
from featcache.disk.urls import is_url

PARTS = ("length", "stride")
LENGTH = 256


class Windows(Listed):
    """Of a UTF-8 text file the bytes from each multiple of `stride` on, `length` of them, until the end: the last piece may be
    shorter. Spec: `windows:book.txt@length=256@stride=128`; by default 256 bytes, each once (a stride of the length).

    A piece neither begins nor ends within a character: where it would, both move back to where that begins, so that pieces of
    a text with other characters than ASCII's have up to 3 bytes more or fewer, and none is lost. Line ends stay as they are. A
    piece's id is where it begins, in bytes from 0; a byte order mark is not part of the text.

    Raises:
        ValueError: no such file, no UTF-8, nothing in it; or a length or stride that is no whole number, the stride from 1 to the length.
    """

    kind = "text"
    class_names = None

    def __init__(self, rest: str):
        self.spec = f"windows:{rest}"
        path, options = split_options("windows", rest, PARTS)
        given = {name: options.get(name, options.get("length", str(LENGTH))) for name in PARTS}
        if not all(value.isdecimal() for value in given.values()):
            raise ValueError(f"{self.spec}: give whole numbers, as @length=256@stride=128")
        length, stride = int(given["length"]), int(given["stride"])
        if not 1 <= stride <= length:
            raise ValueError(f"{self.spec}: give a stride from 1 to the length, {length}; nothing is to be left out")
        self._text = decoded(read_file(path, "text file"), path, "file").encode()
        if not self._text.strip() or b"\0" in self._text:
            what = "holds NUL characters, as binary files do" if self._text.strip() else "is empty"
            raise ValueError(f"{path}: {what}; give a file of text")
        last = max(0, len(self._text) - length + stride - 1) // stride  # the first that reaches the end
        spans = {self._whole(at * stride): self._whole(at * stride + length) for at in range(last + 1)}
        self._spans = [(start, end) for start, end in spans.items() if end > start]
        self.ids = [str(start) for start, _ in self._spans]
        self.labels = [-1] * len(self.ids)

    def _whole(self, at: int) -> int:
        """The place of the character that the byte at this place is of."""
        while at < len(self._text) and self._text[at] & 0xC0 == 0x80:
            at -= 1
        return min(at, len(self._text))

    def read(self, i: int) -> bytes:
        start, end = self._spans[i]
        return self._text[start:end]


open_corpus = Windows


def named_files(rest: str) -> list[str] | None:
    path = split_options("windows", rest, PARTS)[0]
    return None if is_url(path) else [path]
