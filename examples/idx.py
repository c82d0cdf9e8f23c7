"""Reads IDX files, the format in which MNIST and its relatives (Fashion-MNIST, KMNIST) are published.

An IDX file consists of a header and numbers, all big-endian. The header has two zero bytes, one byte for the type of the numbers, one
byte for the number of dimensions, and each dimension as a 32-bit integer. The numbers follow, with the last dimension fastest. A
file may be compressed by gzip, which is recognized by its first bytes and not by its name.

    >>> train_images, train_labels, test_images, test_labels = load_mnist("path/to/mnist")  # uint8 [60000, 28, 28], [60000], …

An error about a file names the file, what was expected, what was found, and what to do.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

GZIP_START = b"\x1f\x8b"
UNSIGNED_BYTE = 0x08
NUMBER_TYPES = {UNSIGNED_BYTE: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
REMEDY = "Download it again, or check that the file has its own name."


def load_mnist(folder: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images [n, height, width] and labels [n] for training, then for testing, all uint8."""
    train_images, train_labels = load_part(Path(folder), "train")
    test_images, test_labels = load_part(Path(folder), "t10k")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"{folder}: images for training and for testing must have one size; got {train_images.shape[1:]} and {test_images.shape[1:]}. "
            "Keep the files of one data set in one folder."
        )
    return train_images, train_labels, test_images, test_labels


def load_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one part, "train" or "t10k", as many of the one as of the other."""
    image_path, label_path = find(folder, f"{part}-images-idx3-ubyte"), find(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_bytes(image_path, dimensions=3), read_bytes(label_path, dimensions=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{label_path}: expected {len(images)} labels, one for each image of {image_path.name}; found {len(labels)}. "
            "Keep the files of one data set in one folder."
        )
    return images, labels


def find(folder: Path, name: str) -> Path:
    """Path of a file under any of its spellings: plain or .gz, `-idx3-ubyte` or `.idx3-ubyte`."""
    spellings = [spelling + ending for spelling in (name, name.replace("-idx", ".idx")) for ending in ("", ".gz")]
    for spelling in spellings:
        if (folder / spelling).is_file():
            return folder / spelling
    found = sorted(entry.name for entry in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    raise FileNotFoundError(
        f"{folder / name}: expected this file, or one named {', '.join(spellings[1:])}; found {found or 'an empty folder'}. "
        "Name the folder that holds the four MNIST files."
    )


def read_bytes(path: Path, dimensions: int) -> np.ndarray:
    """The array of an IDX file that must hold unsigned bytes in so many dimensions."""
    array = read_idx(path)
    if array.dtype != np.uint8 or array.ndim != dimensions:
        raise ValueError(
            f"{path}: expected unsigned bytes in {dimensions} dimensions (magic number 0x{UNSIGNED_BYTE:06x}{dimensions:02x}); "
            f"found {array.dtype} in {array.ndim} dimensions. {REMEDY}"
        )
    return array


def read_idx(path: str | Path) -> np.ndarray:
    """The array that an IDX file holds, of any type and any count of dimensions."""
    content = uncompressed(Path(path))
    type_code, dimensions = content[2:4] if len(content) >= 4 else (0, 0)
    if content[:2] != b"\0\0" or type_code not in NUMBER_TYPES or dimensions == 0:
        raise ValueError(
            f"{path}: expected an IDX file, whose magic number is 00 00, a type in 08…0e, a count of dimensions; "
            f"found {content[:4].hex(' ') or 'nothing'}. {REMEDY}"
        )
    number_type = np.dtype(NUMBER_TYPES[type_code])
    header_size = 4 + 4 * dimensions
    shape = tuple(int(size) for size in np.frombuffer(content[4:header_size].ljust(4 * dimensions, b"\0"), ">u4"))
    expected_size = header_size + math.prod(shape) * number_type.itemsize
    if len(content) != expected_size:
        raise ValueError(
            f"{path}: expected {expected_size} bytes, the header and {number_type.name} numbers of shape {shape}; "
            f"found {len(content)} bytes. {REMEDY}"
        )
    return np.frombuffer(content, number_type, offset=header_size).reshape(shape).astype(number_type.newbyteorder("="))


def uncompressed(path: Path) -> bytes:
    """The bytes of a file, gzip undone where there is any."""
    content = path.read_bytes()
    if not content.startswith(GZIP_START):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole gzip file; found one that breaks off or is damaged ({error}). {REMEDY}") from error
