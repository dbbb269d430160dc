"""Fuzzing: a damaged source is refused with one line and no output, or read correctly.

Random corruptions are applied to a small source of each kind. None may cause a
traceback, a hang, running code, or more memory than a small file justifies. Corruptions
that no reader can detect are left out:

- changed bits inside a weight, or exchanged tensors of one shape and dtype;
- bfloat16 declared as float16, which has the same size;
- numbers of a config that do not follow from tensors: scale or alpha of an adapter.
  (RoPE base, eps and context length may change undetected; the tensors do not.)
"""

import faulthandler
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from commands import call, snapshot
from models import (
    LINEARS,
    SCALED,
    TABLE,
    in_corenet,
    make_factors,
    on_the_hub,
    published_config,
    raw_tensors,
    small_tokenizer,
    weights_of,
    write_apple_folder,
    write_hub_folder,
    write_mlx_lm_adapter,
    write_peft_folder,
    write_pt,
)
from pickles import mapping, tensor, zipped
from places import ROOT, SUPPORT

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.storage.shards import INDEX, write_json

torch = pytest.importorskip("torch", reason="needs PyTorch to write .pt files")

SECONDS = 30  # limit for one conversion of about 100 kB: longer is a hang
MEGABYTES = 64  # limit for the memory of Python, numpy and MLX

TINY = OpenELMConfig.preset("gpt-test", vocab_size=384)

# The sources ---------------------------------------------------------------------


YAML = """model:
  language_modeling:
    name: general_gpt
    general_gpt: &gpt
      model_name: gpt-test
      vocab_size: 300
      max_context_length: 64
      padding_index: 300
dataset: *gpt
"""


def make_checkpoint(folder: Path) -> list[str]:
    folder.mkdir()
    write_pt(folder / "a.pt", weights_of(TINY), "model_state_dict")
    (folder / "config.yaml").write_text(YAML)
    return ["source/a.pt"]


def make_lora(folder: Path) -> list[str]:
    folder.mkdir()
    weights = weights_of(SCALED)
    factors = make_factors(weights, (TABLE, *LINEARS), dora=True)
    write_pt(folder / "lora.pt", in_corenet(weights, factors))
    return ["source/lora.pt", "--merge"]


def make_shards(folder: Path) -> list[str]:
    named = on_the_hub(weights_of(SCALED))
    config = published_config(SCALED)
    write_hub_folder(folder, config, named, dtype="bfloat16", shards=2)
    return ["source"]


def make_bins(folder: Path) -> list[str]:
    named = on_the_hub(weights_of(SCALED))
    named["lm_head.weight"] = named[f"transformer.{TABLE}.weight"].copy()
    config = published_config(SCALED)
    write_hub_folder(folder, config, named, suffix="bin", shards=2)
    return ["source"]


def make_apple(folder: Path) -> list[str]:
    write_apple_folder(folder, weights_of(TINY), 4)
    return ["source"]


def make_quantized(folder: Path) -> list[str]:
    """Write a folder as mlx-lm does: affine, embedding in 8 bits, a module in mxfp8."""
    folder.mkdir()
    arrays, entry = {}, {"group_size": 64, "bits": 4, "mode": "affine"}
    exceptions = {
        f"transformer.{TABLE}": {"group_size": 32, "bits": 8, "mode": "affine"},
        "transformer.layers.1.ffn.proj_1": {
            **{"group_size": 32, "bits": 8, "mode": "mxfp8"}
        },
    }
    for name, weight in on_the_hub(weights_of(SCALED)).items():
        array = mx.array(weight).astype(mx.bfloat16)
        module = name.removesuffix(".weight")
        if array.ndim == 1:
            arrays[name] = array
            continue
        parts = mx.quantize(array, **exceptions.get(module, entry))
        names = (f"{module}.{suffix}" for suffix in ("weight", "scales", "biases"))
        arrays |= dict(zip(names, parts, strict=False))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    quantization = {**entry, **exceptions}
    write_json(
        folder / "config.json",
        published_config(SCALED)
        | {"quantization": quantization, "quantization_config": quantization},
    )
    index = {"metadata": {}, "weight_map": dict.fromkeys(arrays, "model.safetensors")}
    write_json(folder / INDEX, index)
    return ["source"]


def make_peft(folder: Path) -> list[str]:
    factors = make_factors(weights_of(SCALED), (TABLE, *LINEARS))
    write_peft_folder(folder, factors)
    return ["source", "--merge", "--model", "base"]


