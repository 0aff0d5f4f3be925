"""Search in a collection of your own: BM25 (the library bm25s) over passages or over captions of images."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import DataError
from ...media import load_image
from .search import SearchHit

TEXT_SUFFIXES = (".txt", ".md", ".rst")
PASSAGE_CHARACTERS = 1500  # ours: longer texts of a folder are split at paragraphs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    hit: SearchHit
    image_path: Path | None = None


class CorpusSearch:
    """A BM25 index in memory. Make it with `from_texts`, `from_jsonl`, `from_folder` or `from_captions`.

    Scores are Lucene's variant of BM25 with k1 = 1.5, b = 0.75 (the library's defaults), English stop words left out.
    Entries that share no word with the query are not returned.
    """

    def __init__(self, entries: Sequence[_Entry]) -> None:
        if not entries:
            raise DataError("the corpus is empty. Expected at least one text.")
        self._bm25s = _library()
        self._entries = list(entries)
        words = [f"{entry.hit.title}\n{entry.hit.text}" for entry in entries]
        self._index = self._bm25s.BM25()
        self._index.index(self._tokens(words), show_progress=False)

    def __len__(self) -> int:
        """How many passages or images can be found."""
        return len(self._entries)

    @classmethod
    def from_texts(cls, texts: Iterable[tuple[str, str]]) -> "CorpusSearch":
        """Index (title, text) pairs."""
        return cls([_Entry(hit=SearchHit(title=title, text=text)) for title, text in texts])

    @classmethod
    def from_jsonl(cls, path: str | Path) -> "CorpusSearch":
        """Index rows {"text": ..., "title": ..., "source": ...}, of which only "text" must be there.

        Raises:
            DataError: no such file, or a row without a text; the message names it.
        """
        return cls(
            [
                _Entry(hit=SearchHit(title=_text(row, "title"), text=str(row["text"]), source=_text(row, "source")))
                for row in _rows(Path(path), "text")
            ]
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> "CorpusSearch":
        """Index every .txt, .md and .rst file below a folder, long ones in passages.

        Raises:
            DataError: no such folder, or nothing in it.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder. Expected one with text files to search.")
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
        return cls(
            [
                _Entry(hit=SearchHit(title=file.stem, text=passage, source=str(file.relative_to(folder))))
                for file in files
                for passage in split_passages(file.read_text(encoding="utf-8", errors="replace"))
            ]
        )

    @classmethod
    def from_captions(cls, path: str | Path) -> "CorpusSearch":
        """Index images by rows {"image": path relative to the file, "caption": ..., "title": ...}; opened when found.

        Raises:
            DataError: no such file, a row without image or caption, or an image that is not there.
        """
        path = Path(path)
        entries = []
        for number, row in enumerate(_rows(path, "caption", "image")):
            image = path.parent / str(row["image"])
            if not image.is_file():
                raise DataError(f"{path}: row {number} names the image {image}, which is not there.")
            hit = SearchHit(title=_text(row, "title"), text=str(row["caption"]), source=str(row["image"]))
            entries.append(_Entry(hit=hit, image_path=image))
        return cls(entries)

    def search(self, query: str, limit: int) -> list[SearchHit]:
        """The best entries for the words of `query`; safe to call from several threads.

        Raises:
            ProcessorError: an image that was found cannot be opened.
        """
        tokens = self._tokens([query], as_words=True)
        if not tokens[0]:
            return []
        places, scores = self._index.retrieve(tokens, k=min(limit, len(self._entries)), show_progress=False)
        found = []
        for place, score in zip(places[0].tolist(), scores[0].tolist(), strict=True):
            if score > 0:
                entry = self._entries[int(place)]
                image = None if entry.image_path is None else load_image(entry.image_path)
                found.append(replace(entry.hit, score=float(score), image=image))
        return found

    def _tokens(self, texts: list[str], *, as_words: bool = False):
        return self._bm25s.tokenize(texts, stopwords="en", return_ids=not as_words, show_progress=False)


def split_passages(text: str, limit: int = PASSAGE_CHARACTERS) -> list[str]:
    """Paragraphs put together up to `limit` characters; a longer paragraph is cut there. No text is lost."""
    passages: list[str] = []
    for paragraph in (part.strip() for part in text.split("\n\n")):
        for piece in [paragraph[i : i + limit] for i in range(0, len(paragraph), limit)]:
            if passages and len(passages[-1]) + len(piece) + 2 <= limit:
                passages[-1] += "\n\n" + piece
            else:
                passages.append(piece)
    return passages


def _rows(path: Path, *needed: str) -> list[dict[str, object]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file. Expected JSON lines with {', '.join(needed)}.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number + 1} is not JSON: {error}.") from error
        missing = [key for key in needed if not (isinstance(row, dict) and isinstance(row.get(key), str) and row[key])]
        if missing:
            raise DataError(f"{path}: line {number + 1} has no {', '.join(missing)}.")
        rows.append(row)
    return rows


def _text(row: dict[str, object], key: str) -> str:
    return str(row.get(key) or "")


def _library():
    try:
        import bm25s
    except ImportError as error:
        raise DataError('local search needs the library bm25s: pip install "metis_home[train]".') from error
    return bm25s
