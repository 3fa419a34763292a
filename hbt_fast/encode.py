"""The encoding program: ``python -m hbt_fast.encode MODEL corpus.jsonl --field text --as passage --out corpus.npy``.

Writes one vector per text as a .npy file, in the order of the texts; started again after an interruption it goes on.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hbt_fast.base.programs import program
from hbt_fast.data.rows import DataError
from hbt_fast.encoder.pooling import POOLINGS

if TYPE_CHECKING:
    import torch

    from hbt_fast.encoder import Encoder

CPUINFO = Path("/proc/cpuinfo")
JSON_LINES = re.compile(r"\.(jsonl|ndjson)\b")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_encoder_arguments(parser: argparse.ArgumentParser, precision: str = "auto") -> None:
    """The arguments that `load_encoder` reads.

    Args:
        parser: gets them.
        precision: the default.
    """
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a name on the hub")
    parser.add_argument("--pooling", choices=POOLINGS, help="default: the one recorded with the model, else mean")
    parser.add_argument("--max-length", type=at_least_one, metavar="N", help="tokens per text")
    what = (
        "of weights and products; auto: bf16 where the device computes in it, else fp32; int8: by onnxruntime on a CPU "
        f"(extra onnx); default: {precision}"
    )
    parser.add_argument("--precision", default=precision, choices=["auto", *PRECISIONS, "int8"], help=what)


def load_encoder(args: argparse.Namespace, device: str) -> Encoder:
    """The encoder that the command line names, on the device, in evaluation mode.

    Raises:
        EncoderError: it cannot be loaded.
    """
    import torch

    from hbt_fast.encoder import Encoder

    encoder = Encoder.from_pretrained(args.model, pooling=args.pooling, max_length=args.max_length)
    if args.precision == "int8":
        from hbt_fast.encoder.onnx import in_8_bits

        return in_8_bits(encoder.to(device)).eval()
    auto = args.precision == "auto"
    return encoder.to(device, native_dtype(device) if auto else getattr(torch, PRECISIONS[args.precision])).eval()


def native_dtype(device: str) -> torch.dtype:
    """bfloat16 where a device's matrix products have it in hardware, else float32.

    Args:
        device: as torch names it, "cuda:1" or "cpu".
    """
    import torch

    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16. oneDNN says yes for AVX512 alone too, where it emulates that."""
    import torch

    if not (torch.ops.mkldnn._is_mkldnn_bf16_supported() and CPUINFO.exists()):
        return False
    flags = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, Arm
    return not flags.isdisjoint(CPUINFO.read_text(encoding="utf-8").split())


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; exits with 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m hbt_fast.encode", description="Texts to vectors.")
    add_encoder_arguments(parser)
    files = "texts, one a line, or JSON Lines with --field; may be .gz, a glob, or zip://MEMBER::ARCHIVE"
    parser.add_argument("files", nargs="+", metavar="FILE", help=files)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.npy", help="what to write")
    field = "the files are JSON Lines, this field is the text; more than one are joined by a space (--field title ...)"
    parser.add_argument("--field", action="append", help=field)
    before = parser.add_mutually_exclusive_group(required=True)
    recorded = "put the prompt before them that is recorded with the model"
    before.add_argument("--as", choices=["query", "passage"], dest="kind", help=recorded)
    before.add_argument("--prompt", help='put this before every text; "" for nothing')
    of = "with --as: that of a source which the model was trained on, where it had prompts of its own"
    parser.add_argument("--prompts-of", metavar="SOURCE", help=of)
    parser.add_argument("--batch-tokens", type=at_least_one, default=8192, metavar="N", help="tokens per forward pass")
    parser.add_argument("--dimensions", type=at_least_one, metavar="N", help="keep the first N, normalised again")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="of the vectors")
    parser.add_argument("--devices", metavar="cuda:0,cuda:1", help="a process on each; default: all GPUs, else one")
    return parser.parse_args(argv)


def texts_of(files: Sequence[str], fields: Sequence[str] | None) -> Iterator[str]:
    """The texts of files, one after the other.

    Args:
        files: see `hbt_fast.data.sources.expand`.
        fields: of JSON Lines; None: every line is a text.

    Raises:
        DataError: names file and line.
    """
    from hbt_fast.data.problems import Strict
    from hbt_fast.data.reading import lines, records, refuse_half_pairs
    from hbt_fast.data.sources import expand

    for path in (path for name in files for path in expand(name)):
        if not fields:
            for number, text in lines(path):
                if number == 1 and JSON_LINES.search(path) and text.lstrip().startswith("{"):
                    raise DataError(f"{path}: holds JSON Lines; say which field is the text, as --field text")
                yield text
            continue
        for where, record in records(path, Strict()):
            parts = [record[field] for field in fields if record.get(field)]
            if not parts or not all(isinstance(part, str) for part in parts):
                empty = "; it is empty" if any(record.get(field) == "" for field in fields) else ""
                have = ", ".join(record)
                raise DataError(f"{where}: no text in field {' or '.join(fields)}{empty}; the fields are: {have}")
            refuse_half_pairs(parts, where)
            yield " ".join(parts)


@program("hbt_fast.encode", ValueError)  # what libraries raise for files of people
def main(argv: Sequence[str] | None = None) -> None:
    """Encode from the command line."""
    args = parse(argv)
    import torch

    from hbt_fast.encoder.encoding import check_devices

    # a wrong path is said before a model is loaded, and a broken first line
    next(texts_of(args.files, args.field), None)
    devices = args.devices.split(",") if args.devices else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if args.precision == "int8":
        if args.devices not in (None, "cpu"):
            raise DataError(
                f"--precision int8 runs on the CPU, in one process, and --devices is {args.devices}; leave one out"
            )
        devices = ["cpu"]
    check_devices(devices)
    device = devices[0] if len(devices) == 1 else "cpu"
    encoder, prompt = load_encoder(args, device), _prompt(args)
    if len(devices) > 1 and args.precision == "auto":
        encoder.to(native_dtype(devices[0]))
    started = time.perf_counter()
    vectors_nd = encoder.encode(
        texts_of(args.files, args.field),
        prompt,
        batch_tokens=args.batch_tokens,
        dimensions=args.dimensions,
        dtype=args.dtype,
        devices=devices if len(devices) > 1 else None,
        out=args.out,
        progress=sys.stderr.isatty(),
    )
    (count, dimensions), took = vectors_nd.shape, time.perf_counter() - started
    print(f"{args.out}: {count:,} vectors of {dimensions} dimensions, {args.dtype}; {count / took:,.0f} texts/s")


def _prompt(args: argparse.Namespace) -> str:
    """The prompt of the command line. What the model does not record is not made up: E5's is not another's."""
    from hbt_fast.encoder.prompts import RECORDED, choose_prompts

    if args.kind is None:
        if args.prompts_of:
            raise DataError("--prompts-of goes with --as query or --as passage, not with --prompt; leave one out")
        print(f"prompt {args.prompt!r} (command line)", flush=True)
        return args.prompt
    prompt = getattr(choose_prompts(args.model, {}, option="--prompt", of=args.prompts_of), args.kind)
    if prompt.source != RECORDED and not args.prompts_of:
        raise DataError(
            f"no prompt is recorded with {args.model}; in place of --as {args.kind} give --prompt with what its model "
            f"card says, such as --prompt '{args.kind}: ' for E5, or --prompt '' for none"
        )
    print(prompt.line, flush=True)
    return prompt.text


def at_least_one(text: str) -> int:
    """A command line's whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return int(text)


if __name__ == "__main__":
    main()
