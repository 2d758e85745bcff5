"""`odirect bench`: what it measures, what it says of it, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.loops import loop_device, made_image, mounted

from odirect.benchmark import Cache, Latencies, Measured, Stop, Work, measure
from odirect.cli.main import run
from odirect.dio.outcome import Kind, Outcome, Promise, Reason, Tally
from odirect.ring.choose import available

ENGINES = [("sync", 1), ("batch", 8), ("submit", 8), ("asyncio", 8)]
SIZE = 1 << 20

#: Key and type of everything that the JSON says of one measurement.
FIGURES: dict[str, type | tuple[type, ...]] = {
    "iops": float,
    "bytes_per_second": float,
    "operations": int,
    "bytes": int,
    "seconds": float,
    "cpu_us_per_op": float,
    "latency_us": (dict, type(None)),
    "outcomes": list,
}
#: Likewise, of the run as a whole.
ABOUT: dict[str, type | tuple[type, ...]] = {
    "engine": str,
    "ring": str,
    "ring_features": dict,
    "file": str,
    "rw": str,
    "bs": int,
    "iodepth": int,
    "jobs": int,
    "offset": int,
    "size": int,
    "seed": int,
    "interrupted": bool,
    "notes": list,
}


@pytest.fixture
def data(scratch: Path) -> Path:
    """A file of SIZE random bytes that takes direct I/O."""
    path = scratch / "data"
    with open(path, "wb") as file:
        file.write(os.urandom(SIZE))
        os.fsync(file.fileno())
    return path


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A file of SIZE bytes on tmpfs, where nothing is direct."""
    if not os.path.ismount("/dev/shm"):
        pytest.skip("needs a tmpfs on /dev/shm")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        path = directory / "data"
        path.write_bytes(os.urandom(SIZE))
        yield path
    finally:
        shutil.rmtree(directory)


