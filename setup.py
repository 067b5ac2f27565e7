"""Packages, dependencies by range, and console commands."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="diffusion-dpo",
    version="0.1.0",
    description="Preference alignment of text-to-image diffusion models: Diffusion-DPO and DDE, with Triton kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The diffusion-dpo developers",
    license="Apache-2.0",
    project_urls={  # no address of its own until it has a public one
        "Diffusion-DPO, the paper": "https://arxiv.org/abs/2311.12908",
        "DDE, the paper": "https://arxiv.org/abs/2411.14871",
    },
    keywords="diffusion-dpo, dpo, preference alignment, text-to-image, stable diffusion, sdxl, lora, triton",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["csrc_triton", "csrc_triton.*", "dpo", "dpo.*"]),
    package_data={
        "dpo.drawing": ["assets/*", "examples/*.png"],
        "dpo.settings": ["presets/*.toml"],
        "dpo.pages": ["*.html"],
        "dpo.planning": ["configs/**/*.json"],
        "dpo.evaluating": ["*.toml"],
        "dpo.voting": ["*.html"],
        "dpo.tiny": ["assets/**/*"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "diffusers>=0.39,<0.44",  # before, kohya's layers of SDXL did not load
        "transformers>=4.57.1,<6",  # 4.57.0 was withdrawn
        "peft>=0.19,<0.23",  # LoRA
        "accelerate>=1.0,<2",  # diffusers loads faster and leaner with it
        "safetensors>=0.8,<1",
        "huggingface_hub>=0.34,<3",  # below 1 with transformers 4, which asks for it
        "filelock>=3.10",  # one process in a folder; huggingface_hub brings it
        "datasets>=4.0,<6",  # data sets of the hub
        "pyarrow>=18",  # parquet, read by row group
        "pillow>=11",
        "numpy>=1.26,<3",
        "rich>=13,<16",  # the progress line
        "matplotlib>=3.9,<4",  # plots of the report
        "jinja2>=3.1,<4",  # the report's page
        "tomli_w>=1.0,<2",
        "psutil>=5.9; platform_system == 'Windows'",  # the most memory used
    ],
    extras_require={
        "bitsandbytes": [
            "bitsandbytes>=0.50,<0.52"
        ],  # its optimizers, on the CPU from 0.50; our own 8-bit AdamW needs none
        "xformers": ["xformers"],
        "vote": ["starlette>=0.46,<2", "uvicorn>=0.30,<1"],  # the page of a human study
        "tracking": ["tensorboard>=2.16", "wandb>=0.18"],
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.5,<4",
            "hypothesis>=6,<7",
            "ruff>=0.9",
            "mypy>=1.14",
            "bitsandbytes>=0.50,<0.52",
            "nbclient>=0.11,<1",  # runs the notebook
            "ipykernel>=7.4,<8",
            "tensorboard>=2.16",
            "scipy>=1.13",  # statistics to compare ours with
            "evalica>=0.4.2,<0.5",  # agreement and strengths to compare ours with
            "starlette>=0.46,<2",
            "uvicorn>=0.30,<1",
        ],
    },
    entry_points={
        "console_scripts": [
            "dpo-train = dpo.train:main",
            "dpo-prepare = dpo.prepare:main",
            "dpo-sweep = dpo.sweep:main",
            "dpo-report = dpo.report:main",
            "dpo-sample = dpo.sample:main",
            "dpo-evaluate = dpo.evaluate:main",
            "dpo-vote = dpo.vote:main",
            "dpo-label = dpo.label:main",
            "dpo-plan = dpo.plan:main",
            "dpo-replay = dpo.replay:main",
            "dpo-export = dpo.export:main",
            "dpo-extract = dpo.extract:main",
            "dpo-pairs = dpo.pairs:main",
        ]
    },
)
