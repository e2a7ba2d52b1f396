"""Makes malformed NIfTI files: valid ones of every kind, then one of many things done to them."""

import gzip
import math
import struct

import nibabel
import numpy as np

# Where the fields lie, by length of header (nifti1.h, nifti2.h): offset, type, count.
FIELDS = {
    348: {
        "sizeof_hdr": (0, "i4", 1),
        "dim": (40, "i2", 8),
        "datatype": (70, "i2", 1),
        "bitpix": (72, "i2", 1),
        "pixdim": (76, "f4", 8),
        "vox_offset": (108, "f4", 1),
        "scl_slope": (112, "f4", 1),
        "scl_inter": (116, "f4", 1),
        "qform_code": (252, "i2", 1),
        "sform_code": (254, "i2", 1),
        "quatern": (256, "f4", 3),
        "qoffset": (268, "f4", 3),
        "srow": (280, "f4", 12),
        "magic": (344, "u1", 4),
    },
    540: {
        "sizeof_hdr": (0, "i4", 1),
        "magic": (4, "u1", 8),
        "datatype": (12, "i2", 1),
        "bitpix": (14, "i2", 1),
        "dim": (16, "i8", 8),
        "pixdim": (104, "f8", 8),
        "vox_offset": (168, "i8", 1),
        "scl_slope": (176, "f8", 1),
        "scl_inter": (184, "f8", 1),
        "qform_code": (344, "i4", 1),
        "sform_code": (348, "i4", 1),
        "quatern": (352, "f8", 3),
        "qoffset": (376, "f8", 3),
        "srow": (400, "f8", 12),
    },
}
MAGIC = {348: b"n+1\0", 540: b"n+2\0\r\n\x1a\n"}
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 32: "c8", 64: "f8", 128: "3u1", 256: "i1", 512: "u2", 768: "u4"}
TYPES |= {1024: "i8", 1280: "u8", 1792: "c16", 2304: "4u1"}
UNSUPPORTED = (0, 1, 1536, 2048)  # unknown, bits, float128, complex256
WILD = {
    "i": [0, 1, -1, 2, 3, 7, 8, 16, 255, 300, 348, 540, 1536, 2304, 32767, -32768, 2**31 - 1, 2**40, 2**62, -(2**63)],
    "f": [0.0, -0.0, 1.0, -1.0, 0.5, 351.0, 352.5, 353.0, 1e4, 1e-40, 3e38, -3e38, 1e308, np.nan, np.inf, -np.inf],
    "u": [0, 1, 43, 49, 50, 105, 255],
}


def order_of(content):
    """Length of the header and byte order, or None."""
    for length in FIELDS:
        for order in "<>":
            if len(content) >= length and content[:4] == struct.pack(order + "i", length):
                return length, order
    return None


def field(content, length, order, name):
    offset, kind, count = FIELDS[length][name]
    return np.frombuffer(content, np.dtype(kind).newbyteorder(order), count, offset)


def valid_file(rng):
    """A file of random type, version, byte order, shape, scaling and place."""
    length, order = int(rng.choice([348, 540])), str(rng.choice(["<", ">"]))
    header = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}[length](endianness=order)
    shape = [(9, 8), (7, 9, 3), (9, 8, 1), (8, 7, 2, 1), (1, 9, 8, 1, 1), (40, 30)][rng.integers(6)]
    code = int(rng.choice([*TYPES] * 4 + [*UNSUPPORTED]))
    dtype = np.dtype(TYPES.get(code, "16u1"))
    voxels = rng.integers(0, 100, math.prod(shape) * math.prod(dtype.shape)).astype(dtype.base.newbyteorder(order))
    header.set_data_shape(shape)
    header["datatype"], header["bitpix"] = code, 8 * dtype.itemsize
    header["pixdim"][1:4] = 0.8, 1.2, 3
    place = int(rng.integers(3))
    if place:
        header.set_qform(np.array([[0, 0.8, 0, -30], [-1.2, 0, 0, 44], [0, 0, 3, 7], [0, 0, 0, 1.0]]), 1)
    if place == 2:
        header.set_sform(rng.normal(size=(4, 4)) * [[1], [1], [1], [0]] + np.diag([0, 0, 0, 1]), 2)
    if rng.random() < 0.5:
        header.set_slope_inter(rng.normal() + 2, rng.normal())
    extension = b"\0" * 4
    if rng.random() < 0.3:
        esize = int(rng.choice([0, 1, 8, 16, 32, -16, 2**31 - 1, -(2**31)]))
        extension = b"\1\0\0\0" + struct.pack(order + "ii", esize, 6) + rng.bytes(24)
    header["vox_offset"] = length + len(extension)
    return bytearray(header.binaryblock + extension + voxels.tobytes())