def bench(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> dict[str, Any]:
    """What `odirect bench WORDS --json` said."""
    ended = run(["bench", *map(str, words), "--json"])
    said = capsys.readouterr()
    assert ended == status, said.err
    told = json.loads(said.out)
    assert isinstance(told, dict)
    return told


def refused(capsys: pytest.CaptureFixture[str], *words: object, status: int = 2) -> str:
    """The message with which `odirect bench WORDS` failed before it measured anything."""
    assert run(["bench", *map(str, words)]) == status
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


# --- what it says --------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "depth"), ENGINES)
def test_json_has_every_key_with_its_type(
    engine: str, depth: int, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The JSON is a contract: these keys, these types, nothing else."""
    told = bench(capsys, data, "--engine", engine, "--iodepth", depth, "--bs", "4k", "--number", 50, "--seed", 7)
    assert set(told) == set(FIGURES) | set(ABOUT)
    for key, kind in (FIGURES | ABOUT).items():
        assert isinstance(told[key], kind), key
    assert (told["file"], told["rw"], told["bs"]) == (str(data), "read", 4096)
    assert (told["engine"], told["iodepth"], told["jobs"], told["seed"]) == (engine, depth, 1, 7)
    assert set(told["ring_features"]) == {"single_issuer", "defer_taskrun", "fixed_files", "fixed_buffers", "iopoll"}
    assert told["iops"] == pytest.approx(told["operations"] / told["seconds"])
    assert told["bytes_per_second"] == pytest.approx(told["bytes"] / told["seconds"])
    if engine == "batch":
        assert told["latency_us"] is None
    else:
        latency = told["latency_us"]
        assert list(latency) == ["p50", "p90", "p99", "max"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]


@pytest.mark.parametrize("rw", ["read", "write", "randread", "randwrite"])
@pytest.mark.parametrize(("engine", "depth"), ENGINES)
def test_every_engine_makes_the_same_requests(
    engine: str, depth: int, rw: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F52: with --number every engine makes as many operations, of as many bytes, and says how each went."""
    told = bench(
        capsys, data, "--rw", rw, "--engine", engine, "--iodepth", depth, "--bs", "4k", "--number", 600,
        "--overwrite-data", "--require-direct",
    )  # fmt: skip
    promise = "none" if rw.endswith("read") else "device"
    assert told["outcomes"] == [
        {"kind": "direct", "reason": "", "promise": promise, "operations": 600, "bytes": 600 * 4096}
    ]
    assert (told["operations"], told["bytes"]) == (600, 600 * 4096)
    assert data.stat().st_size == SIZE


@pytest.mark.parametrize(("engine", "depth"), ENGINES)
def test_text_names_ring_engine_and_outcomes(
    engine: str, depth: int, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F52: what a person reads has the outcomes too, and the latencies where requests are seen one by one."""
    words = [
        "--engine",
        engine,
        "--iodepth",
        str(depth),
        "--bs",
        "4k",
        "--number",
        "20",
        "--seed",
        "3",
        "--ring",
        "auto",
    ]
    assert run(["bench", str(data), *words]) == 0
    said = capsys.readouterr().out
    assert f"engine {engine}" in said
    assert f"ring {'io_uring' if available().io_uring else 'threads'}" in said
    assert "seed 3" in said
    assert "CPU µs/op" in said
    assert any(line.split()[:3] == ["direct", "direct", "20"] for line in said.splitlines())
    assert ("p99 µs" in said) == (engine != "batch")
    assert ("does not see single requests" in said) == (engine == "batch")


# --- direct or not -------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "depth"), ENGINES)
def test_require_direct_fails_on_tmpfs_after_saying_why(
    engine: str, depth: int, in_memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F52: a benchmark that was buffered all along fails under --require-direct, with NotDirectError's status."""
    words = ["--engine", engine, "--iodepth", str(depth), "--bs", "4k", "--number", "20"]
    assert run(["bench", str(in_memory), *words, "--require-direct", "--json"]) == 4
    said = capsys.readouterr()
    outcomes = json.loads(said.out)["outcomes"]
    assert [(each["kind"], each["operations"]) for each in outcomes] == [("buffered", 20)]
    assert outcomes[0]["reason"]
    assert "20 of 20 requests did not go direct" in said.err
    assert outcomes[0]["reason"] in said.err
    # Without the demand the same run is a success that says the same.
    assert bench(capsys, in_memory, *words)["outcomes"] == outcomes


def test_require_direct_fails_for_what_was_bounced(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F52: a bounced request is not a direct one."""
    told = bench(capsys, data, "--bs", 5000, "--number", 10, "--engine", "batch", "--require-direct", status=4)
    kinds = {each["kind"] for each in told["outcomes"]}
    assert kinds == {"bounced"}
    assert sum(each["operations"] for each in told["outcomes"]) == told["operations"] == 10


def test_strict_access_is_an_error_where_nothing_is_direct(in_memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F52: --access strict does not fall back; the status is NotDirectError's."""
    assert "direct" in refused(capsys, in_memory, "--access", "strict", "--number", 5, status=4)


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(("engine", "depth"), ENGINES)
def test_a_failing_request_ends_the_run_with_its_status(
    engine: str, depth: int, jobs: int, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """B01: what strict access refuses is AlignmentError's status, through every engine and from every process."""
    words = ["--engine", engine, "--iodepth", depth, "--bs", 5000, "--number", 20, "--access", "strict"]
    assert "5000" in refused(capsys, data, *words, "--jobs", jobs, status=3)


def test_compare_goes_three_ways_over_the_same_requests(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F52: beside direct stand buffered-cold and buffered-warm, and each is told from the others."""
    told = bench(capsys, data, "--rw", "randread", "--iodepth", 4, "--number", 100, "--compare", "--require-direct")
    assert list(told["compare"]) == ["direct", "buffered-cold", "buffered-warm"]
    assert told["engine"] == "batch"
    for name, figures in told["compare"].items():
        assert set(figures) == set(FIGURES)
        assert figures["operations"] == 100
        assert [each["kind"] for each in figures["outcomes"]] == [name.split("-")[0]]
    assert {key: told[key] for key in FIGURES} == told["compare"]["direct"]


def test_compare_of_writes_syncs_each_way(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Writes that stay in memory would win every comparison: each way ends with a sync that is measured."""
    told = bench(
        capsys, data, "--rw", "write", "--engine", "sync", "--bs", "64k", "--size", SIZE, "--compare",
        "--overwrite-data",
    )  # fmt: skip
    for name in ("buffered-cold", "buffered-warm"):
        outcomes = told["compare"][name]["outcomes"]
        assert [(each["kind"], each["promise"], each["operations"]) for each in outcomes] == [
            ("buffered", "durable", SIZE >> 16)
        ]


# --- options -------------------------------------------------------------------------------------


def test_several_jobs_are_added_up(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--jobs: each process makes its number of requests, and the sum is reported."""
    told = bench(capsys, data, "--rw", "randread", "--engine", "submit", "--iodepth", 4, "--number", 50, "--jobs", 3)
    assert (told["jobs"], told["operations"], told["bytes"]) == (3, 150, 150 * 4096)
    assert told["latency_us"]["max"] > 0
    assert told["cpu_us_per_op"] > 0


def test_jobs_in_sequence_share_the_range(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each job writes its own part, once: together they write the whole, and no two of them the same."""
    path = scratch / "new"
    told = bench(capsys, path, "--rw", "write", "--bs", "64k", "--size", SIZE, "--jobs", 2, "--seed", 1)
    assert (told["operations"], told["bytes"]) == (16, SIZE)
    written = path.read_bytes()
    assert len(written) == SIZE
    assert all(any(written[place : place + 4096]) for place in range(0, SIZE, 4096))
    assert written[: SIZE // 2] != written[SIZE // 2 :]


def test_size_alone_is_one_pass(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--size without --runtime and --number: over the range once, from --offset on."""
    told = bench(capsys, data, "--bs", "64k", "--size", "256k", "--offset", "128k")
    assert (told["operations"], told["bytes"], told["size"], told["offset"]) == (4, 256 << 10, 256 << 10, 128 << 10)


def test_runtime_ends_it(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--runtime goes on past the end of the range, from its start again, and ends."""
    told = bench(capsys, data, "--bs", "64k", "--runtime", "0.2")
    assert told["seconds"] >= 0.2
    assert told["operations"] > 0
    assert not told["interrupted"]


def test_writes_stay_inside_their_range(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only [offset, offset + size) is overwritten."""
    before = data.read_bytes()
    bench(capsys, data, "--rw", "write", "--bs", "4k", "--offset", "64k", "--size", "128k", "--overwrite-data")
    after = data.read_bytes()
    assert after[: 64 << 10] == before[: 64 << 10]
    assert after[192 << 10 :] == before[192 << 10 :]
    blocks = range(64 << 10, 192 << 10, 4096)
    assert all(after[place : place + 4096] != before[place : place + 4096] for place in blocks)


@pytest.mark.parametrize("ring", ["auto", "io_uring", "threads"])
def test_ring_is_chosen_and_the_environment_left_as_it_was(
    ring: str, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--ring: the back end that does it is the one that is reported."""
    if ring == "io_uring" and not available().io_uring:
        pytest.skip(f"needs io_uring: {available().why_not}")
    monkeypatch.setenv("ODIRECT_RING", "auto")
    told = bench(capsys, data, "--ring", ring, "--engine", "batch", "--bs", "4k", "--number", 64)
    kinds = {"auto": "io_uring" if available().io_uring else "threads"}
    assert told["ring"] == kinds.get(ring, ring)
    assert told["operations"] == 64
    assert os.environ["ODIRECT_RING"] == "auto"


def test_flags_are_passed_on(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B05, B06: --dsync writes are durable, and the outcome says so; --hipri is harmless where nothing polls."""
    told = bench(
        capsys, data, "--rw", "randwrite", "--dsync", "--hipri", "--huge-pages", "--end-sync", "--number", 16,
        "--access", "strict", "--overwrite-data",
    )  # fmt: skip
    assert [(each["kind"], each["promise"]) for each in told["outcomes"]] == [("direct", "durable")]


def test_a_seed_repeats_offsets_and_data(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same --seed writes the same file; without one a new seed is drawn, and told."""
    paths = [scratch / name for name in ("first", "second", "third", "fourth")]
    for path, seed in zip(paths, (["--seed", 5], ["--seed", 5], [], []), strict=True):
        told = bench(capsys, path, "--rw", "randwrite", "--engine", "batch", "--number", 40, "--size", SIZE, *seed)
        assert told["seed"] == 5 or not seed
    contents = [path.read_bytes() for path in paths]
    assert contents[0] == contents[1]
    assert len(set(contents)) == 3


@pytest.mark.parametrize(
    ("words", "engine"),
    [
        (["--rw", "randread"], "batch"),
        (["--rw", "read"], "submit"),
        (["--rw", "randread", "--iodepth", 1], "sync"),
        (["--rw", "read", "--bs", "64k"], "batch"),
    ],
)
def test_auto_takes_the_engine_that_suits(
    words: list[object], engine: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The native loop for many small requests, `submit` for large ones, one call where only one is in flight."""
    assert bench(capsys, data, *words, "--number", 4)["engine"] == engine


def test_holes_are_mentioned(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F52: a file without blocks is read without the device, and that is said."""
    path = scratch / "sparse"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    assert any("holes are read" in note for note in bench(capsys, path, "--number", 1)["notes"])


# --- what is not overwritten ---------------------------------------------------------------------


@pytest.mark.parametrize("rw", ["write", "randwrite"])
def test_data_is_not_overwritten_unasked(rw: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with data is written only under the flag that says so."""
    before = data.read_bytes()
    assert "--overwrite-data" in refused(capsys, data, "--rw", rw, "--number", 1)
    assert data.read_bytes() == before


@pytest.mark.parametrize("words", [["--size", "8E"], ["--size", "7E", "--offset", "2E"]])
def test_more_than_a_file_can_have(words: list[str], scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(refused(capsys, scratch / "new", "--rw", "write", "--number", 1, *words).split())
    assert "8.0 EiB (9223372036854775807 bytes)" in said and not (scratch / "new").exists()


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["sync", "batch"])
def test_what_is_not_aligned_is_named(engine: str, jobs: int, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message of a request that fails has the file's name."""
    words = ["--bs", 100, "--access", "strict", "--number", 5, "--engine", engine, "--jobs", jobs]
    words += ["--iodepth", 1 if engine == "sync" else 4]
    assert refused(capsys, data, *words, status=3).startswith(f"odirect: {data}: ")


def test_a_new_file_needs_a_size(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What does not exist is made as long as --size says, and not at all without it."""
    path = scratch / "new"
    assert "--size" in refused(capsys, path, "--rw", "write")
    assert not path.exists()
    path.touch()
    assert "--size" in refused(capsys, path, "--rw", "write")
    bench(capsys, path, "--rw", "randwrite", "--size", "64k", "--number", 2)  # it is empty: nothing is lost
    assert path.stat().st_size == 64 << 10


def test_a_file_can_be_made_longer(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--overwrite-data with a range past the end makes the file longer first."""
    told = bench(capsys, data, "--rw", "write", "--offset", SIZE, "--size", "64k", "--bs", "4k", "--overwrite-data")
    assert told["operations"] == 16
    assert data.stat().st_size == SIZE + (64 << 10)


def test_reading_what_is_not_there_is_refused(scratch: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file, a directory, a range past the end, and blocks larger than the file."""
    assert "No such file" in refused(capsys, scratch / "missing")
    refused(capsys, scratch)
    assert "nothing at offset" in refused(capsys, data, "--offset", "2M")
    assert "fewer than" in refused(capsys, data, "--size", "2M")
    assert "do not fit" in refused(capsys, data, "--bs", "2M")
    assert "do not fit" in refused(capsys, data, "--bs", "512k", "--jobs", 3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--engine", "sync", "--iodepth", "2"], "--jobs"),
        (["--engine", "asyncio", "--compare"], "batch or sync"),
        (["--bs", "0"], "less than 1 B"),
        (["--bs", "many"], "not a size"),
        (["--number", "0"], "0"),
        (["--runtime", "0"], "0"),
    ],
)
def test_options_that_make_no_sense(
    words: list[str], says: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are refused with a sentence about what to do, before anything is read."""
    assert says in refused(capsys, data, *words)


def test_a_block_device_needs_the_flag_and_must_be_unused(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device is written only under the flag, and not at all while it is mounted (InUseError's status)."""
    with made_image("ext4", directory=scratch) as image, loop_device(image) as device:
        words = [device, "--rw", "randwrite", "--number", 8, "--jobs", 2]
        assert "block device" in refused(capsys, *words)
        with mounted(device, "ext4"):
            assert "mounted" in refused(capsys, *words, "--overwrite-data", status=6)
        told = bench(capsys, *words, "--overwrite-data", "--require-direct")
        assert told["operations"] == 16
        assert bench(capsys, device, "--rw", "randread", "--number", 8)["operations"] == 8


# --- Ctrl-C --------------------------------------------------------------------------------------


def _press_ctrl_c_when_it_runs() -> threading.Thread:
    """A thread that sends SIGINT to this process once the benchmark catches it."""
    before = signal.getsignal(signal.SIGINT)
    pause = threading.Event()

    def press() -> None:
        while signal.getsignal(signal.SIGINT) is before:
            pause.wait(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(("engine", "depth"), ENGINES)
def test_ctrl_c_prints_what_there_is(
    engine: str, depth: int, jobs: int, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F24: Ctrl-C ends the measuring between requests; the figures are printed, and the status is 130."""
    thread = _press_ctrl_c_when_it_runs()
    told = bench(
        capsys, data, "--engine", engine, "--iodepth", depth, "--bs", "4k", "--runtime", 100, "--jobs", jobs,
        status=130,
    )  # fmt: skip
    thread.join()
    assert told["interrupted"]
    assert told["operations"] == sum(each["operations"] for each in told["outcomes"]) > 0
    assert told["seconds"] < 100


def test_a_second_ctrl_c_is_as_ever() -> None:
    """Who presses it twice does not want to wait; a job's process, which is told twice, waits all the same."""
    stop = Stop()
    with stop.catching():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    patient = Stop(patient=True)
    with patient.catching():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert patient.asked


def test_ctrl_c_at_a_terminal_reaches_all_processes(data: Path) -> None:
    """The whole group gets the signal, jobs twice: still one report, no traceback, and status 130."""
    command = [
        sys.executable,
        "-m",
        "odirect.cli.main",
        "bench",
        str(data),
        "--jobs",
        "2",
        "--runtime",
        "100",
        "--bs",
        "4k",
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0) as process:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            pause = threading.Event()
            # A job holds SIGINT back until it can take it, so a process that is there may be told.
            while len(children.read_text().split()) < 2:
                assert process.poll() is None
                pause.wait(0.001)
            os.killpg(process.pid, signal.SIGINT)
            said, complaints = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, complaints
    assert b"Traceback" not in complaints
    told = json.loads(said)
    assert told["interrupted"]
    assert told["operations"] > 0


# --- the engine room -----------------------------------------------------------------------------


def _work(path: Path, **changes: Any) -> Work:
    words: dict[str, Any] = {
        "path": str(path), "rw": "read", "engine": "sync", "block_bytes": 4096, "depth": 1, "start": 0,
        "blocks": SIZE // 4096, "number": 10, "runtime_ns": None, "seed": 1,
    }  # fmt: skip
    return Work(**{**words, **changes})


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_jobs_error_is_the_callers(jobs: int, scratch: Path) -> None:
    """What goes wrong in a process of its own is raised as it would be here."""
    from odirect.base.errors import MissingError

    missing = scratch / "missing"
    with pytest.raises(MissingError) as caught:
        measure([_work(missing, job=job) for job in range(jobs)], Stop())
    assert os.fspath(caught.value.filename) == str(missing)


@pytest.mark.parametrize("cache", [Cache.DIRECT, Cache.COLD])
def test_an_engine_that_is_none_is_refused(cache: Cache, data: Path) -> None:
    """A `Work` names one of the engines; through the page cache there are two."""
    with pytest.raises(ValueError, match="engine"):
        measure([_work(data, engine="steam", cache=cache)], Stop())


def test_no_job_is_refused() -> None:
    """Nothing to do is a mistake of the caller's."""
    with pytest.raises(ValueError, match="no job"):
        measure([], Stop())


def test_measurements_add_up() -> None:
    """Jobs that ran together: from the first start to the last end, with all operations and all CPU time."""
    first, second = Latencies(), Latencies()
    for nanoseconds in (1000, 2000):
        first.add(nanoseconds)
    second.add(900_000)
    direct, bounced = Outcome(Kind.DIRECT), Outcome(Kind.BOUNCED, Reason.END_OF_FILE, Promise.NONE)
    total = Measured(100, 300, 10, {direct: Tally(2, 8192)}, first)
    other = Measured(50, 200, 5, {direct: Tally(1, 4096), bounced: Tally(3, 9)}, second)
    first.fold()
    total.merge(Measured.from_json(json.loads(json.dumps(other.as_json()))))
    assert (total.began_ns, total.ended_ns, total.cpu_ns) == (50, 300, 15)
    assert total.outcomes == {direct: Tally(3, 12288), bounced: Tally(3, 9)}
    assert (total.operations, total.bytes, total.not_direct) == (6, 12297, 3)
    assert total.latencies is not None
    assert (total.latencies.number, total.latencies.longest_ns) == (3, 900_000)
    total.merge(Measured(latencies=None))
    assert total.latencies is None


def test_percentiles_are_within_a_hundredth() -> None:
    """The histogram is never below the true value, and at most 1 % above it."""
    latencies = Latencies()
    assert latencies.percentile_ns(50) == 0
    values = [round(1.07**power) for power in range(40, 340)]
    for value in values:
        latencies.add(value)
    latencies.fold()
    for percent in (1, 10, 50, 90, 99, 100):
        true = values[-(-len(values) * percent // 100) - 1]
        assert true <= latencies.percentile_ns(percent) <= true * 1.01
    assert latencies.percentile_ns(100) == latencies.longest_ns == values[-1]
