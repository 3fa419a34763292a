"""A process that encodes on one device: ``python -m hbt_fast.encoder.worker DEVICE``, started by `encoding`.

It reads a line of JSON that says what encodes and how, then a line for each list of texts (the number of the first, and
they), and writes their vectors as `hbt_fast.data.tokenise.send` does, or the message of an error in place of them.
"""

from __future__ import annotations

import signal
import sys
from typing import BinaryIO

import torch

from hbt_fast.data.tokenise import send, value_of
from hbt_fast.encoder.encoding import How, embed
from hbt_fast.encoder.model import Encoder, EncoderError


def serve(device: str, source: BinaryIO, target: BinaryIO) -> None:
    """Encode lists of texts from `source` to `target` until there are no more."""
    setup = value_of(source.readline())
    weights, autocast = getattr(torch, setup.pop("weights")), setup.pop("autocast")
    encoder = Encoder.from_pretrained(setup.pop("folder")).to(device, weights).eval()
    encoder.autocast = autocast and getattr(torch, autocast)
    how = How(**setup)
    for line in source:
        try:
            first, texts = value_of(line)
            send(target, {"vectors": embed(encoder, texts, how, first).reshape(-1)})
        except (EncoderError, torch.OutOfMemoryError) as error:
            send(target, str(error))


if __name__ == "__main__":
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it by closing the pipe
    results, sys.stdout = sys.stdout.buffer, sys.stderr
    serve(sys.argv[1], sys.stdin.buffer, results)