def make_adapter(folder: Path) -> list[str]:
    write_mlx_lm_adapter(folder, make_factors(weights_of(SCALED), LINEARS, dora=True))
    return ["source", "--merge", "--model", "base"]


# Damage to any file --------------------------------------------------------------

Damage = Callable[[random.Random, Path], object]


def flip(draw: random.Random, file: Path, *regions: range) -> None:
    """Flip one bit, sometimes three, each in one of the regions."""
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 3))):
        content[draw.choice(draw.choice(regions))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def any_file(draw: random.Random, folder: Path, pattern: str = "*") -> Path:
    return draw.choice(sorted(folder.glob(pattern)))


def cut(draw: random.Random, folder: Path) -> None:
    file = any_file(draw, folder)
    size = file.stat().st_size
    length = draw.choice((0, 1, 8, size // 2, size - 1, draw.randrange(size)))
    os.truncate(file, min(length, size - 1))


def lengthen(draw: random.Random, folder: Path) -> None:
    file = any_file(draw, folder)
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.choice((1, 22, 4096))))


def remove(draw: random.Random, folder: Path) -> None:
    any_file(draw, folder).unlink()


def replace_by_another(draw: random.Random, folder: Path) -> None:
    file = any_file(draw, folder)
    file.unlink()
    match draw.randrange(7):
        case 0:
            file.mkdir()
        case 1:
            file.symlink_to("nowhere")
        case 2:
            file.symlink_to(file.name)
        case 3:
            os.mkfifo(file)
        case 4:
            file.write_bytes(draw.randbytes(1000))
        case 5:
            file.write_text("version https://git-lfs.github.com/spec/v1\n")
        case 6:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("a/b", "c")


# Damage to JSON ------------------------------------------------------------------

WEIRD = [
    *(None, True, False, 0, -1, 1.5, 10**9, 2**31, 2**63, 10**400, 1e308, -1e-300),
    *(float("nan"), float("inf"), "", "64", "../../x", "\0", "a\nb", "\ud800", "~\0"),
    *(
        [],
        [[]],
        [1],
        [None] * 3,
        [0] * 3,
        [-1] * 3,
        [10**9] * 3,
        [2**62] * 3,
        ["1"] * 3,
    ),
    *({}, {"a": {}}, {"bits": 4}, {"bits": float("inf"), "group_size": 64}),
    *("é" * 1000, [1] * 10**5, "/dev/zero", "/etc/passwd", "~nobody/x", "a/b"),
]
UNVERIFIABLE = ("scale", "lora_alpha")


def flip_json(draw: random.Random, folder: Path) -> None:
    file = any_file(draw, folder, "*.json")
    before = file.read_bytes()
    values = _read_unverifiable(before)
    while True:
        flip(draw, file, range(len(before)))
        if _read_unverifiable(file.read_bytes()) == values:
            return
        file.write_bytes(before)


def _read_unverifiable(content: bytes) -> list[object]:
    """Return the numbers of a config that cannot be checked against tensors."""
    try:
        config = json.loads(content)
        inner = config.get("lora_parameters", config)
        return [inner.get(key) for key in UNVERIFIABLE]
    except (ValueError, AttributeError):
        return [2.0, None] if b"scale" in content else [None, 8]


def change_json(draw: random.Random, folder: Path) -> None:
    file = any_file(draw, folder, "*.json")
    content = json.loads(file.read_text())
    node = content
    while True:
        key = draw.choice(sorted(node))
        if not isinstance(node[key], dict) or draw.random() < 0.3 or not node[key]:
            break
        node = node[key]
    match draw.randrange(6):
        case 0:
            del node[key]
        case 1:
            node[f"{key}s"] = node.pop(key)
        case _:
            kinds = [w for w in WEIRD if key not in UNVERIFIABLE or not _is_number(w)]
            node[key] = draw.choice(kinds)
    file.write_text(json.dumps(content))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rewrite_json(draw: random.Random, folder: Path) -> None:
    file = any_file(draw, folder, "*.json")
    text = file.read_text()
    file.write_bytes(
        draw.choice(
            (
                b"",
                b"null",
                b"[]",
                b'"model_type"',
                b"{}",
                b"[" * 10**5,
                b'{"a":' * 990 + b"1" + b"}" * 990,
                b'{"model":' * 900 + b"1" + b"}" * 900,
                b"\xff\xfe" + text.encode("utf-16-le"),
                text.encode("utf-16"),
                b"\xef\xbb\xbf" + text.encode(),  # means the same
                text.replace("6", "6" * 5000).encode(),
                text.replace("{", "{,", 1).encode(),
                text[:-2].encode() + b', "model_dim": 64, "model_dim": 32}',
                text.replace('"', "\0").encode(),
            )
        )
    )


def damage_yaml(draw: random.Random, folder: Path) -> None:
    file = folder / "config.yaml"
    if draw.random() < 0.5:
        flip(draw, file, range(len(YAML)))
        return
    again = "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
    doubled = again.replace("[", "{x: ").replace(", *", ", y: *").replace("]", "}")
    file.write_text(
        draw.choice(
            (
                "",
                "{" * 2000,
                "model: &a {language_modeling: *a}",
                "model: &a [*a]",
                f"a0: &a0 {{x: 1}}\n{doubled}model: *a40",
                f"a0: &a0 [1]\n{again}model: *a40",
                "model: !!python/object/apply:os.mkdir [ran]",
                "model: !!python/object/new:os.mkdir {args: [ran]}",
                YAML.replace("300", "0x" + "f" * 5000),
                YAML.replace("300", "1e400"),
                YAML.replace("64", ".nan"),
                YAML.replace("64", "2001-99-99"),
                YAML.replace("gpt-test", "[1]"),
                YAML.replace("gpt-test", "OpenELM-3B"),
                YAML.replace("general_gpt:", "? [1]\n    :"),
                YAML.replace("model:", "1:"),
                YAML.replace("\n", "\n\t"),
                YAML + "\0",
            )
        )
    )


def damage_index(draw: random.Random, folder: Path) -> None:
    file = any_file(draw, folder, "*.index.json")
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    name, shard = draw.choice(sorted(index["weight_map"])), draw.choice(shards)
    targets = [
        *("../../x.safetensors", "/etc/passwd", f"../source/{shard}", f"./{shard}"),
        *(f"{shard}\0", f"{shard}\n", f"{shard}/", "", ".", "..", "~", "/dev/zero"),
        *(
            shard.upper(),
            f"{folder}/{shard}",
            "\ud800",
            "x" * 5000,
            "model*.safetensors",
        ),
        *(None, 1, [shard], {shard: 1}),
    ]
    match draw.randrange(5):
        case 0:
            index["weight_map"][name] = draw.choice(targets)
        case 1:
            target = draw.choice(targets)
            index["weight_map"] = dict.fromkeys(index["weight_map"], target)
        case 2:
            index["weight_map"] = {
                n: s for n, s in index["weight_map"].items() if s != shard
            }
        case 3:
            index["weight_map"] = draw.choice(WEIRD)
        case 4:
            index["weight_map"][draw.choice(["", "\0", "a\nb"])] = shard
    file.write_text(json.dumps(index))


# Damage to safetensors -----------------------------------------------------------


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(file: Path, header: Mapping[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def flip_header(draw: random.Random, folder: Path) -> None:
    file = any_file(draw, folder, "*.safetensors")
    length = int.from_bytes(file.read_bytes()[:8], "little")
    flip(draw, file, range(8), *[range(8, 8 + length)] * 9)


def change_header_length(draw: random.Random, folder: Path) -> None:
    file = any_file(draw, folder, "*.safetensors")
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    others = (0, 1, length - 1, length + 1, length + 8, len(content), 10**8, 2**31)
    other = draw.choice((*others, 2**60, 2**63, 2**64 - 8, 2**64 - 1))
    file.write_bytes(other.to_bytes(8, "little") + content[8:])


def change_header(draw: random.Random, folder: Path) -> None:
    file = any_file(draw, folder, "*.safetensors")
    header, data = split(file)
    names = sorted(name for name in header if name != "__metadata__")
    name, other = draw.sample(names, 2)
    entry = header[name]
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    match draw.randrange(9):
        case 0:
            same_sizes = {
                "F32": ["I32", "U32"],
                "U32": ["I32", "F32"],
                "U8": ["I8", "BOOL"],
            }
            kinds = ["F64", "I64", "C64", "F4", "f32", "", None, 5]
            same_size = same_sizes.get(entry["dtype"], ["I16", "U16"])
            entry["dtype"] = draw.choice([*kinds, *same_size * 4])
        case 1:
            entry["shape"] = draw.choice(
                [
                    *([], [0], [*shape, 0], [-1], [2**40, 2**40], [2**63], [2**64]),
                    *([1, *shape], [*shape, 1], [s * 2 for s in shape], [1.5], ["64"]),
                    *(None, 64, "64", [[64]], [s // 2 for s in shape], [1] * 10**4),
                    [s + 1 for s in shape],
                ]
            )
        case 2:  # a transposed shape, of as many numbers
            matrices = [n for n in names if len({*header[n]["shape"]}) == 2]
            chosen = header[draw.choice(matrices)]
            chosen["shape"] = chosen["shape"][::-1]
        case 3:
            entry["data_offsets"] = draw.choice(
                [
                    *([0, 2**60], [end, start], [start, start], [start + 4, end + 4]),
                    *([-4, end], [start], [start, end, end], [2**63, 2**63 + 8], None),
                    *([start, end - 4], [0.0, 1e3], "0", header[other]["data_offsets"]),
                ]
            )
        case 4:
            named = ["", "x", f"module.{name}", f"{name}.", f"{other}.x", f"../{name}"]
            named += [
                name.upper(),
                f"{name}\0",
                f"{name}\n",
                "\ud800",
                "é",
                "x" * 10**5,
            ]
            header[draw.choice(named)] = header.pop(name)
        case 5:
            del header[name]
        case 6:  # another valid tensor, which may have the name of an existing one
            names = ["x", f"module.{name}", f"module.module.{name}", "lm_head.weight"]
            names += [name.removeprefix("transformer."), f"{name}.scales"]
            more = data[start:end]
            extra = {**entry, "data_offsets": [len(data), len(data) + len(more)]}
            header[draw.choice(names)] = extra
            data += more
        case 7:
            header["__metadata__"] = draw.choice(
                [
                    {"a": 1},
                    [],
                    "x",
                    {"a": "\ud800"},
                    {"x" * 10**5: "y"},
                    {"a": {"b": 1}},
                ]
            )
        case 8:
            header[name] = draw.choice(WEIRD)
    join(file, header, data)


def rewrite_header(draw: random.Random, folder: Path) -> None:
    file = any_file(draw, folder, "*.safetensors")
    header, data = split(file)
    text = json.dumps(header).encode()
    name = draw.choice(sorted(header))
    entry = json.dumps({name: header[name]}).encode()
    join(
        file,
        draw.choice(
            (
                b"",
                b"{}",
                b"[]",
                b"null",
                b"[" * 10**5,
                b'{"a":' * 10**5,
                b" " * 10**5 + text,
                text + b" " * 10**5,
                text + b"\0",
                text + text,
                text[:-1] + b"," + entry[1:],  # a duplicate key
                text.replace(b'"', b"\xff"),
                text.decode().encode("utf-16"),
            )
        ),
        data,
    )


def store_nan(draw: random.Random, folder: Path) -> None:
    """Put NaN or infinity into a weight, its scales or its biases."""
    file = any_file(draw, folder, "*.safetensors")
    header, data = split(file)
    patterns = {
        "F32": (b"\0\0\xc0\x7f", b"\0\0\x80\xff"),
        "F16": (b"\0\x7e", b"\0\xfc"),
        "BF16": (b"\xc0\x7f", b"\x80\xff"),
        "U8": (b"\xff",),  # a scale of mxfp8
    }
    names = [n for n in header if n != "__metadata__"]
    names = [n for n in names if header[n]["dtype"] in patterns]
    entry = header[draw.choice(names)]
    number = draw.choice(patterns[entry["dtype"]])
    start, end = entry["data_offsets"]
    at = start + len(number) * draw.randrange((end - start) // len(number))
    join(file, header, data[:at] + number + data[at + len(number) :])


# Damage to torch's files ---------------------------------------------------------


def torch_file(draw: random.Random, folder: Path) -> Path:
    return draw.choice(sorted([*folder.glob("*.pt"), *folder.glob("*.bin")]))


def load(file: Path) -> dict[str, Any]:
    state = torch.load(file, weights_only=True)
    return state.get("model_state_dict", state)


def flip_zip(draw: random.Random, folder: Path) -> None:
    """Flip a bit in the headers or directory of the zip, or in the pickle."""
    file = torch_file(draw, folder)
    content, numbers, pickled = file.read_bytes(), [], range(0)
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            at = entry.header_offset
            start = at + 30 + sum(struct.unpack("<HH", content[at + 26 : at + 30]))
            region = range(start, start + entry.file_size)
            if "/data/" in entry.filename:
                numbers.append(region)
            elif entry.filename.endswith("data.pkl"):
                pickled = region
        directory = range(archive.start_dir, len(content))
    ends = [0, *(region.stop for region in numbers)]
    headers = [
        range(end, region.start) for end, region in zip(ends, numbers, strict=False)
    ]
    flip(draw, file, pickled, directory, draw.choice(headers))


def change_state(draw: random.Random, folder: Path) -> None:
    file = torch_file(draw, folder)
    state = load(file)
    name, other = draw.sample(sorted(state), 2)
    value = state[name]
    match draw.randrange(8):
        case 0:
            del state[name]
        case 1:
            names = [f"{name}.x", f"module.{name}", f"x.{name}", "", "\0", "a\nb", "é"]
            state[draw.choice(names)] = state.pop(name)
        case 2:
            extra = ["x", f"module.{name}", f"{other}.weight", "layers.99.norm.weight"]
            state[draw.choice([*extra, "layers.0.lora_A.lora.weight"])] = value
        case 3:
            kinds = [torch.int64, torch.int32, torch.uint8, torch.bool]
            kinds += [torch.complex64, torch.float8_e4m3fn, torch.int16]
            state[name] = value.to(draw.choice(kinds))
        case 4:
            matrices = [n for n, v in state.items() if len({*v.shape}) == 2]
            chosen = draw.choice(matrices)
            state[chosen] = state[chosen].T.contiguous()
        case 5:
            shapes = [value[:0], value[:1], value[None], value.flatten()[:-1]]
            shapes += [torch.cat([value, value]), torch.ones(()), torch.ones(2, 3, 4)]
            state[name] = draw.choice(shapes).clone()
        case 6:
            value.flatten()[draw.randrange(value.numel())] = draw.choice(
                [float("nan"), float("inf"), float("-inf")]
            )
        case 7:
            values = [None, 1, "x", [value], {"a": value}, (value, value), 1.5]
            state[name] = draw.choice(values)
    torch.save(state, file)


def change_pickle(draw: random.Random, folder: Path) -> None:
    """Store a wrong shape, stride, offset, length, kind or key of one tensor."""
    file = torch_file(draw, folder)
    state = load(file)
    described = {
        name: {
            "key": str(i),
            "shape": tuple(value.shape),
            "strides": value.stride(),
            "length": value.numel(),
        }
        for i, (name, value) in enumerate(state.items())
    }
    records = {f"data/{i}": v.numpy().tobytes() for i, v in enumerate(state.values())}
    name, other = draw.sample(sorted(state), 2)
    one = described[name]
    same_shape = [
        n for n, d in described.items() if d["shape"] == one["shape"] and n != name
    ]
    another = described[draw.choice(same_shape or [other])]
    rows, *rest = one["shape"]
    changed: dict[str, list[Any]] = {
        "shape": [
            *((2**40,) * len(one["shape"]), (2**62, *rest), (-1, *rest), (0, *rest)),
            *((1.5, *rest), (rows,), (rows, *rest, 1), (), (2**31,) * 40, (rows + 1,)),
            *(None, [rows, *rest], (rows + 1, *rest), (10**30, *rest), ("64", *rest)),
        ],
        "strides": [
            *((0,) * len(one["shape"]), (2**40,) * len(one["shape"]), (-1,), None),
            *((rows,) * len(one["shape"]), (1,) * (1 + len(rest)) if rest else (2,)),
        ],
        "length": [0, 1, 2**40, 2**62, -1, one["length"] - 1, one["length"] + 1, None],
        "offset": [1, -1, 2**40, 2**62, one["length"], None, 1.5],
        "kind": ["LongStorage", "HalfStorage", "ByteStorage", "DoubleStorage", "X"],
        "key": ["", "99", "../0", "\0", *[another["key"]] * 3, f"{one['key']}\n"],
    }
    part = draw.choice(sorted(changed))
    one[part] = draw.choice(changed[part])
    items = {
        n: tensor(
            offset=d.get("offset", 0),
            shape=d["shape"],
            strides=d["strides"],
            **{k: d[k] for k in ("key", "kind", "length") if d.get(k) is not None},
        )
        for n, d in described.items()
    }
    file.write_bytes(zipped(mapping(**items), records))


def change_records(draw: random.Random, folder: Path) -> None:
    file = torch_file(draw, folder)
    with zipfile.ZipFile(file) as archive:
        records = {e.filename: archive.read(e) for e in archive.infolist()}
    name = draw.choice(sorted(records))
    root = name.partition("/")[0]
    compression = zipfile.ZIP_STORED
    match draw.randrange(6):
        case 0:
            del records[name]
        case 1:
            renamed = [f"../{name}", f"/{name}", f"{name}\n", "x/y", name.upper()]
            records[draw.choice(renamed)] = records.pop(name)
        case 2:
            compression = zipfile.ZIP_DEFLATED
        case 3:
            records[name] = records[name][: draw.randrange(len(records[name]))]
        case 4:
            records[f"{root}/data.pkl"] = draw.randbytes(200)
        case 5:
            records[f"{root}/byteorder"] = b"big"
    with zipfile.ZipFile(file, "w", compression) as archive:
        for key, content in records.items():
            archive.writestr(key, content)


def redirect_record(draw: random.Random, folder: Path) -> None:
    """Change the zip's directory so that a record points to another one."""
    file = torch_file(draw, folder)
    content, fields = bytearray(file.read_bytes()), []
    with zipfile.ZipFile(file) as archive:
        at = archive.start_dir
        for _ in archive.infolist():
            fields.append(at + 42)  # field with the offset of the record's header
            at += 46 + sum(struct.unpack("<HHH", content[at + 28 : at + 34]))
    one, other = draw.sample(fields, 2)
    content[one : one + 4] = content[other : other + 4]
    file.write_bytes(content)


def run_code(draw: random.Random, folder: Path) -> None:
    """Let the pickle call functions; most would create a folder if they ran."""
    file = torch_file(draw, folder)
    calls = (
        b"cposix\nmkdir\n(X\x03\x00\x00\x00ranK\x01tR",
        b"c__builtin__\neval\n(X\x15\x00\x00\x00__import__('os').mkdirtR",
        b"(X\x03\x00\x00\x00raniposix\nmkdir\n",
        b"X\x05\x00\x00\x00posixX\x05\x00\x00\x00mkdir\x93(X\x03\x00\x00\x00rantR",
        b"ctorch\nload\n(X\x03\x00\x00\x00rantR",
        b"ctorch.storage\n_load_from_bytes\n(C\x01.tR",
        b"cnumpy\nones\n(J\xff\xff\xff\x7ftR",
        b"(cposix\nmkdir\nX\x03\x00\x00\x00rano",
        b"ctorch._utils\n_rebuild_tensor_v2\n(cposix\nmkdir\ntR",
    )
    call_it = draw.choice(calls)
    state = load(file)
    records = {f"data/{i}": v.numpy().tobytes() for i, v in enumerate(state.values())}
    items = {
        name: tensor(
            shape=tuple(v.shape), strides=v.stride(), key=str(i), length=v.numel()
        )
        for i, (name, v) in enumerate(state.items())
    }
    place = draw.choice(["front", *items])
    items = (
        {"front": call_it, **items} if place == "front" else {**items, place: call_it}
    )
    file.write_bytes(zipped(mapping(**items), records))


# The kinds -----------------------------------------------------------------------

ANY: tuple[Damage, ...] = (cut, lengthen, remove, replace_by_another)
JSON: tuple[Damage, ...] = (flip_json, change_json, rewrite_json)
SAFETENSORS: tuple[Damage, ...] = (
    *(flip_header, flip_header, change_header, change_header),
    *(change_header_length, rewrite_header, store_nan),
)
TORCH: tuple[Damage, ...] = (
    *(flip_zip, flip_zip, flip_zip, change_state, change_state),
    *(change_pickle, change_pickle, change_records, redirect_record, run_code),
)


@dataclass(frozen=True)
class Kind:
    make: Callable[[Path], list[str]]
    damages: tuple[Damage, ...]


KINDS = {
    "CoreNet": Kind(make_checkpoint, (*ANY, damage_yaml, damage_yaml, *TORCH)),
    "CoreNet LoRA": Kind(make_lora, (*ANY, *TORCH)),
    "shards": Kind(make_shards, (*ANY, *JSON, damage_index, *SAFETENSORS)),
    "bins": Kind(make_bins, (*ANY, *JSON, damage_index, *TORCH)),
    "Apple 4-bit": Kind(make_apple, (*ANY, *JSON, *SAFETENSORS)),
    "mlx-lm quantized": Kind(make_quantized, (*ANY, *JSON, damage_index, *SAFETENSORS)),
    "PEFT adapter": Kind(make_peft, (*ANY, *JSON, *SAFETENSORS)),
    "mlx-lm adapter": Kind(make_adapter, (*ANY, *JSON, *SAFETENSORS)),
}


@contextmanager
def watched(case: str = "") -> Iterator[None]:
    """Fail on a hang, and on more memory than a small file needs."""

    def stop(*_: object) -> None:
        raise AssertionError(f"{case}: still running after {SECONDS} s")

    mx.reset_peak_memory()
    before = mx.get_active_memory()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # for hangs in C code
    tracemalloc.start()
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert max(peak, mx.get_peak_memory() - before) < MEGABYTES * 2**20, case


@contextmanager
def limited_memory() -> Iterator[None]:
    """Limit the address space of this process to little more than it has now.

    A failed allocation in MLX ends the process, so the limit must be removed after the
    runs: the process grows a little with each.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + 4 * MEGABYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def convert(*args: str) -> Any:
    out = ("--mlx-path", "out", "--tokenizer", "tokenizer.model", "--offline")
    return call("convert", *args, *out)


def corrupt(
    kind: str, count: int, seed: int, folder: Path, *, limited: bool = False
) -> Counter[str]:
    """Damage a source `count` times; return how often it was refused or read.

    Args:
        limited: limit the memory of this process until the function returns.
    """
    source_kind = KINDS[kind]
    folder.mkdir(parents=True)
    os.chdir(folder)
    Path("tokenizer.model").write_bytes(small_tokenizer().model_proto)
    args = source_kind.make(Path("source"))
    if "base" in args:
        named = on_the_hub(weights_of(SCALED))
        write_hub_folder(Path("base"), published_config(SCALED), named)
    assert convert(*args).exit_code == 0
    expected = raw_tensors(Path("out"))
    shutil.rmtree("out")
    Path("source").rename("whole")
    outcomes: Counter[str] = Counter()
    with limited_memory() if limited else nullcontext():
        for i in range(count):
            damage = source_kind.damages[i % len(source_kind.damages)]
            case = f"{kind}, seed {seed}, number {i}: {damage.__name__}"
            shutil.copytree("whole", "source")
            damage(random.Random(f"{kind} {seed} {i}"), Path("source"))
            before = snapshot(folder)
            with watched(case):
                result = convert(*args)
            if result.exit_code == 0:
                assert raw_tensors(Path("out")) == expected, case
                shutil.rmtree("out")
            else:
                assert isinstance(result.exception, SystemExit), (
                    case,
                    result.exception,
                )
                assert (result.exit_code, result.stdout) == (1, ""), case
                assert re.fullmatch(r"error: \S.*\.\n", result.stderr), (
                    case,
                    result.stderr,
                )
            assert snapshot(folder) == before, case
            outcomes["read" if result.exit_code == 0 else "refused"] += 1
            shutil.rmtree("source")
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_sources_are_refused_or_read_correctly(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # and back afterwards
    count = len(KINDS[kind].damages)  # each of them
    outcomes = corrupt(kind, count, 0, tmp_path / "work")
    assert outcomes["refused"] > count // 2, outcomes


@pytest.mark.skipif(sys.platform != "linux", reason="uses Linux memory limits")
@pytest.mark.parametrize(
    ("count", "seeds"),
    [
        pytest.param(60, "1", marks=pytest.mark.proof),
        pytest.param(200, "123", marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_sources_with_limited_memory(tmp_path, kind, count, seeds):
    code = "import sys, test_corruptions; test_corruptions.corrupt_many(*sys.argv[1:])"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, SUPPORT, Path(__file__).parent))),
        "MALLOC_ARENA_MAX": "2",  # each thread's arena would reserve 64 MB more
    }
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), kind, str(count), seeds],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    print(kind, result.stdout)


def corrupt_many(folder: str, kind: str, count: str, seeds: str) -> None:
    """Damage a source `count` times with each seed, a digit; print the outcomes."""
    for seed in seeds:
        work = Path(folder, f"seed-{seed}")
        outcomes = corrupt(kind, int(count), int(seed), work, limited=seed == "1")
        assert outcomes["refused"] > int(count) // 2, outcomes
        print(dict(outcomes))
