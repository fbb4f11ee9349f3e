"""Ways to damage a folder: any file's bytes; a hostile value in JSON, msgpack, Parquet, safetensors and TFRecord."""

from __future__ import annotations

import io
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MESSAGE = ".msgpack"

DEEP = "@@deep@@"  # stands for a list nested 100,000 deep: no encoder writes one
DIGITS = "@@digits@@"  # for an integer of 10,000 digits
HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 10**12, 1e308, -0.5, float("nan"), float("inf")),
    *(
        "",
        "x",
        "x" * 10_000,
        "../../../etc/passwd",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "{a.__class__}",
        "{episode_index:999999999d}",
    ),
    *([], {}, [None], [[]], [1, "a"], {"": ""}, {"a": {"b": []}}, DEEP, DIGITS),
]


def damage(folder: Path, rng: np.random.Generator) -> tuple[Path, str]:
    """Damage one file of ``folder`` in place. Returns the file and how."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and ".lock" not in p.name)
    file = files[rng.integers(len(files))]
    own = BY_SUFFIX.get(file.suffix) or (tfrecord if ".tfrecord" in file.name else None)
    if own is not None and rng.random() < 0.65:
        data, how = file.read_bytes(), own.__name__
        try:
            content, how = own(data, rng)
        except Exception:  # this file has no such part: its bytes are damaged below
            content = None
        if content is not None:
            replace(file, content)
            return file, how
    if file.suffix != MESSAGE and rng.random() < 0.25:
        return file, special(file, files, rng)
    content, how = scramble(file.read_bytes(), rng)
    replace(file, content)
    return file, how


def replace(file: Path, content: bytes) -> None:
    """Files are linked from the whole folder: a new one takes the place, nothing is written to the old one."""
    file.unlink()
    file.write_bytes(content)


def scramble(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """Bytes damaged without knowing what they mean."""
    at, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    ways: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "cut": lambda: data[:at],
        "cut off a little": lambda: data[: -int(rng.integers(1, 64))],
        "without a part": lambda: data[:at] + data[end:],
        "part twice": lambda: data[:end] + data[at:],
        "zeros": lambda: data[:at] + bytes(min(end, at + 4096) - at) + data[min(end, at + 4096) :],
        "noise": lambda: data[:at] + rng.bytes(int(rng.integers(1, 64))) + data[at:],
        "appended": lambda: data + rng.bytes(16),
    }
    if not data or rng.random() < 0.5:
        out = bytearray(data or b"\0")
        first = max(0, len(out) - 2048) if rng.random() < 0.5 else 0  # Parquet has its description at the end
        last = min(len(out), 2048) if rng.random() < 0.3 else len(out)
        for _ in range(int(rng.integers(1, 5))):
            out[int(rng.integers(min(first, last - 1), last))] ^= 1 << int(rng.integers(8))
        return bytes(out), "bits"
    how = list(ways)[rng.integers(len(ways))]
    return ways[how](), how


def special(file: Path, files: list[Path], rng: np.random.Generator) -> str:
    """Something else in a file's place."""
    how = ["gone", "folder", "dangling link", "link out", "link to itself", "pipe", "device", "another file"][rng.integers(8)]
    other = files[rng.integers(len(files))].read_bytes()
    outside = file.with_name("outside")
    if how == "link out":  # the same content, elsewhere
        outside = Path(os.environ["FUZZ_OUTSIDE"]) / file.name
        outside.unlink(missing_ok=True)
        shutil.copy(file, outside)
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how in ("dangling link", "link out"):
        file.symlink_to(outside)
    elif how == "link to itself":
        file.symlink_to(file.name)
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "device":
        file.symlink_to("/dev/zero")
    elif how == "another file":
        file.write_bytes(other)
    return how


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, entry in entries for place in ((*here, key), *_places(entry, (*here, key)))]


def change_entry(value: Any, rng: np.random.Generator) -> str:
    """Change one entry of nested maps and lists in place. Shallow ones are as likely as the many deep ones. Returns how."""
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for place in _places(value):
        by_depth.setdefault(len(place), []).append(place)
    level = by_depth[int(rng.choice(sorted(by_depth)))]
    *way, last = level[rng.integers(len(level))]
    parent = value
    for key in way:
        parent = parent[key]
    choice = rng.random()
    if choice < 0.1:
        del parent[last]
        how = "entry gone"
    elif choice < 0.15 and isinstance(parent, dict):
        parent[f"{last}x"] = parent.pop(last)
        how = "entry renamed"
    elif choice < 0.3 and isinstance(parent[last], int | float):
        parent[last] = parent[last] * [-1, 10, 0.5, 1e9][rng.integers(4)]
        how = "another number"
    else:
        parent[last] = HOSTILE[rng.integers(len(HOSTILE))]
        how = f"{str(parent[last])[:20]!r}"
    return f"{'.'.join(map(str, (*way, last)))[:80]}: {how}"


def hostile_json(value: Any, rng: np.random.Generator) -> tuple[str, str]:
    """A JSON value with one entry changed, as text."""
    how = change_entry(value, rng)
    text = json.dumps(value)
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{DIGITS}"', "9" * 10_000)
    return text, how


