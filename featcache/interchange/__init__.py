"""Import and export: a store as the files that other programs read, and their files as a store.

What an export looks like, N rows, V views, D-d embeddings; with one view the V axis is left out:

    npy             a folder: embedding.npy (N, V, D), logits.npy …, label.npy, content.npy, view.npy, state.npy;
                    sample_id.txt and reason.txt, a line a row (\\\\ \\n \\r stand for backslash and line breaks)
    parquet         one file, a row a sample: embedding (view 0), embedding_1 (view 1) …, label, class_name,
                    sample_id, content, view, state, reason
    safetensors     one file: the same tensors; the strings are JSON in its metadata
    lance           a folder, a Lance dataset (LanceDB's table) with the columns of parquet
    hf-dataset      a folder: data/train-00000-of-00001.parquet …, the columns of parquet, label as ClassLabel;
                    manifest.json; README.md, the dataset card: what `datasets.load_dataset` opens
    embedding-atlas one file OUT.parquet, to be looked at: sample_id, image, label, class_name, projection_x,
                    projection_y, neighbors, embedding (float32)
    fiftyone        a folder, to be looked at: metadata.json, samples.json, data/
    clip-retrieval  a folder: img_emb/img_emb_0000.npy …, metadata/metadata_0000.parquet … (image_path, sample_id,
                    label, class_name, content, view), in text order, as clip-retrieval and embedding-reader have it

All of them carry the store's manifest with a checksum of every array, so that coming back is exact: the store
imported from npy, parquet, hf-dataset, safetensors or lance has the same bytes as the store exported. clip-retrieval's layout holds one
embedding a row and nothing of failed rows, and promises unit vectors; what it cannot hold is left out and named.
What is to be looked at holds view 0 of rows with features, and is not read again, but that a .parquet with embeddings is.

Formats are plugins: other packages add theirs through the entry-point group `featcache.interchange`.

Features stream; ids, labels and reasons are held in memory, as a `FeatureStore` does.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from featcache.corpora import Corpus
from featcache.disk.durable import appearing, refuse_taken
from featcache.disk.home import writable_home
from featcache.disk.refusals import refuse_unmakeable, writing
from featcache.disk.urls import is_url
from featcache.interchange._arrays import STRINGS, Arrays, Checksums, Source, layout
from featcache.interchange._dataset_card import dataset_card
from featcache.interchange._foreign import fitting_layout, foreign_unit, of_arrays
from featcache.interchange._own import manifest_text, own_unit, parse_manifest, refuse_unit
from featcache.interchange._pictures import NONE, Pictures
from featcache.plugins import load_plugin, only_class, plugin_names
from featcache.public import secret_in
from featcache.repository import CARD, Pushed, Repository, fetch_folder, push_folder, require_token
from featcache.store import FeatureStore, create_store, open_store
from featcache.store.from_arrays import checked_ids
from featcache.store.layout import DTYPES
from featcache.store.manifest import Manifest

__all__ = [
    "Arrays",
    "Checksums",
    "ExportedStore",
    "Format",
    "Pictures",
    "Source",
    "export_store",
    "format_of",
    "import_store",
    "layout",
    "load_format",
    "manifest_text",
    "names",
    "of_arrays",
    "parse_manifest",
    "preview_export",
    "preview_import",
    "preview_push",
    "push_store",
]

AGAIN = "run the same command again"
HUB = "hf:"
HUB_FORMAT = "hf-dataset"


class Format:
    """Files of one layout. A file here defines one, and is registered under its own name, a "-" for each "_"; nothing
    heavy is imported at its top.

    Attributes:
        folder: whether it writes a folder rather than a file.
        ending: what the name of an export has to end with, for the program that opens it.
        reads: what of other programs it reads, in words; "" where it is only written, to be looked at.
        shows: whether it holds images to be looked at: "" for no, "wanted", or "needed".
        pictures: of the store that is written; None where none are shown. Set before `write`.
        by_chance: why two exports of one store differ in their bytes, in words; "" where they do not.
    """

    folder: ClassVar[bool] = False
    ending: ClassVar[str] = ""
    reads: ClassVar[str] = ""
    shows: ClassVar[Literal["", "wanted", "needed"]] = ""
    by_chance: ClassVar[str] = ""
    pictures: Pictures | None = None

    def recognises(self, path: Path, head: bytes) -> bool:
        """Whether what is at `path`, a folder or a file with `head` as its first bytes (9 at most), is of it."""
        raise NotImplementedError

    def require(self, path: Path) -> None:
        """Raises ValueError, of `path`, where it cannot be read or written here: a package is missing."""

    def write(self, store: FeatureStore, units: Iterator[Arrays], out: Path, *, as_is: bool) -> None:
        """Make `out`, which is not there yet.

        Args:
            units: the arrays of each unit of the store in turn, by name, strings as objects.
            as_is: keep the lengths of embeddings; of formats that would make them 1.

        Raises:
            ValueError: it cannot hold this store.
        """
        raise NotImplementedError

    def rows(self, store: FeatureStore) -> int:
        """How many samples of the store it holds."""
        return len(store)

    def left_out(self, store: FeatureStore, *, as_is: bool) -> list[str]:
        """What it does not hold of the store, in words."""
        return ["the kept images"] if store.manifest.pixels else []

    def opened_by(self, store: FeatureStore, out: Path) -> str:
        """How the program is started on the export, to be pasted; "" where there is nothing to say."""
        return ""

    def read(self, path: Path) -> Source:
        """What is there: an export, with its manifest, or what another program wrote.

        Raises:
            ValueError: it is damaged, or lacks what a store needs.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ExportedStore:
    """What an export wrote.

    Attributes:
        path: where it is.
        rows: samples in it, failed ones included where the format holds them.
        left_out: what the format could not hold, in words; empty when coming back is exact.
        opened_by: how the program that it is for is started on it; "" where there is nothing to say.
    """

    path: Path
    rows: int
    left_out: list[str]
    opened_by: str = ""


