"""Headers of safetensors files: what is written is read, and the library itself takes whatever we take."""

import copy
import json
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path

import ml_dtypes  # noqa: F401  gives numpy the names that the library looks up
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from deepseek_jax.checkpoint.headers import DTYPES, make_header, parse_header, read_header

# Bytes of one element, by the library's table; F4 and F6 are those that do not fill bytes.
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
WIDTHS |= {
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "F64": 8,
    "U64": 8,
    "I64": 8,
    "C64": 8,
}
NAMES = st.one_of(
    st.sampled_from(["a", "b", "model.layers.0.mlp.up_proj.weight", "à", "😀", "a\nb", "\0", '"', ""]), st.text()
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__"), st.tuples(st.sampled_from(sorted(WIDTHS)), SHAPES), max_size=4
)
# The message of each refusal of what the library accepts, with the reason.
STRICTER = {
    "stands there twice": "the library takes the last of equal names; a file that says two things is not read",
    "wanted dtype, shape and data_offsets": "no writer adds fields, or writes them as a list without names",
    "unknown dtype": "the dtypes of less than a byte, and dtypes spelled as an object",
    "must be short lists of whole numbers": "more dimensions than any weight has, or sizes from 2**63 on",
    "no tensor can have the shape": "sizes that overflow, although a 0 stands before them",
}