def json_file(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    text, how = hostile_json(json.loads(data), rng)
    return text.encode("utf-8", "surrogatepass"), how


def json_lines(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    lines = data.splitlines()
    k = int(rng.integers(len(lines)))
    text, how = hostile_json(json.loads(lines[k]), rng)
    lines[k] = text.encode("utf-8", "surrogatepass")
    return b"\n".join(lines) + b"\n", f"line {k}: {how}"


def message(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """A msgpack map with one entry changed, or with more in its place than its bytes let expect."""
    content = msgpack.unpackb(data, strict_map_key=False)
    how = change_entry(content, rng)
    packed = msgpack.packb(content, unicode_errors="surrogatepass")
    deep, digits = (msgpack.packb(mark) for mark in (DEEP, DIGITS))
    if deep in packed:
        ways = {
            "nested": b"\x91" * 100_000 + b"\xc0",
            "a claim": b"\xdd\xff\xff\xff\xff",
            "claims in claims": b"\xdd\x00\x0f\xff\xff" * 1000 + bytes(2**20),
            "empty lists": b"\xdd\x00\x10\x00\x00" + b"\x90" * 2**20,
            "empty lists in lists": b"\xdc\x00\x64" + (b"\xdc\x27\x10" + b"\x90" * 10_000) * 100,
        }
        way = list(ways)[rng.integers(len(ways))]
        packed, how = packed.replace(deep, ways[way]), f"{how} {way}"
    return packed.replace(digits, b"\xcf" + b"\xff" * 8), how


def safetensors(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    size = int.from_bytes(data[:8], "little")
    text, how = hostile_json(json.loads(data[8 : 8 + size]), rng)
    header = text.encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data[8 + size :], f"header: {how}"


def bomb() -> bytes:
    """A small PNG whose header claims 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def parquet(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """A Parquet file with one column in another form; its check sums fit."""
    table = pq.read_table(io.BytesIO(data))
    column = table.column_names[rng.integers(table.num_columns)]
    at, rows = table.column_names.index(column), table.num_rows
    values = table[column].to_pylist()
    k = int(rng.integers(rows))

    def with_one(value: Any) -> pa.Array:
        return pa.array([*values[:k], value, *values[k + 1 :]], None)

    old = table[column].type
    odd = [float("nan"), float("inf"), -1, 2**62, "text", None, [], [1.0], b"bytes", {"bytes": bomb(), "path": None}]
    ways: dict[str, Callable[[], pa.Array | None]] = {
        "gone": lambda: None,
        "text": lambda: pa.array([str(v)[:50] for v in values]),
        "empty": lambda: pa.nulls(rows, old),
        "other type": lambda: pa.array([True] * rows),
        "lists": lambda: pa.array([[v] for v in values]),
        "NaN": lambda: pa.array([float("nan")] * rows),
        "odd entry": lambda: with_one(odd[rng.integers(len(odd))]),
        "odd number in a vector": lambda: with_one([odd[rng.integers(4)], *values[k][1:]]),
        "narrower vector": lambda: with_one(values[k][1:]),
        "backwards": lambda: pa.array(values[::-1], old),
        "all the same": lambda: pa.array([values[0]] * rows, old),
    }
    how = list(ways)[rng.integers(len(ways))]
    changed = ways[how]()
    table = table.remove_column(at) if changed is None else table.set_column(at, column, changed)
    if rng.random() < 0.1:
        table, how = table.slice(0, int(rng.integers(rows))), "fewer rows"
    out = io.BytesIO()
    pq.write_table(table, out, write_page_checksum=True)
    return out.getvalue(), f"column {column}: {how}"


def tfrecord(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """A shard with one feature of one record in another form; its check sums fit."""
    from tensorflow_datasets.proto import tf_example_pb2

    from data.rlds.tfrecord import FOOTER, HEADER, masked_crc

    records, position = [], 0
    while position < len(data):
        length, _ = HEADER.unpack(data[position : position + HEADER.size])
        records.append(data[position + HEADER.size :][:length])
        position += HEADER.size + length + FOOTER.size
    k = int(rng.integers(len(records)))
    if rng.random() < 0.3:
        records[k], how = scramble(records[k], rng)
        how = f"record {k}: {how}"
    else:
        example = tf_example_pb2.Example.FromString(records[k])
        features = example.features.feature
        name = sorted(features)[rng.integers(len(features))]
        kind = features[name].WhichOneof("kind")
        values = list(getattr(features[name], kind).value)
        way = ["gone", "nothing", "fewer", "more", "other kind", "odd", "bomb"][rng.integers(7)]
        del features[name]
        if way == "nothing":
            features[name].bytes_list.value.extend([])
        elif way in ("fewer", "more"):
            values = values[:-1] if way == "fewer" else [*values, *values[:1]]
            getattr(features[name], kind).value.extend(values)
        elif way == "other kind":
            features[name].bytes_list.value.extend([b"text"] * len(values))
        elif way == "odd":
            features[name].float_list.value.extend([float("nan")] * len(values))
        elif way == "bomb":
            features[name].bytes_list.value.extend([bomb()] * len(values))
        records[k], how = example.SerializeToString(), f"record {k}, {name}: {way}"
    out = b""
    for record in records:
        length_bytes = HEADER.pack(len(record), 0)[:8]
        out += length_bytes + FOOTER.pack(masked_crc(length_bytes)) + record + FOOTER.pack(masked_crc(record))
    return out, how


BY_SUFFIX: dict[str, Callable[[bytes, np.random.Generator], tuple[bytes, str]]] = {
    ".json": json_file,
    ".jsonl": json_lines,
    ".parquet": parquet,
    ".safetensors": safetensors,
    MESSAGE: message,
}
