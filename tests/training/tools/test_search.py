"""Search: local corpora with BM25, an HTTP service on this machine, and the tools and recipes around them."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from metis_home.errors import DataError, EngineError, RecipeError
from metis_home.training.tools.corpus_search import CorpusSearch, split_passages
from metis_home.training.tools.http_search import HttpSearch
from metis_home.training.tools.limits import ToolLimits
from metis_home.training.tools.protocol import ToolContext
from metis_home.training.tools.registry import make_tools
from metis_home.training.tools.search import ImageSearchTool, TextSearchTool

FACTS = [
    ("Ada Lovelace", "Ada Lovelace wrote the first program, for the Analytical Engine."),
    ("Eiffel Tower", "The Eiffel Tower in Paris is 330 metres tall and was finished in 1889."),
    ("Octopus", "An octopus has three hearts and blue blood."),
    ("Paris", "Paris is the capital of France and lies on the Seine."),
]


class Service(BaseHTTPRequestHandler):
    """Answers by path; keeps what it was asked."""

    asked: list[tuple[str, dict]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Service.asked.append((self.path, body))
        getattr(self, "answer_" + self.path.strip("/").split("/")[0])(body)

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_good(self, body: dict) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 28), "blue").save(buffer, "PNG")
        picture = base64.b64encode(buffer.getvalue()).decode()
        hit = {"title": "T", "text": f"about {body['query']}", "source": "s", "score": 2, "image": picture}
        self.reply(200, json.dumps({"results": [hit, {"title": "U", "image": "no base64"}, {"title": "V"}]}).encode())

    def answer_busy(self, body: dict) -> None:
        if sum(path == "/busy" for path, _ in Service.asked) < 3:
            self.reply(503, b"")
        else:
            self.reply(200, b'{"results": []}')

    def answer_missing(self, body: dict) -> None:
        self.reply(404, b"")

    def answer_text(self, body: dict) -> None:
        self.reply(200, b"<html>no JSON</html>")

    def answer_odd(self, body: dict) -> None:
        self.reply(200, b'{"results": [3]}')

    def answer_score(self, body: dict) -> None:
        self.reply(200, b'{"results": [{"title": "T", "score": 1' + b"0" * 400 + b"}]}")

    def answer_large(self, body: dict) -> None:
        self.reply(200, b" " * 2_000_000)

    def answer_near(self, body: dict) -> None:
        self.reply(307, b"", Location="/good")

    def answer_far(self, body: dict) -> None:
        self.reply(302, b"", Location=f"http://localhost:{self.server.server_address[1]}/good")

    def answer_round(self, body: dict) -> None:
        self.reply(302, b"", Location="/round")

    def answer_slow(self, body: dict) -> None:
        """One byte at a time, for ever: no time-out between two bytes ever ends it."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(200):
            try:
                self.wfile.write(b" ")
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def ask(address: str, **options: object) -> list:
    return HttpSearch(url=address, allow_private=True, **options).search("paris", 2)  # type: ignore[arg-type]


def test_the_passage_about_the_question_comes_first() -> None:
    corpus = CorpusSearch.from_texts(FACTS)

    hits = corpus.search("How tall is the Eiffel Tower?", 2)

    assert hits[0].title == "Eiffel Tower"
    assert hits[0].score > hits[1].score if len(hits) > 1 else True
    assert [hit.title for hit in corpus.search("capital of France", 1)] == ["Paris"]


@pytest.mark.parametrize("query", ["zebra", "the", "?!", "数学"])
def test_a_query_without_a_known_word_finds_nothing(query: str) -> None:
    assert CorpusSearch.from_texts(FACTS).search(query, 3) == []


def test_more_hits_than_texts_can_be_asked_for_and_threads_may_ask() -> None:
    corpus = CorpusSearch.from_texts(FACTS)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: [hit.title for hit in corpus.search("Paris tower", 50)], range(16)))

    assert set(found[0]) == {"Eiffel Tower", "Paris"}
    assert all(titles == found[0] for titles in found)


def test_rows_and_folders_are_read(tmp_path: Path) -> None:
    rows = tmp_path / "facts.jsonl"
    rows.write_text("\n".join(json.dumps({"title": t, "text": x, "source": "book"}) for t, x in FACTS) + "\n\n")
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "sea.md").write_text("Squid swim.\n\nAn octopus has three hearts.")
    (folder / "data.bin").write_bytes(b"\xff")

    from_rows, from_folder = CorpusSearch.from_jsonl(rows), CorpusSearch.from_folder(folder)

    assert (len(from_rows), len(from_folder)) == (4, 1)
    assert from_rows.search("octopus", 1)[0].source == "book"
    assert from_folder.search("octopus", 1)[0].source == "deep/sea.md"


def test_long_texts_become_passages_and_nothing_is_lost() -> None:
    text = "\n\n".join(["a" * 40, "b" * 90, "c" * 250])

    passages = split_passages(text, 100)

    assert [len(passage) for passage in passages] == [40, 90, 100, 100, 50]
    assert "".join(passages).replace("\n", "") == text.replace("\n", "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the corpus is empty"),
        ("{oops", "line 1 is not JSON"),
        ('{"title": "x"}', "line 1 has no text"),
        ("3", "no text"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "facts.jsonl").write_text(content)

    with pytest.raises(DataError, match=reason):
        CorpusSearch.from_jsonl(tmp_path / "facts.jsonl")
    with pytest.raises(DataError, match="no such"):
        CorpusSearch.from_folder(tmp_path / "gone")


