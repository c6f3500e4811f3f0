"""`texts:PATH`: the texts of a table, `.csv`, `.tsv`, `.jsonl` or `.parquet`, and their labels if there are some."""

from featcache.corpora import Listed
from featcache.corpora._labels import from_values
from featcache.corpora._options import split_options
from featcache.corpora._tables import read_table, unique_ids
from featcache.disk.urls import is_url

PARTS = ("text", "label", "id")
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")


class Texts(Listed):
    """A text for each row of a table, in its order; other columns are passed over. The table is held in memory.

    Spec: the file's path or URL; the texts are in the column `text`, labels in `label` where there is one, and
    `texts:reviews.csv@text=review@label=stars@id=number` chooses other columns, `@label=` none. A sample's id is what the column
    that is chosen with `@id=` holds, else the row's number from 1, blank lines not counted. Labels are read by one rule,
    `featcache.corpora._labels.from_values`. A missing text is an empty one, which fails when it is extracted.

    Raises:
        ValueError: no such file or column, a row without the header's columns, no text where one should be, an id that is there
            twice; says in which line or row.
    """

    kind = "text"

    def __init__(self, rest: str):
        self.spec = f"texts:{rest}"
        path, options = split_options("texts", rest, PARTS)
        if not path.lower().endswith(ENDINGS):
            raise ValueError(f"{self.spec}: give a table ({', '.join(ENDINGS)}), or lines:{path} for a text a line")
        rows, unit = read_table(path, PARTS, {"id": "", **options}, "table", "text")
        numbers = [number for number, _ in rows]
        for number, (text, _, _) in rows:
            if not isinstance(text, str | None):
                raise ValueError(
                    f"{path}, {unit} {number}: {text!r:.40} is no text; choose a column of texts with @text=COLUMN"
                )
        self._texts = [text or "" for _, (text, _, _) in rows]
        self.labels, self.class_names = from_values([label for _, (_, label, _) in rows], path)
        by_id = options.get("id")
        self.ids = (
            unique_ids([each for _, (_, _, each) in rows], numbers, path, unit)
            if by_id
            else list(map(str, range(1, len(rows) + 1)))
        )

    def read(self, i: int) -> bytes:
        return self._texts[i].encode("utf-8", "surrogatepass")


open_corpus = Texts


def named_files(rest: str) -> list[str] | None:
    path = split_options("texts", rest, PARTS)[0]
    return None if is_url(path) else [path]
