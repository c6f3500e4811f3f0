"""`lines:PATH`: a text a line."""

from featcache.corpora import Listed
from featcache.disk.plain import read_plain


class Lines(Listed):
    """The lines of a file, each a text without a label; its id is its number in the file, from 1. A blank line fails.

    Raises:
        ValueError: there is no such file, or it is empty or binary.
    """

    kind = "text"
    class_names = None

    def __init__(self, path: str):
        self.spec = f"lines:{path}"
        try:
            content = read_plain(path)
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; give lines:PATH of a text file") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); make it a readable file") from None
        if not content.strip() or b"\0" in content:
            what = "holds NUL characters, as binary files do" if content.strip() else "is empty"
            raise ValueError(f"{path}: {what}; give a file with a text in every line")
        self._lines = content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
        self.ids = [str(number + 1) for number in range(len(self._lines))]
        self.labels = [-1] * len(self._lines)

    def read(self, i: int) -> bytes:
        return self._lines[i].removesuffix(b"\r")


def open_corpus(rest: str) -> Lines:
    return Lines(rest)


def named_files(rest: str) -> list[str]:
    return [rest]
