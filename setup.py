"""Packaging: each dependency with the oldest version meant to work, and the reason it is there."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

LOSS = [  # what someone with another trainer needs: the loss, nothing else
    "torch>=2.11",  # the loss is written in it; the oldest version it is meant to run on
    "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",  # the loss's GPU kernels
    "numpy>=1.26",  # torch's bridge to arrays
]
TRAIN = [
    "transformers>=5.17",  # encoders, tokenizers, learning-rate schedules
    "tokenizers>=0.23.1",  # trains the demo's tokenizer; as transformers 5.17 wants it
    "huggingface_hub>=1.5",  # asks the hub once, model cards; as transformers 5.17 wants it
    "safetensors>=0.8",  # checkpoints without pickle; as transformers 5.17 wants it
    "deepspeed>=0.19.2",  # ZeRO; coalesce_grad_reduction came with 0.19.2
    "numba>=0.62",  # batch plan, packing, bitext search
    "jsonargparse[signatures]>=4.51",  # YAML + command line -> frozen dataclasses; before 4.51 "# a" became null
    "PyYAML>=6",  # writes the resolved settings
    "defusedxml>=0.7",  # TMX without entity bombs
    "fsspec>=2024.6",  # .gz, .zip members, globs
    "zstandard>=0.22",  # .zst
    "langcodes>=3.5",  # one code per language, whatever the source calls it
    "xxhash>=3.4.1",  # hashes of texts and files
    "regex>=2025.10.22",  # words of every script, for code-switching; as transformers 5.17 wants it
    "Babel>=2.18",  # CLDR: the embedded demo; 2.17 raises KeyError on compact numbers
    "matplotlib>=3.9",  # loss curves, heat maps
    "tensorboard>=2.18",  # event files; 2.17 and onnx want different protobufs
    "tqdm>=4.66.3",  # progress bars; as datasets 4.0 wants it
]
EXTRAS = {
    "train": TRAIN,
    "faiss-cpu": ["faiss-cpu>=1.10"],  # top-k search
    "gpu": ["faiss-gpu>=1.15", "flash-attn>=2.8"],  # the same on GPUs (instead of faiss-cpu); attention without padding
    "hf": [
        "datasets>=4.0",  # sources of format hf
        "numpy>=2.0",  # the pyarrow that datasets brings refuses an older one
    ],
    "ir-datasets": ["ir-datasets>=0.5.9"],  # sources of this format; the oldest that was tried
    "st": [
        "sentence-transformers>=6.0",  # its losses' drop-ins; checks exported models
        "accelerate>=1.0",  # its trainer, and transformers' own
        "datasets>=4.0",  # what its trainer reads
        "numpy>=2.0",  # see hf
    ],
    "mteb": ["mteb>=2.15"],  # public benchmarks; 2.15 is the oldest that was tried
    "onnx": [  # exports for serving without torch, and encoding in 8 bits; the oldest that were tried
        "onnx>=1.23",  # the file format
        "onnxscript>=0.7",  # what torch's exporter is written in
        "onnxruntime>=1.32",  # quantises, and runs the graph
    ],
    "track": [  # train.track
        "trackio>=0.43",  # run tracking in a local file; the first to run beside huggingface_hub 2
        "wandb>=0.19",  # run tracking on a server, or offline; 0.19 is the oldest that was tried
    ],
    "lora": ["peft>=0.17"],  # adapters
    "dev": [
        "pytest>=8.3",
        "pytest-xdist>=3.6.1",  # tests on two cores
        "pytest-timeout>=2.3.1",  # a hanging rank fails a test instead of the whole run
        "pytest-benchmark>=5.1",  # bench/
        "pytrec-eval-terrier>=0.5.6",  # the oracle of the retrieval metrics
        "hypothesis>=6.100",  # draws the loss's options
        "scipy>=1.14",  # chi-square tests of what the batch plan draws
        "gradcache>=0.0.1",  # its cache step runs our loss in a test
        "ruff>=0.12",
    ],
}


class BuildTiles(build_ext):
    """Builds the loss and the counts of ranks for CPUs where torch and a compiler are at hand. Elsewhere these run in
    torch, and `hbt_fast.explain` says so. Against torch's stable ABI: one build serves every torch from 2.11 on.
    """

    def run(self) -> None:
        try:
            from torch.utils import cpp_extension
        except ImportError:
            print("hbt_fast: no torch to build csrc/ against (--no-build-isolation lets it be found)", file=sys.stderr)
            self.extensions.clear()
        for extension in self.extensions:
            extension.include_dirs = cpp_extension.include_paths()
            extension.library_dirs = cpp_extension.library_paths()
        super().run()


TILES = Extension(
    "hbt_fast._tiles",
    ["csrc/tiles.cpp", "csrc/counts.cpp"],
    libraries=["torch", "torch_cpu"],
    define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030b0000")],
    extra_compile_args=["-O3", "-std=c++20", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-w"],
    py_limited_api=True,
    optional=True,
)

setup(
    name="hbt-fast",
    version="0.1.0",
    description="Hybrid batch training for multilingual dense retrieval: fast, exact, simple",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["hbt_fast", "hbt_fast.*"]), "hbt_fast.kernels"],
    package_dir={"hbt_fast.kernels": "kernels"},
    ext_modules=[TILES],
    cmdclass={"build_ext": BuildTiles},
    install_requires=LOSS,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "hbt-train = hbt_fast.train:run",
            "hbt-prepare = hbt_fast.prepare:main",
            "hbt-plan = hbt_fast.plan:main",
            "hbt-estimate = hbt_fast.estimate:run",
            "hbt-mine = hbt_fast.mine:main",
            "hbt-vocabulary = hbt_fast.vocabulary:main",
            "hbt-lexicon = hbt_fast.lexicon:main",
            "hbt-encode = hbt_fast.encode:main",
            "hbt-evaluate = hbt_fast.evaluate:main",
            "hbt-compare = hbt_fast.compare:main",
            "hbt-report = hbt_fast.report:main",
        ]
    },
)