def theirs(file: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Dtypes and shapes by the library; None where it refuses the file."""
    try:
        with safe_open(str(file), framework="numpy") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except SafetensorError:
        return None


def ours(file: Path) -> dict[str, tuple[str, tuple[int, ...]]] | str:
    """Dtypes and shapes by the header; the message of the refusal where it is refused."""
    try:
        return {name: (entry.dtype, entry.shape) for name, entry in read_header(file).entries.items()}
    except ValueError as problem:
        return str(problem)


def with_length(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def size_of(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(WIDTHS[dtype] * int(np.prod(shape)) for dtype, shape in tensors.values())


@pytest.fixture(scope="module")
def file():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "model.safetensors"


# --- what is written is read ---------------------------------------------------------------------


@settings(max_examples=100)
@given(tensors=TENSORS)
def test_a_header_that_was_made_is_read_back_and_the_library_reads_the_same(file, tensors):
    header = make_header(tensors)
    assert len(header.raw) % 8 == 0  # data that start on a multiple of 8 can be mapped
    file.write_bytes(header.raw + bytes(size_of(tensors)))
    back = read_header(file)
    assert (back.raw, back.entries) == (header.raw, header.entries)
    assert ours(file) == theirs(file) == tensors
    assert [entry.nbytes for entry in back.entries.values()] == [size_of({"": value}) for value in tensors.values()]


@settings(max_examples=50)
@given(tensors=st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), min_size=1, max_size=5))
def test_the_bytes_of_a_tensor_lie_where_the_header_says(file, tensors):
    """In files that the library wrote, in its own order."""
    rng = np.random.default_rng(0)
    draw = lambda dtype, shape: rng.integers(0, 256, (*shape, DTYPES[dtype].itemsize), np.uint8).view(DTYPES[dtype])
    values = {name: draw(*tensor).reshape(tensor[1]) for name, tensor in tensors.items() if name != "__metadata__"}
    raw = save(values)
    file.write_bytes(raw)
    entries = read_header(file).entries
    assert entries.keys() == values.keys()
    for name, value in values.items():
        entry = entries[name]
        assert raw[entry.start : entry.start + entry.nbytes] == value.tobytes()
        assert (DTYPES[entry.dtype], entry.shape) == (value.dtype, value.shape)


@settings(max_examples=50)
@given(tensors=TENSORS, random=st.randoms(use_true_random=False))
def test_the_order_of_a_listing_is_free_and_tensors_come_in_the_order_of_their_data(file, tensors, random):
    header = make_header(tensors)
    listing = list(json.loads(header.raw[8:]).items())
    random.shuffle(listing)
    file.write_bytes(with_length(json.dumps(dict(listing)).encode()) + bytes(size_of(tensors)))
    assert ours(file) == theirs(file) == tensors
    entries = list(read_header(file).entries.values())
    assert all(one.start + one.nbytes == other.start for one, other in zip(entries, entries[1:], strict=False))


# --- nothing is taken that the library refuses ---------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63)]),
    st.sampled_from([True, False, None, 1.0, 1e300, float("nan"), float("inf"), "1", [], [1], {}]),
)
DTYPE_NAMES = st.sampled_from([*WIDTHS, "F4", "F6_E2M3", "F128", "f32", "", None, 3, [], {"F32": None}])


def change_offset(draw, pairs, tensors):
    draw(tensors)["data_offsets"][draw(st.integers(0, 1))] = draw(NUMBERS)


def shift_both_offsets(draw, pairs, tensors):
    """Leaves a hole, overlaps, or leaves the file."""
    fields, by = draw(tensors), draw(st.integers(-9, 9))
    fields["data_offsets"] = [number + by for number in fields["data_offsets"]]


def swap_offsets(draw, pairs, tensors):
    """Of two tensors, which may well be a whole file still."""
    one, other = draw(tensors), draw(tensors)
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


def turn_offsets(draw, pairs, tensors):
    draw(tensors)["data_offsets"].reverse()


def change_shape(draw, pairs, tensors):
    fields = draw(tensors)
    longer = fields["shape"] + [draw(NUMBERS)]
    fields["shape"] = draw(st.sampled_from([longer, longer[::-1], longer[1:], longer * 3]))


def change_dtype(draw, pairs, tensors):
    draw(tensors)["dtype"] = draw(DTYPE_NAMES)


def change_field(draw, pairs, tensors):
    value = draw(st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3), max_leaves=5))
    draw(tensors)[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = value


def drop_field(draw, pairs, tensors):
    draw(tensors).pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)


def repeat(draw, pairs, tensors):
    pairs.insert(draw(st.integers(0, len(pairs))), copy.deepcopy(draw(st.sampled_from(pairs))))


def rename(draw, pairs, tensors):
    index = draw(st.integers(0, len(pairs) - 1))
    pairs[index] = draw(st.one_of(NAMES, st.sampled_from(["__metadata__", "\ud800"]))), pairs[index][1]


def drop(draw, pairs, tensors):
    pairs.pop(draw(st.integers(0, len(pairs) - 1)))


def change_metadata(draw, pairs, tensors):
    texts = st.dictionaries(NAMES, st.one_of(NAMES, NUMBERS, st.just("\udfff")), max_size=2)
    pairs[draw(st.integers(0, len(pairs) - 1))] = "__metadata__", draw(st.one_of(texts, NUMBERS))


CHANGES = [change_offset, shift_both_offsets, swap_offsets, turn_offsets, change_shape, change_dtype, change_field]
CHANGES += [drop_field, repeat, rename, drop, change_metadata]


def whole(fields) -> bool:
    """Whether an earlier change left a tensor's fields to be changed again."""
    return isinstance(fields, dict) and all(isinstance(fields.get(key), list) for key in ("shape", "data_offsets"))


@st.composite
def spoiled_files(draw) -> bytes:
    """A real header changed in none to two places, and now and then its bytes, its length or the file's end."""
    tensors = draw(TENSORS)
    pairs = list(json.loads(make_header(tensors).raw[8:]).items())
    for _ in range(draw(st.integers(0, 2))):
        left = [fields for _, fields in pairs if whole(fields)]
        if left:
            draw(st.sampled_from(CHANGES))(draw, pairs, st.sampled_from(left))
    text = bytearray(("{" + ",".join(f"{json.dumps(name)}:{json.dumps(v)}" for name, v in pairs) + "}").encode())
    if draw(st.integers(0, 4)) == 0:
        place = draw(st.integers(0, len(text) - 1))
        pieces = [b"", b"-", b"0", b" ", b"{", b"]", b"\xff", b"\xed\xa0\x80", b"\0", b"1e3", b"9" * 30]
        text[place : place + draw(st.integers(0, 2))] = draw(st.sampled_from(pieces))
    length = len(text)
    if draw(st.integers(0, 7)) == 0:
        length = draw(st.sampled_from([0, 1, length - 1, length + 1, length + 8, 10**8, 2**31, 2**60, 2**64 - 1]))
    data = size_of(tensors) + draw(st.sampled_from([0, 0, 0, 0, 0, -1, 1, 8]))
    raw = struct.pack("<Q", length) + text + bytes(max(data, 0))
    return raw[: draw(st.integers(0, len(raw)))] if draw(st.integers(0, 15)) == 0 else raw


@settings(max_examples=800)
@given(raw=spoiled_files())
def test_the_library_takes_whatever_we_take_and_a_refusal_is_one_line(file, raw):
    file.write_bytes(raw)
    start = time.process_time()
    found, wanted = ours(file), theirs(file)
    assert time.process_time() - start < 1
    if isinstance(found, dict):
        assert found == wanted
        return
    assert found.startswith(f"{file}: not a whole safetensors file (") and len(found.splitlines()) == 1
    assert len(found) < len(str(file)) + 500
    assert wanted is None or any(reason in found for reason in STRICTER), (found, wanted)


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def entry(shape: str = "[1]", offsets: str = "[0,4]", dtype: str = '"F32"') -> str:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


@pytest.mark.parametrize(
    "text, data, reason",
    [
        (f'{{"a":{ENTRY},"a":{ENTRY}}}', 4, "stands there twice"),
        (f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{ENTRY}}}', 4, "stands there twice"),
        (entry()[:-2] + ',"more":1}}', 4, "wanted dtype, shape and data_offsets"),
        ('{"a":["F32",[1],[0,4]]}', 4, "wanted dtype, shape and data_offsets"),
        (entry(dtype='{"F32":null}'), 4, "unknown dtype"),
        (entry("[4]", "[0,2]", '"F4"'), 2, "unknown dtype"),
        (entry("[4]", "[0,3]", '"F6_E2M3"'), 3, "unknown dtype"),
        (entry("[1,1,1,1,1,1,1,1,1]"), 4, "must be short lists of whole numbers"),
        (entry(f"[0,{2**63}]", "[0,0]"), 0, "must be short lists of whole numbers"),
        (entry(f"[0,{2**62},{2**62}]", "[0,0]"), 0, "no tensor can have the shape"),
    ],
    ids="tensor metadata field list object F4 F6 dimensions sizes overflow".split(),
)
def test_where_we_are_stricter_than_the_library(file, text, data, reason):
    """All of it, by the property above, and each for the reason that STRICTER gives."""
    assert reason in STRICTER
    file.write_bytes(with_length(text.encode()) + bytes(data))
    assert theirs(file) is not None
    assert reason in ours(file)