def test_images_are_found_by_their_captions(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        Image.new("RGB", (30, 40), name).save(tmp_path / f"{name}.png")
    captions = tmp_path / "captions.jsonl"
    rows = [{"image": f"{name}.png", "caption": f"a {name} square"} for name in ("red", "blue")]
    captions.write_text("\n".join(map(json.dumps, rows)))

    result = ImageSearchTool(CorpusSearch.from_captions(captions)).run({"query": "something blue"}, ToolContext())

    assert [image.getpixel((1, 1)) for image in result.images] == [(0, 0, 255)]
    assert result.text == "[1]  (blue.png)\na blue square"
    captions.write_text(json.dumps({"image": "gone.png", "caption": "x"}))
    with pytest.raises(DataError, match=r"gone\.png, which is not there"):
        CorpusSearch.from_captions(captions)


def test_the_text_tool_shows_hits_in_order_and_cuts_long_ones() -> None:
    tool = TextSearchTool(CorpusSearch.from_texts([*FACTS, ("Long", "capital " * 500)]), hits=2, hit_characters=100)

    result = tool.run({"query": "capital"}, ToolContext())

    assert result.ok
    assert result.text.startswith("[1] Long\n")
    assert "characters left out" in result.text
    assert "[2] Paris" in result.text
    assert tool.run({"query": "zebra"}, ToolContext()).text == "Nothing was found."
    assert tool.run({"query": "  "}, ToolContext()).error == "bad_arguments"


def test_the_service_is_asked_with_query_and_limit(service: str) -> None:
    Service.asked.clear()

    hits = ask(service + "/good")

    assert Service.asked == [("/good", {"query": "paris", "limit": 2})]
    assert [(hit.title, hit.text, hit.score) for hit in hits] == [("T", "about paris", 2.0), ("U", "", 0.0)]
    assert hits[0].image is not None
    assert hits[0].image.size == (32, 28)
    assert hits[1].image is None


def test_a_busy_service_is_asked_again(service: str) -> None:
    Service.asked.clear()

    assert ask(service + "/busy") == []
    assert len(Service.asked) == 3
    Service.asked.clear()
    with pytest.raises(EngineError, match=r"status 503 \(2 attempts\)"):
        ask(service + "/busy", retries=1)


def test_a_refusal_is_not_repeated(service: str) -> None:
    Service.asked.clear()

    with pytest.raises(EngineError, match="status 404"):
        ask(service + "/missing")
    assert len(Service.asked) == 1


@pytest.mark.parametrize("path", ["/text", "/odd", "/score"])
def test_an_answer_in_another_form_is_an_error(service: str, path: str) -> None:
    with pytest.raises(EngineError, match="the answer is not"):
        ask(service + path)


def test_an_answer_that_is_too_long_is_not_read(service: str) -> None:
    with pytest.raises(EngineError, match="longer than 1000 bytes"):
        ask(service + "/large", max_bytes=1000)


def test_a_service_that_trickles_is_given_up_in_time(service: str) -> None:
    start = time.monotonic()

    with pytest.raises(EngineError):
        ask(service + "/slow", seconds=0.5)

    assert time.monotonic() - start < 8  # the whole answer would take 10 s and more


def test_redirects_stay_on_the_host(service: str) -> None:
    assert ask(service + "/near")[0].title == "T"
    with pytest.raises(EngineError, match="another host"):
        ask(service + "/far")
    with pytest.raises(EngineError, match="redirects more than"):
        ask(service + "/round")


def test_addresses_that_are_not_public_are_refused_before_anything_is_sent(service: str) -> None:
    Service.asked.clear()

    for address in (service + "/good", "http://10.0.0.1/", "http://169.254.169.254/", "http://[::1]:9/"):
        with pytest.raises(EngineError, match="no public address"):
            HttpSearch(url=address).search("x", 1)

    assert Service.asked == []


def test_an_address_that_is_none_is_refused() -> None:
    for address in ("ftp://example.org", "file:///etc/passwd", "search.example"):
        with pytest.raises(EngineError, match="Expected http"):
            HttpSearch(url=address)


def test_nobody_listening_is_an_error_and_to_the_model_a_failed_call() -> None:
    backend = HttpSearch(url="http://127.0.0.1:9/", allow_private=True, retries=0)

    result = TextSearchTool(backend).run({"query": "x"}, ToolContext(limits=ToolLimits()))

    assert (result.ok, result.error) == (False, "failed")
    assert "cannot be asked: ConnectionRefusedError" in result.text


def test_recipes_name_tools(tmp_path: Path) -> None:
    (tmp_path / "facts.txt").write_text("Octopus hearts")

    tools = make_tools(
        [{"text_search": {"corpus": str(tmp_path), "hits": 1}}, {"image_search": {"url": "https://search.example/i"}}]
    )

    assert [tool.name for tool in tools] == ["text_search", "image_search"]
    assert tools[0].run({"query": "octopus"}, ToolContext()).text == "[1] facts (facts.txt)\nOctopus hearts"


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        (["pyton"], "Did you mean 'python'"),
        ([{"python": {"wall_second": 3}}], "Did you mean 'wall_seconds'"),
        ([{"text_search": {}}], "either `corpus`"),
        ([{"text_search": {"corpus": "a", "url": "b"}}], "either `corpus`"),
        ([{"text_search": {"corpus": "a", "retries": 1}}], "retries belong to a `url`"),
        ([{"a": {}, "b": {}}], "Expected a name"),
        ([3], "Expected a name"),
        ([{"image_search": {"url": "http://x.y"}}, {"image_search": {"url": "http://x.y"}}], "two tools are called"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused(specs: list, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        make_tools(specs)
