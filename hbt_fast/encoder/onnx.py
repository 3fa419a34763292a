"""An encoder's transformer as ONNX: for runtimes without torch, and in 8 bits for `Encoder` itself on CPUs."""

from __future__ import annotations

from copy import copy, deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import xxhash
from torch import Tensor, nn

from hbt_fast.encoder.model import Encoder, EncoderError, room

ONE_FILE = 2**31 - 2**26  # bytes: protobuf ends at 2 GiB; larger weights go into a file beside the graph


def export_onnx(encoder: Encoder, folder: str | Path, *, int8: bool = False) -> list[Path]:
    """Write onnx/model.onnx into a folder, where sentence-transformers' backend="onnx" and optimum look for it.

    Its inputs are input_ids and attention_mask, (n, L) int64, its output is last_hidden_state, (n, L, d) float32.

    Args:
        encoder: is left as it is.
        folder: what `hbt_fast.encoder.export.export` wrote.
        int8: write onnx/model_qint8.onnx too: matrices and embeddings in 8 bits, activations quantised as they come.

    Returns:
        The files.

    Raises:
        EncoderError: onnx, onnxscript or onnxruntime are not installed, or the model cannot be exported.
    """
    try:
        import onnx  # noqa: F401 - torch imports it
        import onnxscript  # noqa: F401

        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise EncoderError(f'{error.name} is not installed: pip install "hbt-fast[onnx]"') from None

    path = Path(folder) / "onnx" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    states = _HiddenStates(encoder.model).eval()
    large = sum(p.numel() * p.element_size() for p in states.parameters()) > ONE_FILE
    ids_nL = torch.zeros(2, 8, dtype=torch.long)
    shape = {0: "n", 1: "L"}
    try:
        torch.onnx.export(
            states,
            (ids_nL, torch.ones_like(ids_nL)),
            path,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_shapes=(shape, shape),
            dynamo=True,
            external_data=large,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise EncoderError(f"{encoder.model.config.model_type} cannot be exported as ONNX: {reason}") from error
    paths = [path]
    if int8:
        paths.append(path.with_name("model_qint8.onnx"))
        quantize_dynamic(
            path,
            paths[1],
            per_channel=True,
            reduce_range=True,  # to 7 bits: sums of products of 8 overflow on CPUs without VNNI
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
        )
    return paths + [p.with_name(f"{p.name}.data") for p in paths if large]


def in_8_bits(encoder: Encoder) -> Encoder:
    """The encoder with its transformer in 8 bits, run by onnxruntime: for `encode` on CPUs, in this process.

    Texts are padded (sorted by length first). Where a CPU has bf16 products, bf16 is faster and nearer to float32.

    Args:
        encoder: on the CPU; its transformer is replaced.

    Raises:
        EncoderError: see `export_onnx`; or the encoder is not on the CPU.
    """
    if encoder.device.type != "cpu":
        raise EncoderError(f"8 bits are for CPUs, and the encoder is on {encoder.device}; take bf16 there")
    with TemporaryDirectory(prefix="hbt-int8-") as folder:
        encoder.model = _Session(encoder.model, export_onnx(encoder, folder, int8=True)[1])
    return encoder


class _Session(nn.Module):
    """What onnxruntime makes of padded rows, as transformers would return it.

    Args:
        model: of transformers, which was exported.
        path: of its ONNX file.

    Attributes:
        room: see `hbt_fast.encoder.model.room`.
    """

    def __init__(self, model: nn.Module, path: Path) -> None:
        import onnxruntime

        super().__init__()
        self.room, self.config = room(model), copy(model.config)
        self.config._attn_implementation = "onnx"  # so that `Encoder` gives it padded rows
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        digest = xxhash.xxh3_128_digest(path.read_bytes())  # stands for the weights where these are identified
        self.digest = nn.Parameter(torch.frombuffer(bytearray(digest), dtype=torch.uint8), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """last_hidden_state, (n, L, d) float32."""
        rows = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        (hidden_nLd,) = self.session.run(["last_hidden_state"], rows)
        return SimpleNamespace(last_hidden_state=torch.from_numpy(hidden_nLd))


class _HiddenStates(nn.Module):
    """A copy of a model in float32 on the CPU, with an attention that can be exported.

    Args:
        model: of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = deepcopy(model).cpu().float()
        self.model.set_attn_implementation("sdpa")
        self.model.config.use_cache = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The last hidden states, (n, L, d)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