DAMAGED = {
    "empty": (b"", "0 bytes, and a header of 0 by the first 8"),
    "seven bytes": (b"\0" * 7, "7 bytes, and a header of 0 by the first 8"),
    "no header": (bytes(8), "8 bytes, and a header of 0 by the first 8"),
    "length 1": (struct.pack("<Q", 1) + b"{}", "10 bytes, and a header of 1 by the first 8"),
    "longer than the file": (struct.pack("<Q", 3) + b"{}", "10 bytes, and a header of 3 by the first 8"),
    "length 2**60": (struct.pack("<Q", 1 << 60) + b"{}", "a header of 1152921504606846976"),
    "length -1": (b"\xff" * 8 + b"{}", "a header of 18446744073709551615"),
    "data without tensors": (with_length(b"{}") + b"x", "tensors end at byte 10, the file has 11"),
    "truncated": (with_length(entry().encode()) + bytes(3), "tensors end at byte 66, the file has 65"),
    "extended": (with_length(entry().encode()) + bytes(5), "tensors end at byte 66, the file has 67"),
    "not UTF-8": (with_length(b'{"\xff":1}'), "can't decode byte 0xff"),
    "half a pair": (with_length(f'{{"\\ud800":{ENTRY}}}'.encode()) + bytes(4), "a name is no Unicode text"),
    "UTF-16": (with_length(entry().encode("utf-16")) + bytes(4), "can't decode byte 0xff"),
    "not JSON": (with_length(b"[}"), "Expecting value"),
    "a list": (with_length(b"[]"), "header: not a JSON object"),
    "nested lists": (with_length(b"[" * 100_000), "recursion"),
    "nested objects": (with_length(b'{"a":' * 100_000), "recursion"),
    "a tensor of null": (with_length(b'{"a":null}'), "tensor 'a': wanted dtype, shape and data_offsets"),
    "no shape": (with_length(b'{"a":{"dtype":"F32","data_offsets":[0,0]}}'), "tensor 'a': wanted dtype, shape"),
    "a field twice": (with_length(entry()[:-2].encode() + b',"shape":[1]}}') + bytes(4), "'shape' stands there twice"),
    "metadata of numbers": (with_length(b'{"__metadata__":{"a":1}}'), "__metadata__ must be an object of texts"),
    "metadata of half a pair": (with_length(b'{"__metadata__":{"a":"\\udc00"}}'), "__metadata__ must be"),
    "metadata is a list": (with_length(b'{"__metadata__":[]}'), "__metadata__ must be an object of texts"),
    "boolean": (with_length(entry("[true]").encode()) + bytes(4), "must be short lists of whole numbers"),
    "fraction": (with_length(entry("[1.0]").encode()) + bytes(4), "must be short lists of whole numbers"),
    "not a number": (with_length(entry("[NaN]").encode()) + bytes(4), "must be short lists of whole numbers"),
    "negative": (with_length(entry("[-1]").encode()) + bytes(4), "got -1, wanted whole numbers from 0"),
    "minus 0": (with_length(entry(offsets="[-0,4]").encode()) + bytes(4), "got -0, wanted whole numbers from 0"),
    "5000 digits": (with_length(entry(f"[{'1' * 5000}]").encode()) + bytes(4), "wanted whole numbers from 0"),
    "three offsets": (with_length(entry(offsets="[0,4,4]").encode()) + bytes(4), "must be short lists"),
    "another shape": (with_length(entry("[2]").encode()) + bytes(4), "tensor 'a': F32 [2] is not 4 bytes"),
    "offsets reversed": (with_length(entry(offsets="[4,0]").encode()) + bytes(4), "F32 [1] is not -4 bytes"),
    "product overflows": (with_length(entry(f"[{2**62},{2**62},0]", "[0,0]").encode()), "no tensor can have"),
    "a hole": (with_length(entry(offsets="[4,8]").encode()) + bytes(8), "tensor 'a' leaves a hole before it"),
    "overlap": (
        with_length(f'{{"a":{ENTRY},"b":{ENTRY.replace("[1]", "[2]").replace("4]", "8]")}}}'.encode()) + bytes(8),
        "tensor 'b' overlaps the tensor before it",
    ),
    "unknown dtype": (with_length(entry(dtype='"f32"').encode()) + bytes(4), "tensor 'a': unknown dtype 'f32'"),
    "a long name": (with_length(f'{{"{"n" * 10**6}":1}}'.encode()), "nnn: wanted dtype, shape and data_offsets"),
    "a name of two lines": (with_length(b'{"a\\nb\\u2028c":1}'), r"tensor 'a\nb\u2028c': wanted dtype, shape"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_named_fast_and_in_little_memory(file, what):
    raw, says = DAMAGED[what]
    file.write_bytes(raw)
    tracemalloc.start()
    start = time.process_time()
    found = ours(file)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert theirs(file) is None
    assert found.startswith(f"{file}: not a whole safetensors file (") and says in found
    assert len(found.splitlines()) == 1 and len(found) < len(str(file)) + 500
    assert seconds < 1 and peak < 1_000_000 + 20 * len(raw)


def test_the_header_alone_must_have_its_length_too(file):
    """Headers are kept beside a converted folder, without the file's data."""
    raw = make_header({"a": ("F32", (1,))}).raw
    assert parse_header(raw, None, file).entries.keys() == {"a"}
    for spoiled in (raw[:7], raw + b" ", raw[:-1], b"\1" + raw[1:]):
        with pytest.raises(ValueError, match="bytes of header are not as many as the first 8 say"):
            parse_header(spoiled, None, file)
