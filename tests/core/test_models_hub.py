"""Pulling from a hub: whatever the line and the hub do, what is here in the end is right, or nothing is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from moltbot_server.models.hub import Hub, HubError, HubFile, Listing, Patience, Source, parse_source
from moltbot_server.models.pull import Pull, Weights, check_files, select
from moltbot_server.models.sizes import readable
from moltbot_server.testing_hub import Refusal, SmallHub

QUICK = Patience(first_pause=0.001, longest_pause=0.002, silence=5.0)
WEIGHTS = os.urandom(3_000_000)
FILES = {
    "model.bin": WEIGHTS,
    "vocabulary.json": b'["<s>", "</s>"]',
    "config.json": b"{}",
    "tokenizer.model": os.urandom(5000),
    "README.md": b"# A model\n",
    "empty.txt": b"",
}


class Watch:
    """A meter that remembers."""

    def __init__(self) -> None:
        self.count = 0
        self.notes: list[str] = []
        self._loop = asyncio.get_running_loop()
        self._more = asyncio.Event()

    def advance(self, count: int) -> None:
        self.count += count
        self._loop.call_soon_threadsafe(self._more.set)

    def note(self, text: str) -> None:
        self.notes.append(text)

    async def until(self, count: int) -> None:
        """Wait until so many bytes are here."""
        async with asyncio.timeout(10):
            while self.count < count:
                await self._more.wait()
                self._more.clear()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[SmallHub]:
    """A hub with one repository, `acme/tiny`."""
    write(tmp_path / "repositories" / "acme" / "tiny", FILES)
    async with SmallHub(tmp_path / "repositories").running() as hub:
        yield hub


async def pull(
    small: SmallHub, target: Path, watch: Watch | None = None, *, repository: str = "acme/tiny", token: str = ""
) -> Listing:
    """Pull all of a repository into a folder."""
    async with Hub(small.address, token=token, patience=QUICK) as hub:
        listing = await hub.listing(parse_source(repository, small.address))
        await Pull(hub, listing, listing.files, target, watch or Watch()).run()
        return listing


@asynccontextmanager
async def until_stalled(small: SmallHub, target: Path, size: int) -> AsyncIterator[asyncio.Task[Listing]]:
    """Give a pull whose large file has come so far and comes no further."""
    small.faults.stall_after = size
    watch = Watch()
    task = asyncio.create_task(pull(small, target, watch))
    await watch.until(size + sum(len(content) for name, content in FILES.items() if name != "model.bin"))
    small.faults.stall_after = None
    yield task


async def test_everything_comes_as_it_is_and_is_counted(small: SmallHub, tmp_path: Path) -> None:
    watch = Watch()
    listing = await pull(small, tmp_path / "here", watch)
    assert read(tmp_path / "here") == FILES
    assert watch.count == sum(map(len, FILES.values()))
    assert watch.notes == []
    assert len(listing.commit) == 40
    assert {asked.path.split("/")[4] for asked in small.of("resolve")} == {listing.commit}


async def test_the_files_of_a_hub_that_tells_no_sizes_are_read_from_the_pages_of_its_tree(
    small: SmallHub, tmp_path: Path
) -> None:
    whole = await pull(small, tmp_path / "one")
    small.faults.no_sizes = True
    paged = await pull(small, tmp_path / "two")
    assert set(paged.files) == set(whole.files)
    assert read(tmp_path / "two") == FILES


async def test_a_broken_line_goes_on_where_it_broke(small: SmallHub, tmp_path: Path) -> None:
    small.faults.cuts = [1_000_000, 500_000]
    watch = Watch()
    await pull(small, tmp_path / "here", watch)
    assert read(tmp_path / "here") == FILES
    starts = [int(asked.range[6:-1]) for asked in small.of("store") if asked.range]
    assert len(starts) == 2
    assert 0 < starts[0] <= 1_000_000
    assert starts[0] < starts[1] <= starts[0] + 500_000
    assert watch.count == sum(map(len, FILES.values()))
    assert len(watch.notes) == 2


async def test_a_line_that_breaks_more_often_than_a_hub_is_tried_gets_there_while_something_comes(
    small: SmallHub, tmp_path: Path
) -> None:
    small.faults.cuts = [120_000] * (QUICK.tries + 4)
    await pull(small, tmp_path / "here")
    assert read(tmp_path / "here") == FILES


async def test_a_line_over_which_nothing_comes_is_given_up_and_what_came_is_kept(
    small: SmallHub, tmp_path: Path
) -> None:
    small.faults.cuts = [700_000] + [0] * 100
    with pytest.raises(HubError, match="Try again later"):
        await pull(small, tmp_path / "here")
    kept = (tmp_path / "here" / "model.bin").read_bytes()
    assert 0 < len(kept) <= 700_000
    assert WEIGHTS.startswith(kept)


async def test_the_next_pull_takes_up_what_a_cancelled_one_left(small: SmallHub, tmp_path: Path) -> None:
    async with until_stalled(small, tmp_path / "here", 1_000_000) as task:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    small.asked.clear()
    watch = Watch()
    await pull(small, tmp_path / "here", watch)
    assert read(tmp_path / "here") == FILES
    assert [asked.range for asked in small.of("store") if asked.path.endswith("model.bin")] == ["bytes=1000000-"]
    assert watch.count == sum(map(len, FILES.values()))


async def test_files_that_are_here_and_right_are_not_asked_for_again(small: SmallHub, tmp_path: Path) -> None:
    await pull(small, tmp_path / "here")
    (tmp_path / "here" / "config.json").write_bytes(b"[]")
    small.asked.clear()
    await pull(small, tmp_path / "here")
    assert read(tmp_path / "here") == FILES
    assert [asked.path.rpartition("/")[2] for asked in small.of("resolve")] == ["config.json"]


async def test_what_is_left_of_something_else_is_replaced_or_removed(small: SmallHub, tmp_path: Path) -> None:
    write(tmp_path / "here", {"model.bin": b"x" * 4_000_000, "tokenizer.model": b"y" * 4000, "old/stray.txt": b"z"})
    await pull(small, tmp_path / "here")
    assert read(tmp_path / "here") == FILES
    assert not (tmp_path / "here" / "old").exists()
    assert [asked.range for asked in small.of("store") if asked.path.endswith("model.bin")] == [""]


async def test_a_hub_that_cannot_begin_in_the_middle_begins_at_the_front(small: SmallHub, tmp_path: Path) -> None:
    small.faults.cuts, small.faults.no_ranges = [1_000_000], True
    watch = Watch()
    await pull(small, tmp_path / "here", watch)
    assert read(tmp_path / "here") == FILES
    assert len([asked for asked in small.of("store") if asked.path.endswith("model.bin")]) == 2
    assert watch.count == sum(map(len, FILES.values()))


@pytest.mark.parametrize("name", ["model.bin", "README.md"])
async def test_a_file_that_comes_wrong_is_fetched_again(small: SmallHub, tmp_path: Path, name: str) -> None:
    small.faults.spoiled = [name]
    watch = Watch()
    await pull(small, tmp_path / "here", watch)
    assert read(tmp_path / "here") == FILES
    assert [note for note in watch.notes if "checksum" in note and name in note]


@pytest.mark.parametrize("name", ["model.bin", "README.md"])
async def test_a_file_that_comes_wrong_twice_ends_the_pull_and_leaves_nothing_of_it(
    small: SmallHub, tmp_path: Path, name: str
) -> None:
    small.faults.spoiled = [name, name]
    with pytest.raises(HubError, match=f"{name} .*wrong checksum"):
        await pull(small, tmp_path / "here")
    assert (tmp_path / "here" / name).read_bytes() == b""


async def test_a_busy_hub_is_tried_again_when_it_says(small: SmallHub, tmp_path: Path) -> None:
    small.faults.refusals = [Refusal(status=429, retry_after="0"), Refusal(status=503), Refusal(status=502)]
    small.faults.api_refusals = [Refusal(status=429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT")]
    await pull(small, tmp_path / "here")
    assert read(tmp_path / "here") == FILES


async def test_a_hub_that_asks_for_an_hour_is_not_waited_for(small: SmallHub, tmp_path: Path) -> None:
    small.faults.api_refusals = [Refusal(status=429, retry_after="3600")]
    async with asyncio.timeout(5):
        with pytest.raises(HubError, match="again in 3600 s"):
            await pull(small, tmp_path / "here")


async def test_a_signed_address_that_has_ended_is_asked_for_anew(small: SmallHub, tmp_path: Path) -> None:
    small.faults.refusals = [Refusal(status=403)]
    await pull(small, tmp_path / "here")
    assert read(tmp_path / "here") == FILES


async def test_the_token_goes_to_the_hub_and_never_to_where_it_redirects(small: SmallHub, tmp_path: Path) -> None:
    async with SmallHub(small.folder, token="hf_secret").running() as guarded:
        await pull(guarded, tmp_path / "here", token="hf_secret")
        assert read(tmp_path / "here") == FILES
        sent = {place: {asked.authorization for asked in guarded.of(place)} for place in ("api", "resolve", "store")}
        assert sent == {"api": {"Bearer hf_secret"}, "resolve": {"Bearer hf_secret"}, "store": {""}}


async def test_a_refused_reader_is_told_of_the_token_and_never_sees_it(small: SmallHub, tmp_path: Path) -> None:
    async with SmallHub(small.folder, token="hf_secret").running() as guarded:
        with pytest.raises(HubError, match="MOLTBOT_HUB_TOKEN"):
            await pull(guarded, tmp_path / "here")
        with pytest.raises(HubError, match="may not read it") as refused:
            await pull(guarded, tmp_path / "here", token="hf_wrong")
        assert "hf_wrong" not in str(refused.value)
        assert "hf_wrong" not in repr(vars(refused.value))


def test_a_token_does_not_travel_unencrypted() -> None:
    with pytest.raises(HubError, match="use https"):
        Hub("http://hub.example.com", token="hf_secret")


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://", "//"])
async def test_a_redirect_to_no_address_of_the_web_is_not_followed(
    small: SmallHub, tmp_path: Path, target: str
) -> None:
    small.faults.redirect = target
    with pytest.raises(HubError):
        await pull(small, tmp_path / "here")


async def test_redirects_without_an_end_are_given_up(small: SmallHub, tmp_path: Path) -> None:
    listing = await pull(small, tmp_path / "here")
    small.faults.redirect = f"{small.address}/acme/tiny/resolve/{listing.commit}/model.bin"
    with pytest.raises(HubError, match="without an end"):
        await pull(small, tmp_path / "there")


async def test_nobody_at_the_address_is_told_with_what_to_do(tmp_path: Path, unused_tcp_port: int) -> None:
    async with Hub(f"http://127.0.0.1:{unused_tcp_port}", patience=QUICK) as hub:
        notes: list[str] = []
        with pytest.raises(HubError, match=r"cannot be reached .* MOLTBOT_HUB names"):
            await hub.listing(parse_source("acme/tiny", hub.host and f"http://{hub.host}"), notes.append)
        assert len(notes) == QUICK.tries // 2 - 1


async def test_what_is_not_there_is_told_by_name(small: SmallHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="has no acme/none@main"):
        await pull(small, tmp_path / "here", repository="acme/none")
    with pytest.raises(HubError, match="has no acme/tiny@v2"):
        await pull(small, tmp_path / "here", repository="acme/tiny@v2")


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/passwd", "a/../../evil", "a//b", ".", "a/./b", "a\\..\\b", "x\0y", "a\nb", "n" * 300, "C:evil",
     "a/b/c/d/e/f/g/h", "MODEL.BIN", "model.bin/inside", ""],
)  # fmt: skip
async def test_a_file_name_that_is_not_safe_ends_the_pull_before_anything_is_fetched(
    small: SmallHub, tmp_path: Path, name: str
) -> None:
    small.faults.names = [name]
    with pytest.raises(HubError, match="nothing was fetched"):
        await pull(small, tmp_path / "here")
    assert small.of("resolve") == []
    assert not (tmp_path / "here").exists()


def test_more_files_or_bytes_than_a_model_has_are_refused() -> None:
    with pytest.raises(HubError, match="more than"):
        check_files([HubFile(path=f"{number}.json", size=1) for number in range(5000)])
    for size in (-1, 1 << 60):
        with pytest.raises(HubError, match="cannot be"):
            check_files([HubFile(path="model.bin", size=size)])


async def test_a_disk_without_room_is_told_before_anything_is_fetched(small: SmallHub, tmp_path: Path) -> None:
    async with Hub(small.address, patience=QUICK) as hub:
        listing = await hub.listing(parse_source("acme/tiny", small.address))
        huge = HubFile(path="model.bin", size=1 << 42, sha256="0" * 64)
        with pytest.raises(HubError, match=r"4\.4 TB are still to be fetched"):
            await Pull(hub, listing, [huge], tmp_path / "here", Watch()).run()
    assert small.of("resolve") == []


async def test_two_pulls_into_one_folder_do_not_meet(small: SmallHub, tmp_path: Path) -> None:
    async with until_stalled(small, tmp_path / "here", 100_000) as first:
        with pytest.raises(HubError, match="under way"):
            await pull(small, tmp_path / "here")
        small.faults.go_on.set()
        await first
    assert read(tmp_path / "here") == FILES


async def test_a_file_without_a_checksum_in_the_list_is_checked_by_that_of_its_answer(
    small: SmallHub, tmp_path: Path
) -> None:
    async with Hub(small.address, patience=QUICK) as hub:
        listing = await hub.listing(parse_source("acme/tiny", small.address))
        bare = [HubFile(path=file.path, size=file.size) for file in listing.files]
        small.faults.spoiled = ["model.bin"]
        await Pull(hub, listing, bare, tmp_path / "here", Watch()).run()
    assert read(tmp_path / "here") == FILES


async def test_something_that_is_no_hub_is_called_so(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\nConnection: close\r\n\r\n<html></html>")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with Hub(address, patience=QUICK) as hub:
            with pytest.raises(HubError, match="is MOLTBOT_HUB right"):
                await hub.listing(parse_source("acme/tiny", address))


@pytest.mark.parametrize(
    ("text", "hub", "repository", "revision"),
    [
        ("acme/tiny", "https://huggingface.co", "acme/tiny", "main"),
        ("gpt2", "https://huggingface.co", "gpt2", "main"),
        ("acme/tiny@v1.0", "https://huggingface.co", "acme/tiny", "v1.0"),
        ("https://hf-mirror.com/acme/tiny", "https://hf-mirror.com", "acme/tiny", "main"),
        ("https://hf-mirror.com/acme/tiny/tree/refs%2Fpr%2F1", "https://hf-mirror.com", "acme/tiny", "refs/pr/1"),
        ("http://127.0.0.1:8090/acme/tiny/", "http://127.0.0.1:8090", "acme/tiny", "main"),
    ],
)
def test_a_repository_is_named_by_itself_or_by_its_page(text: str, hub: str, repository: str, revision: str) -> None:
    found = parse_source(text, "https://huggingface.co/")
    assert found == Source(hub=hub, repository=repository, revision=revision)


@pytest.mark.parametrize(
    "text", ["", "a/b/c", "../x", "acme/..", "-x/y", "ftp://hub/acme/tiny", "https://me:pw@hub/acme/tiny", "a b/c",
             "acme/tiny@", "acme/tiny@../x", "https://hub.example/acme/tiny/resolve/main/model.bin"]
)  # fmt: skip
def test_what_names_no_repository_is_refused_and_no_password_is_shown(text: str) -> None:
    if text == "acme/tiny@":  # nothing after it is the usual revision
        assert parse_source(text, "https://hub").revision == "main"
        return
    with pytest.raises(HubError) as refused:
        parse_source(text, "https://hub")
    assert "pw" not in str(refused.value)


CHOICES: dict[str, tuple[Weights, set[str], set[str]]] = {
    "a CTranslate2 model": (
        Weights.CTRANSLATE2,
        {"model.bin", "vocabulary.json", "config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"},
        {".gitattributes", "model.safetensors", "picture.png"},
    ),
    "a model in parts that is there whole as well": (
        Weights.SAFETENSORS,
        {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"},
        {"consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", "original/params.json", "x.gguf"},
    ),
    "an embedding model": (
        Weights.SAFETENSORS,
        {"model.safetensors", "modules.json", "1_Pooling/config.json", "vocab.txt"},
        {"tf_model.h5", "openvino/model.xml", "rust_model.ot"},
    ),
    "an old model": (Weights.PYTORCH, {"pytorch_model.bin", "config.json"}, {"flax_model.msgpack", "model.pt"}),
    "a model of llama.cpp": (Weights.GGUF, {"model-q4.gguf", "README.md"}, set()),
    "no model at all": (Weights.OTHER, {"README.md"}, {"train.parquet"}),
}


@pytest.mark.parametrize(("weights", "wanted", "unwanted"), CHOICES.values(), ids=CHOICES)
def test_of_a_repository_only_what_a_model_needs_is_fetched(
    weights: Weights, wanted: set[str], unwanted: set[str]
) -> None:
    chosen = select([HubFile(path=name, size=1) for name in wanted | unwanted])
    assert chosen.weights is weights
    assert {file.path for file in chosen.files} == wanted
    assert chosen.size == len(wanted)


def test_patterns_choose_files_instead() -> None:
    files = [HubFile(path=name, size=1) for name in ("model.safetensors", "onnx/model.onnx", "config.json")]
    assert [file.path for file in select(files, ["*.onnx", "config*"]).files] == ["config.json", "onnx/model.onnx"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_600, "1.0 MB"),
        (13_400_000, "13.4 MB"),
        (4.2e11, "420 GB"),
        (5e16, "50000 TB"),
    ],
)
def test_sizes_are_told_in_three_digits(count: float, text: str) -> None:
    assert readable(count) == text