def names() -> list[str]:
    """The registered formats, sorted."""
    return sorted(name.replace("_", "-") for name in plugin_names(__name__))


def load_format(name: str) -> Format:
    """The format of that name. Raises ValueError, with near names, when there is none."""
    return only_class(load_plugin(__name__, name.replace("-", "_")), Format)()


def export_store(
    store: FeatureStore | str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    *,
    as_is: bool = False,
    images: str | Corpus | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExportedStore:
    """Write a sealed store as `format`; it appears at `out` whole, or not at all.

    Args:
        store: sealed, or its path or URL.
        out: a local path.
        format: one of `names()`; the module says what each holds.
        as_is: keep the embeddings as they are in a clip-retrieval folder too, where the default is unit length,
            for programs that search by inner product. The other formats always keep them.
        images: of formats that show some: the corpus with the images of the store, or its spec, "none" for none; by default
            those that the store keeps, or else the corpus that it was made of.
        progress: called with rows done and rows in all, as each chunk is read.

    Raises:
        ValueError: `out` exists, the store is not sealed, the format cannot hold it, or its images are not to be had.
    """
    of, store = _exported(store, out, format, images)
    with writing(out, AGAIN, "OUT"), appearing(_local(out), folder=of.folder) as building:
        of.write(store, _units(store, progress), building, as_is=as_is)
    left_out, opened_by = of.left_out(store, as_is=as_is), of.opened_by(store, Path(out))
    return ExportedStore(Path(out), of.rows(store), left_out, opened_by)


def preview_export(
    store: FeatureStore | str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    *,
    as_is: bool = False,
    images: str | Corpus | None = None,
) -> ExportedStore:
    """What `export_store` would write; refused as it would be, but for what a format finds it cannot hold while it reads
    the rows. Nothing is written."""
    of, store = _exported(store, out, format, images)
    with writing(out, AGAIN, "OUT"):
        refuse_unmakeable(refuse_taken(_local(out), folder=of.folder).parent)
    left_out, opened_by = of.left_out(store, as_is=as_is), of.opened_by(store, Path(out))
    return ExportedStore(Path(out), of.rows(store), left_out, opened_by)


def _exported(
    store: FeatureStore | str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    images: str | Corpus | None,
) -> tuple[Format, FeatureStore]:
    """The format and the open store. Raises ValueError where it cannot be exported so."""
    if format not in names():
        raise ValueError(f"--format {format}: unknown; known: {', '.join(names())}")
    of, store = load_format(format), store if isinstance(store, FeatureStore) else open_store(store)
    if not store.sealed:
        store = open_store(store.path)  # raises, and says how to finish it
    if store.manifest.top_k:
        kept = ", ".join(f"{k} largest {name}" for name, k in store.manifest.top_k.items())
        raise ValueError(
            f"{store.path} keeps the {kept} only, which no format holds; extract without --top-k to export"
        )
    if not str(out).endswith(of.ending):
        raise ValueError(f"{out}: what {format} opens ends with {of.ending}; give {out}{of.ending}")
    of.require(Path(out))
    of.pictures = _pictures(store, format, of.shows, images)
    return of, store


def _pictures(store: FeatureStore, format: str, shows: str, images: str | Corpus | None) -> Pictures | None:
    if not shows and images is not None:
        raise ValueError(f"--images: {format} shows no images; leave it out")
    if shows == "needed" and images == NONE:
        raise ValueError(f"--images {NONE}: {format} is made of images; give the corpus that has them")
    return None if not shows or images == NONE else Pictures(store, images)


def import_store(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    encoder_name: str | None = None,
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> FeatureStore:
    """Make a sealed store from an export, or from embeddings that another program made.

    `src` is known by its contents: a folder or file that `export_store` wrote; a .npy of (N, D); a folder with
    embedding.npy and, if there, label.npy and sample_id.txt; a .parquet with a column `embedding` (lists of
    floats) and, if there, `label` (numbers, or names), `class_name` (of numbers, their names), and `sample_id` or `image_path`; a
    .safetensors with a tensor `embedding` and, if there, `label`; a Lance dataset with the columns that a .parquet has; a
    folder that clip-retrieval wrote; a folder of such .parquet files, as data sets of Hugging Face are, and
    `hf:USER/NAME[@REVISION]`, one on the hub. Other columns,
    captions among them, have no place in a store. Rows without an id are numbered.

    Fingerprint: stores compare only when theirs are equal. An export keeps the one of its store. Anything else gets
    one of `encoder_name` and D, so that two imports under one name compare: give a bank and its queries the name of
    the model that made both. Without a name it is that of the embeddings themselves, and compares with no others.

    dtype: what to keep embeddings in, as in `write_store`; an export says it itself.

    Raises:
        ValueError: `out` exists, or `src` is none of these, is damaged, pickled, of the wrong shape or dtype, holds
            NaN or infinity or a value beyond the dtype; nothing is left at `out`.
    """
    _refuse_dtype(dtype)
    with writing(out, AGAIN, "STORE"), appearing(_local(out), folder=True) as building:
        path, source, manifest, export = _imported(str(src), encoder_name, dtype)
        store = create_store(building, manifest)
        manifest = store.manifest
        embeddings = _filled(manifest, source, path, export and export["crc32c"], store.write_chunk, progress)
        if not export:
            named = hashlib.blake2b(f"{encoder_name}\0{store.embedding_dim}".encode(), digest_size=16).hexdigest()
            fingerprint = f"imported:{embeddings if encoder_name is None else named}"
            encoder = manifest.encoder.changed(name=encoder_name or "imported", fingerprint=fingerprint)
            manifest = manifest.changed(encoder=encoder)
        store.seal(manifest)
    return open_store(out)


def preview_import(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    encoder_name: str | None = None,
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """What the store would say of itself that `import_store` would make. All of `src` is read, and refused as it would be;
    nothing is written."""
    _refuse_dtype(dtype)
    with writing(out, AGAIN, "STORE"):
        refuse_unmakeable(refuse_taken(_local(out), folder=True).parent)
        path, source, manifest, export = _imported(str(src), encoder_name, dtype)
        _filled(manifest, source, path, export and export["crc32c"], lambda chunk, unit: None, progress)
    return manifest


def _refuse_dtype(dtype: str) -> None:
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"--dtype {dtype}: unknown; known: auto, {', '.join(DTYPES)}")


def _imported(src: str, encoder_name: str | None, dtype: str) -> tuple[Path, Source, Manifest, dict[str, Any] | None]:
    """Where `src` is here, and what; what its store will say of itself; and, of an export, its own record.

    Raises:
        ValueError: as `import_store`.
    """
    path = _fetched(src) if src.startswith(HUB) else _local(src)
    format = format_of(path)
    format.require(path)
    source = format.read(path)
    export, manifest = source.manifest.other.get("export"), source.manifest.without("export")
    if export and encoder_name is not None:
        name = manifest.encoder.name
        raise ValueError(f"{src}: it says itself which encoder made it ({name}); leave --encoder out")
    if export and dtype != "auto":
        raise ValueError(f"{src}: comes back in the dtype it was exported in; leave --dtype out")
    if source.rows != manifest.corpus.rows:
        raise ValueError(f"{src}: {source.rows} rows, {manifest.corpus.rows} when it was exported; export again")
    if not export:
        manifest = manifest.changed(**fitting_layout(source, path, dtype))
        if src.startswith(HUB):
            pinned = f"{src.partition('@')[0]}@{path.name}"
            manifest = manifest.changed(extraction=manifest.extraction.changed(imported=pinned))
    return path, source, manifest, export


def push_store(
    store: FeatureStore | str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    revision: str = "",
    message: str = "",
    licence: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Pushed:
    """Push a sealed store to the Hugging Face hub, as data set `USER/NAME`: what `export_store` writes as `hf-dataset`, which
    `datasets.load_dataset` opens, and `import_store("hf:USER/NAME")` brings back bit for bit. It is written under
    $FEATCACHE_HOME first, and needs that room. Its manifest goes as it is, with the paths that corpus and encoder were given by.

    Args:
        repository: USER/NAME; made where there is none, visible to you alone with `private`.
        revision: a branch, made where there is none; main when "".
        message: of the commit.
        licence: for the card's metadata, as the hub names it; the terms of images and teacher may bind you.
        overwrite: replace another store that is there, by a new commit.
        progress: see `export_store`.

    Raises:
        ValueError, ConnectionError: see `export_store`, `featcache.repository.push_folder`; or a text of the store holds a
            secret.
    """
    place, store = preview_push(store, repository, revision=revision)
    room = writable_home("pushing")
    room.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=room) as around:
        folder = export_store(store, Path(around) / "store", HUB_FORMAT, progress=progress).path
        (folder / CARD).write_text(dataset_card(store, str(place)), encoding="utf-8")
        return push_folder(
            folder,
            place,
            owned=("data/train-*.parquet", "manifest.json"),
            private=private,
            message=message or f"{store.encoder_name}, {len(store):,} rows",
            licence=licence,
            overwrite=overwrite,
        )


def preview_push(
    store: FeatureStore | str | os.PathLike[str], repository: str, *, revision: str = ""
) -> tuple[Repository, FeatureStore]:
    """Where `push_store` would push, and the open store; refused as it would be, but for what the hub alone knows. Nothing is
    written, and the hub not asked."""
    place = Repository.parse(f"{repository}@{revision}" if revision else repository, "dataset")
    store = _exported(store, place.name, HUB_FORMAT, None)[1]
    require_token(place)
    _refuse_secrets(store)
    return place, store


def _refuse_secrets(store: FeatureStore) -> None:
    """Raises ValueError where a text of the store holds one: what is pushed cannot be taken back."""
    found = (
        (f"{name} of its manifest", secret_in(json.dumps(each))) for name, each in store.manifest.to_json().items()
    )
    for where, secret in (*found, *_secrets_of_rows(store)):
        if secret:
            raise ValueError(
                f"{store.path}: {where} would tell {secret}; nothing is pushed: keep credentials in the environment, and make it anew"
            )


def _secrets_of_rows(store: FeatureStore) -> Iterator[tuple[str, str]]:
    """The first of each column of texts: where, and what it is."""
    for name in STRINGS:
        texts = store.read(name).tolist()
        for start in range(0, len(texts), 10_000):
            part = texts[start : start + 10_000]
            if secret := secret_in("\n".join(part)):
                row = next((row for row, text in enumerate(part, start) if secret_in(text)), start)
                yield f"{name} of row {row}", secret
                break


def _fetched(src: str) -> Path:
    """The folder in the hub's cache that a data set on the hub is fetched to."""
    of, patterns = Repository.parse(src.removeprefix(HUB), "dataset"), ("*.parquet", "manifest.json")
    folder = fetch_folder(of, src, patterns, (), failed="the data set cannot be had", remedy="or give a folder")
    if not any(folder.rglob("*.parquet")):
        raise ValueError(f"{src}: holds no .parquet files; give a data set that has them, with a column `embedding`")
    return folder


def _filled(
    manifest: Manifest,
    source: Source,
    path: Path,
    crc32c: Mapping[str, str] | None,
    write: Callable[[int, Arrays], object],
    progress: Callable[[int, int], None] | None,
) -> str:
    """Write every unit of `source` by its number; returns a digest of the embeddings.

    Args:
        crc32c: of every array, where the source is an export.

    Raises:
        ValueError: as `import_store`.
    """
    ids, whole, per_chunk = list[str](), manifest.corpus.rows, manifest.chunk_rows
    wrong: ValueError | None = None
    sums, embeddings = Checksums(), hashlib.blake2b(digest_size=16)
    for chunk, block in enumerate(source.blocks(manifest.chunk_rows)):
        rows = range(chunk * per_chunk, min((chunk + 1) * per_chunk, whole))
        of = foreign_unit if crc32c is None else own_unit
        unit = of(block, rows, manifest, path)
        ids += unit["sample_id"].tolist()
        try:
            refuse_unit(unit, rows, manifest, path)
        except ValueError as error:  # more is known of it when all has been read
            wrong = wrong or error
        sums.update(unit)
        embeddings.update(unit["embedding"].tobytes())
        write(chunk, unit)
        if progress:
            progress(rows.stop, whole)
    if changed := sorted(name for name, crc in (crc32c or {}).items() if sums.to_dict().get(name) != crc):
        raise ValueError(
            f"{path}: {', '.join(changed)} changed since the export; export again, or take the manifest away "
            "and import it under an --encoder name of its own"
        )
    if wrong:
        raise wrong
    checked_ids(path, ids, whole)
    return embeddings.hexdigest()


def _local(path: str | os.PathLike[str]) -> Path:
    if is_url(str(path)):
        raise ValueError(
            f"{path}: files are imported and exported here; give a local path, and copy what it is or gets"
        )
    return Path(path)


def _units(store: FeatureStore, progress: Callable[[int, int], None] | None) -> Iterator[Arrays]:
    """Every array of each chunk in turn, read with its checksum verified."""
    names = [*layout(store.manifest), *STRINGS]
    for chunk in range(store.chunks):
        rows = store.rows_of(chunk)
        unit = {name: store.read(name, rows.start, rows.stop) for name in names}
        if progress:
            progress(rows.stop, len(store))
        yield {name: array.astype(object) if name in STRINGS else array for name, array in unit.items()}


def format_of(path: Path) -> Format:
    """The format of what is at `path`, known by its contents.

    Raises:
        ValueError: no format recognises it.
    """
    formats = [each for name in names() if (each := load_format(name)).reads]
    head = b""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(9)
    for each in formats:
        if path.exists() and each.recognises(path, head):
            return each
    *others, last = ["an export", *(each.reads for each in formats)]
    known = f"{', '.join(others)} or {last}"
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; give {known}")
    if (path / "zarr.json").is_file():
        raise ValueError(f"{path}: already a Zarr group; open a store as it is")
    if head.startswith((b"\x80", b"PK")):
        raise ValueError(f"{path}: a pickle or an archive, which is never opened; save its array with numpy.save")
    raise ValueError(f"{path}: not a {'folder' if path.is_dir() else 'file'} that can be imported; give {known}")