def wild_field(rng, content):
    kind = order_of(content)
    if not kind:
        return
    name = str(rng.choice([*FIELDS[kind[0]]]))
    offset, dtype, count = FIELDS[kind[0]][name]
    dtype = np.dtype(dtype).newbyteorder(kind[1])
    offset += dtype.itemsize * int(rng.integers(count))
    value = WILD[dtype.kind][rng.integers(len(WILD[dtype.kind]))]
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            wild = np.array(value).astype(dtype).tobytes()
    else:
        wild = (value % 256**dtype.itemsize).to_bytes(dtype.itemsize, "little" if kind[1] == "<" else "big")
    content[offset : offset + dtype.itemsize] = wild


def announce(rng, content):
    """dim says more than there is, by little or by far."""
    kind = order_of(content)
    if kind:
        offset, dtype, _ = FIELDS[kind[0]]["dim"]
        side = int(rng.choice([60, 300, 700, 32767]))
        dims = np.array([3, side, side, int(rng.choice([1, 40, side]))], np.dtype(dtype).newbyteorder(kind[1]))
        content[offset : offset + dims.nbytes] = dims.tobytes()


def flip(rng, content, end):
    for position in rng.integers(0, min(end, len(content)), rng.integers(1, 9)):
        content[position] ^= 1 << int(rng.integers(8))


def overwrite(rng, content):
    start, count = int(rng.integers(len(content))), int(rng.integers(1, 64))
    content[start : start + count] = [bytes(count), b"\xff" * count, rng.bytes(count)][rng.integers(3)]


def zipped(content, level=6):
    return gzip.compress(content, level, mtime=0)  # the same bytes each time


BOMB = zipped(bytes(1 << 22))
MUTATIONS = {
    "none": lambda rng, content: None,
    "flip in the header": lambda rng, content: flip(rng, content, 560),
    "flip anywhere": lambda rng, content: flip(rng, content, len(content)),
    "truncate": lambda rng, content: content.__delitem__(slice(int(rng.integers(len(content))), None)),
    "overwrite": overwrite,
    "wild field": wild_field,
    "wild fields": lambda rng, content: [wild_field(rng, content) for _ in range(3)],
    "announce": announce,
    "append": lambda rng, content: content.extend(rng.bytes(int(rng.integers(1, 3000)))),
    "insert": lambda rng, content: content.__setitem__(slice(*[int(rng.integers(len(content)))] * 2), rng.bytes(4)),
}
PACKINGS = {
    "flip": lambda rng, content, packed: flip(rng, packed, len(packed)),
    "truncate": lambda rng, content, packed: packed.__delitem__(slice(int(rng.integers(len(packed))), None)),
    "wrong checksum": lambda rng, content, packed: flip(rng, memoryview(packed)[-8:], 8),
    "garbage": lambda rng, content, packed: packed.extend(rng.bytes(int(rng.integers(1, 40)))),
    "padding": lambda rng, content, packed: packed.extend(bytes(int(rng.integers(1, 600)))),
    "a member more": lambda rng, content, packed: packed.extend(zipped(rng.bytes(100))),
    "members": lambda rng, content, packed: packed.__setitem__(
        slice(None), b"".join(zipped(content[start : start + 200]) for start in range(0, len(content), 200))
    ),
    "bomb": lambda rng, content, packed: packed.extend(BOMB),
}


def malformed_file(seed, index):
    """File number ``index``, and what was done to it."""
    rng = np.random.default_rng([seed, index])
    content, name = valid_file(rng), str(rng.choice([*MUTATIONS]))
    if content:
        MUTATIONS[name](rng, content)
    if rng.random() < 0.5:
        return bytes(content), name
    packed = bytearray(zipped(bytes(content), int(rng.integers(10))))
    if rng.random() < 0.5:
        packing = str(rng.choice([*PACKINGS]))
        PACKINGS[packing](rng, bytes(content), packed)
        name += ", gzip: " + packing
    return bytes(packed), name
